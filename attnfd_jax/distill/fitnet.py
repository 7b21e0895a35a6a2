# SPDX-License-Identifier: Apache-2.0
"""Hints (FitNets, Romero et al., arXiv 1412.6550), also of normalized maps.

  loss = mean over elements of (W student - teacher)^2

with a 1x1 convolution W without bias, which is trained.
"""

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors
from attnfd_jax.models import layers


def squared_distance(student, teacher, *, normalize=False):
  """Mean square of the difference of each image, [b], of maps [b, h, w, c].

  With `normalize` each channel of each image first gets mean 0 and deviation 1
  over its pixels: from 0 to 4, 2 - 2 r with the correlation r.
  """
  student, teacher = matching.in_float32(student, teacher)
  if normalize:
    student, teacher = (
      vectors.standardized(x, (1, 2)) for x in (student, teacher)
    )
  return jnp.mean(jnp.square(student - teacher), (1, 2, 3))


class Regressor(nn.Module):
  """1x1 convolution without bias, from PyTorch's default start."""

  features: int

  @nn.compact
  def __call__(self, x):
    init = layers.torch_uniform(x.shape[-1])
    return layers.Conv(self.features, 1, kernel_init=init, name='conv')(x)


class FitNet(nn.Module):
  """Sum over the taps of the squared distance to the teacher's map.

  The weight, 10, is CIRKD's, for maps that are not normalized.

  Attributes:
    taps: names of maps; those that both sides have are compared.
    match_size: 'to_teacher' or 'to_student' where heights or widths differ.
    normalize: normalized feature distillation, NFD (Liu et al., arXiv
      2207.05256): mean and deviation are over height and width.
  """

  taps: tuple[str, ...] = ('aspp',)
  match_size: str = 'none'
  normalize: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    super().__post_init__()

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    maps = matching.pairs(
      student, teacher, self.taps, match_size=self.match_size
    )
    distances = {}
    for tap, (ours, theirs) in maps.items():
      ours = Regressor(theirs.shape[-1], name=f'regressor_{tap}')(ours)
      distances[tap] = squared_distance(ours, theirs, normalize=self.normalize)
    return matching.mean_over_images(distances)
