# SPDX-License-Identifier: Apache-2.0
"""Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928).

Where a map f is strong, as a vector of its pixels:

  a(f) = v / ||v||,  v = mean over channels of f^2,
  loss = mean over images and pixels of (a(student) - a(teacher))^2
"""

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors
from attnfd_jax.errors import one_of

DISTANCES = ('mean_square', 'norm')
NORM_SCOPES = ('image', 'column')


def attention(x, *, norm_scope='image'):
  """a(x) of [b, h, w, c], [b, h, w]; zeros for a map of zeros."""
  v = jnp.mean(jnp.square(vectors.scaled(x, (1, 2, 3))), -1)
  return vectors.unit(v, (1, 2) if norm_scope == 'image' else (1,))


def attention_distance(
  student, teacher, *, distance='mean_square', norm_scope='image'
):
  """Of each image, [b]; of maps [b, h, w, c] and [b, h, w, c'].

  From 0 to 2 / (h w), where the angle between the two vectors is 90 degrees;
  options as in AttentionTransfer.
  """
  student, teacher = matching.in_float32(student, teacher)
  difference = attention(student, norm_scope=norm_scope) - attention(
    teacher, norm_scope=norm_scope
  )
  square = jnp.square(difference)
  if distance == 'mean_square':
    return jnp.mean(square, (1, 2))
  total = jnp.sum(square, (1, 2))
  differs = total > 0  # A root has no derivative at 0.
  return jnp.where(differs, jnp.sqrt(jnp.where(differs, total, 1)), 0)


class AttentionTransfer(nn.Module):
  """Sum over the taps of the distance of attention maps.

  Channels may differ. The weight, 10,000, is CIRKD's, for one tap.

  Attributes:
    taps: names of maps; those that both sides have are compared.
    match_size: 'to_teacher' or 'to_student' where heights or widths differ.
    distance: 'mean_square' as in the authors' code and CIRKD; 'norm' is the
      paper's || a(student) - a(teacher) ||, up to sqrt(2), for a small weight.
    norm_scope: 'image'; 'column' gives length 1 to each column of an image
      instead, as AICSD's code does.
  """

  taps: tuple[str, ...] = ('aspp',)
  match_size: str = 'none'
  distance: str = 'mean_square'
  norm_scope: str = 'image'

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    one_of('distance', self.distance, DISTANCES)
    one_of('norm_scope', self.norm_scope, NORM_SCOPES)
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    maps = matching.pairs(
      student, teacher, self.taps, match_size=self.match_size
    )
    return matching.mean_over_images(
      {
        tap: attention_distance(
          *pair, distance=self.distance, norm_scope=self.norm_scope
        )
        for tap, pair in maps.items()
      }
    )
