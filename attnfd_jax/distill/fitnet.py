# SPDX-License-Identifier: Apache-2.0
"""Compares feature maps as hints (FitNets, Romero et al., arXiv 1412.6550).

  loss = mean over elements of (W student - teacher)^2

with a trained 1x1 convolution W without bias; optionally of normalized maps.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.losses import Labels
from attnfd_jax.models import layers
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray


def squared_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w c'],
  *,
  normalize: bool = False,
) -> Float[Array, ' b']:
  """Mean squared difference of two feature maps, per image.

  >>> student, teacher = jnp.zeros((2, 1, 1, 1)), jnp.full((2, 1, 1, 1), 3.0)
  >>> squared_distance(student, teacher).tolist()
  [9.0, 9.0]

  Args:
    student: the student's map.
    teacher: the teacher's map, which gets no gradient.
    normalize: standardize each channel of each image over its pixels. The
      distance is then 2 - 2 r, with the correlation r; from 0 to 4.
  """
  student, teacher = matching.in_float32(student, teacher)
  if normalize:
    student, teacher = (
      vectors.standardized(x, (1, 2)) for x in (student, teacher)
    )
  return jnp.mean(jnp.square(student - teacher), (1, 2, 3))


class Regressor(nn.Module):
  """1x1 convolution without bias, with PyTorch's default initialization."""

  features: int

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c']
  ) -> Float[Array, 'b h w {self.features}']:
    """Maps the channels to `features`."""
    init = layers.torch_uniform(x.shape[-1])
    return layers.Conv(self.features, 1, kernel_init=init, name='conv')(x)


class FitNet(nn.Module):
  """Sum over the taps of the squared distance to the teacher's feature map.

  The default weight of 10 is CIRKD's, for maps that are not normalized.

  Example:
    `--config.distill.method=fitnet --config.distill.fitnet.normalize`

  Attributes:
    taps: names of feature maps; those that both networks have are compared.
    match_size: 'to_teacher' or 'to_student' if heights or widths differ.
    normalize: normalized feature distillation, NFD (Liu et al., arXiv
      2207.05256): standardize each channel over height and width.
  """

  taps: Sequence[str] = ('aspp',)
  match_size: str = 'none'
  normalize: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; one term for each tap if there are several."""
    del labels, train, step
    maps = matching.pairs(
      student, teacher, self.taps, match_size=self.match_size
    )
    distances = {}
    for tap, (student_map, teacher_map) in maps.items():
      regressor = Regressor(teacher_map.shape[-1], name=f'regressor_{tap}')
      distances[tap] = squared_distance(
        regressor(student_map), teacher_map, normalize=self.normalize
      )
    return matching.mean_over_images(distances)
