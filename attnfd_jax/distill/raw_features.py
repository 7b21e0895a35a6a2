# SPDX-License-Identifier: Apache-2.0
"""Compares raw features (LAD, PAD and CAD): AttnFD without attention.

Attributed to Liu et al., "Rethinking Knowledge Distillation with Raw Features
for Semantic Segmentation" (openreview HwbEioBGLo3), as implemented by AttnFD's
authors (AICSD, branches `kaggle` 7777795 and `Arya-Cbam` b67fe04): with the
teacher's feature map t, and the student's s after a 1x1 convolution and batch
normalization,

  loss = sum over taps of the mean over units u of || s_u/|s_u| - t_u/|t_u| ||^2

where a unit u is the whole batch (LAD), the vector of a pixel (PAD), or one
channel of one image (CAD).
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.attnfd import AttnFD, CHOICES
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_choice
from attnfd_jax.losses import Labels
from attnfd_jax.models.network import Outputs


class _RawFeatures(nn.Module):
  """Base class of the three.

  Attributes:
    taps: names of feature maps; those that both networks have are compared.
    match_size: see AttnFD.
    connector_schedule: see training/optim.py; the authors use 'always'.
  """

  norm_scope: ClassVar[str]  # See direction_distance.
  taps: Sequence[str] = ('backbone', 'aspp', 'decoder')
  match_size: str = 'none'
  connector_schedule: str = 'always'

  def __post_init__(self):
    for name in ('match_size', 'connector_schedule'):
      check_choice(name, getattr(self, name), CHOICES[name])
    super().__post_init__()

  def parameter_groups(self) -> tuple[tuple[str, str], ...]:
    """Puts all parameters, which are connectors, into their group."""
    return ((r'connectors_\w+/.*', 'connectors'),)

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; one term for each tap."""
    del labels, step
    maps = matching.shared(student, teacher, self.taps)
    channels = [{tap: x.shape[-1] for tap, x in side.items()} for side in maps]
    distiller = AttnFD(
      *channels,
      teacher_attention='none',
      student_attention='none',
      norm_scope=self.norm_scope,
      match_size=self.match_size,
      # Flax accepts scopes as well.
      parent=self.scope,  # pyright: ignore[reportArgumentType]
    )
    return distiller(*maps, train=train)


class LAD(_RawFeatures):
  """Raw features, with the whole batch as one unit.

  Example:
    `--config.distill.method=lad --config.distill.lad.match_size=to_teacher`

  Attributes:
    reduction: 'unitmean', or 'batchmean' as the authors: divided by the
      effective batch size, as they also do with the cross-entropy, see
      ce_batch_division.
  """

  norm_scope = 'batch'
  reduction: str = 'unitmean'

  def __post_init__(self):
    check_choice('reduction', self.reduction, ('unitmean', 'batchmean'))
    super().__post_init__()

  @property
  def divides_by_batch(self) -> bool:
    """Whether the distance of the one unit is divided by the batch size."""
    return self.reduction == 'batchmean'


class PAD(_RawFeatures):
  """Raw features, with the vector of each pixel as a unit.

  Example:
    `--config.distill.method=pad --config.distill.pad.match_size=to_teacher`
  """

  norm_scope = 'pixel'


class CAD(_RawFeatures):
  """Raw features, with each channel of each image as a unit.

  Example:
    `--config.distill.method=cad --config.distill.cad.match_size=to_teacher`
  """

  norm_scope = 'channel'
