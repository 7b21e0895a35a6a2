# SPDX-License-Identifier: Apache-2.0
"""Defines what a teacher is, and makes one of a frozen network.

A teacher is never part of a checkpoint, the optimizer state or the gradient.
teachers/sources.py loads teachers.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol, TYPE_CHECKING

import jax
from jaxtyping import Float

from attnfd_jax.models import network as networks
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray, PyTree


class Teacher(Protocol):
  """What training, evaluation and results need of a teacher.

  Attributes:
    name: for logs and tables.
    class_names: in the order of the logits.
    variables: arrays that are passed to `apply`, possibly none.

  Optional attributes:
    in_path_attention: whether gates in the forward path refine its feature
      maps.
    gates: variables of the AttnFD gates in its checkpoint, or None.
    network: its module.
    source: where it comes from.
    miou: on val, if known.
    remarks: lines for the log.
    fingerprint: hash of its weights, which must be the same on resume.
    compare: (image) -> differences from the original model; raises InputError
      if they are too large.
    with_taps: (names) -> the teacher with further feature maps, which a method
      asks for.
  """

  if TYPE_CHECKING:
    # Properties are read-only, so that an immutable class fits as well.
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def variables(self) -> PyTree: ...  # noqa: D102
  else:
    # A subclass may set them.
    name: str
    class_names: Sequence[str]
    variables: PyTree

  def apply(
    self,
    variables: PyTree,
    image: Float[AnyArray, 'b H W 3'],
    *,
    rng: jax.Array | None = None,
  ) -> Outputs:
    """Computes the outputs for normalized images; a pure function.

    Args:
      variables: those of the teacher.
      image: normalized images.
      rng: given in training only, where dropout is allowed.
    """
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNetwork:
  """A Linen module as a teacher.

  Attributes:
    network: the module. A DeepLabV3Plus has no ASPP dropout (aspp.py:104-111).
    variables: of the module.
    name: for logs and tables.
    class_names: in the order of the logits.
    batch_statistics: in training, normalize by the statistics of the batch, as
      the authors' teacher does; the running statistics never change.
    dropout: in training, apply dropout. A network of the user's instead applies
      it if batch_statistics is set.
    gates: frozen CBAMs at its taps, {'params', 'batch_stats'}, or None.
    source: where it comes from.
    remarks: how names in its PyTorch file differ from the authors'.
    miou: on val, if known.
  """

  network: Any
  variables: PyTree
  name: str
  class_names: Sequence[str]
  batch_statistics: bool = False
  dropout: bool = False
  gates: PyTree = None
  source: str = 'this run'
  remarks: Sequence[str] = ()
  miou: float | None = None

  def with_taps(self, taps: Sequence[str]) -> 'FrozenNetwork':
    """See with_taps of models/network.py."""
    return dataclasses.replace(
      self, network=networks.with_taps(self.network, taps)
    )

  @property
  def in_path_attention(self) -> bool:
    """Whether gates in the forward path refine the feature maps."""
    return getattr(self.network, 'in_path_attention', False)

  def apply(
    self,
    variables: PyTree,
    image: Float[AnyArray, 'b H W 3'],
    *,
    rng: jax.Array | None = None,
  ) -> Outputs:
    """See Teacher."""
    if rng is None:
      return self.network.apply(variables, image, train=False)
    mode = {'train': self.batch_statistics, 'rngs': {'dropout': rng}}
    if networks.is_ours(self.network):
      # Nothing is mutable, so that the running statistics do not change.
      return self.network.apply(variables, image, dropout=self.dropout, **mode)
    mutable = [name for name in variables if name != 'params']
    return self.network.apply(variables, image, mutable=mutable, **mode)[0]


def with_taps(teacher: Any, taps: Sequence[str]) -> Any:
  """Makes a teacher return these feature maps, too, if it has `with_taps`."""
  if not taps or not hasattr(teacher, 'with_taps'):
    return teacher
  return teacher.with_taps(taps)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A teacher with the `apply` of a network, for evaluation."""

  teacher: Any

  def apply(
    self,
    variables: PyTree,
    image: Float[AnyArray, 'b H W 3'],
    *,
    train: bool = False,
  ) -> Outputs:
    """See Network; `train` is ignored."""
    del train
    return self.teacher.apply(variables, image)
