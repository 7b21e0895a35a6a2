# SPDX-License-Identifier: Apache-2.0
"""LAD, PAD and CAD: AttnFD without attention, each with its unit of length.

Attributed to Liu et al., "Rethinking Knowledge Distillation with Raw Features
for Semantic Segmentation" (openreview HwbEioBGLo3), in the form of AttnFD's
authors (AICSD, branches `kaggle` 7777795 and `Arya-Cbam` b67fe04): with s the
student's map after a 1x1 convolution and batch normalization, t the teacher's,

  loss = sum over taps of the mean over units u of || s_u/|s_u| - t_u/|t_u| ||^2

where a unit is the whole batch (LAD), the vector of a pixel (PAD), or one
channel of one image (CAD).
"""

import flax.linen as nn

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.attnfd import AttnFD, CHOICES
from attnfd_jax.errors import one_of


class _RawFeatures(nn.Module):
  """What the three share.

  Attributes:
    taps: names of maps; those that both sides have are compared.
    match_size: see AttnFD.
    connector_schedule: see training/optim.py; 'always' is the authors'.
  """

  taps: tuple[str, ...] = ('backbone', 'aspp', 'decoder')
  match_size: str = 'none'
  connector_schedule: str = 'always'

  def __post_init__(self):
    for name in ('match_size', 'connector_schedule'):
      one_of(name, getattr(self, name), CHOICES[name])
    super().__post_init__()

  def parameter_groups(self):
    """All it has are connectors."""
    return ((r'connectors_\w+/.*', 'connectors'),)

  def __call__(self, student, teacher, labels, *, train, step):
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
      parent=self.scope,
    )
    return distiller(*maps, train=train)


class LAD(_RawFeatures):
  """Of the whole batch.

  Attributes:
    reduction: 'unitmean', or 'batchmean' as the authors: divided by the number
      of images, as they also divide the cross-entropy, see ce_batch_division.
  """

  norm_scope = 'batch'
  reduction: str = 'unitmean'

  def __post_init__(self):
    one_of('reduction', self.reduction, ('unitmean', 'batchmean'))
    super().__post_init__()

  @property
  def divides_by_batch(self):
    """One unit for the whole batch, and a sum divided by its images."""
    return self.reduction == 'batchmean'


class PAD(_RawFeatures):
  """Of the vector of each pixel."""

  norm_scope = 'pixel'


class CAD(_RawFeatures):
  """Of each channel of each image."""

  norm_scope = 'channel'
