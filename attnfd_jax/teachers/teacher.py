# SPDX-License-Identifier: Apache-2.0
"""The contract of a teacher, and a frozen network as one.

A teacher is never in a checkpoint, the optimizer or the gradient. Its sources
are in teachers/sources.py.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol

import jax

from attnfd_jax.models import network as networks
from attnfd_jax.models.network import Outputs


class Teacher(Protocol):
  """What the training step, the score of a teacher and results need.

  Optional attributes, which methods may ask for: `in_path_attention`, whether
  its maps are refined by gates in its forward path; `gates`, what its
  checkpoint has stored for AttnFD; `network`, its module; `source`, where it is
  from; `miou`, on val, if known; `remarks`, for the log; `fingerprint`, of its
  weights, which a resumed stage must find again; `compare(image)`, which raises
  an InputError if it is not what it stands for; `with_taps(names)`, the teacher
  with further maps that a method asks for.
  """

  name: str
  class_names: Sequence[str]
  variables: Any  # A pytree of arrays, possibly empty.

  def apply(
    self, variables: Any, image: jax.Array, *, rng: Any = None
  ) -> Outputs:
    """Outputs of normalized images [b, H, W, 3].

    Pure. Without `rng` it is scored; with one a student learns from it, and it
    may drop at random.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNetwork:
  """A network of ours as a teacher.

  Attributes:
    network: the module; no ASPP dropout in a teacher (aspp.py:104-111).
    batch_statistics: normalize by the batch while a student learns, as the
      authors' teacher does; its running statistics never change.
    dropout: drop at random while a student learns; a network of the user's
      drops where it normalizes by the batch.
    remarks: how its PyTorch file was read, where names were not the authors'.
    gates: frozen CBAMs at its taps, {'params', 'batch_stats'}, or None.
  """

  network: Any
  variables: Any
  name: str
  class_names: Sequence[str]
  batch_statistics: bool = False
  dropout: bool = False
  gates: Any = None
  source: str = 'this run'
  remarks: Sequence[str] = ()
  miou: float | None = None

  def with_taps(self, taps):
    """See `with_taps` of models/network.py."""
    return dataclasses.replace(
      self, network=networks.with_taps(self.network, taps)
    )

  @property
  def in_path_attention(self):
    return getattr(self.network, 'in_path_attention', False)

  def apply(self, variables, image, *, rng=None):
    """See Teacher."""
    if rng is None:
      return self.network.apply(variables, image, train=False)
    mode = {'train': self.batch_statistics, 'rngs': {'dropout': rng}}
    if networks.is_ours(self.network):
      # Statistics are not mutable here: the teacher stays as it is.
      return self.network.apply(variables, image, dropout=self.dropout, **mode)
    changing = [name for name in variables if name != 'params']
    return self.network.apply(variables, image, mutable=changing, **mode)[0]


def with_taps(teacher, taps):
  """`teacher` with these maps, too, if it has `with_taps`."""
  if not taps or not hasattr(teacher, 'with_taps'):
    return teacher
  return teacher.with_taps(taps)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A teacher where a network is scored: apply(variables, image, train)."""

  teacher: Any

  def apply(self, variables, image, *, train=False):
    """Outputs, as a network."""
    del train
    return self.teacher.apply(variables, image)
