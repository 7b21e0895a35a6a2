# SPDX-License-Identifier: Apache-2.0
"""Transfers attention (AT, Zagoruyko and Komodakis, arXiv 1612.03928).

The attention a(f) tells at which pixels a feature map f is strong:

  a(f) = v / ||v||,  v = mean over channels of f^2,
  loss = mean over images and pixels of (a(student) - a(teacher))^2
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_choice
from attnfd_jax.losses import Labels
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

DISTANCES = ('mean_square', 'norm')
NORM_SCOPES = ('image', 'column')


def attention(
  x: Float[AnyArray, 'b h w c'], *, norm_scope: str = 'image'
) -> Float[Array, 'b h w']:
  """The attention a(x); zeros for a map of zeros."""
  v = jnp.mean(jnp.square(vectors.scaled(x, (1, 2, 3))), -1)
  return vectors.unit(v, (1, 2) if norm_scope == 'image' else (1,))


def attention_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w d'],
  *,
  distance: str = 'mean_square',
  norm_scope: str = 'image',
) -> Float[Array, ' b']:
  """Distance of the attention of both feature maps, per image.

  The default ranges from 0 to 2 / (h w), where both are strong at different
  pixels.

  >>> student = jnp.array([[[[1.0], [0.0]]]])
  >>> attention_distance(student, 1 - student).round(3).tolist()
  [1.0]

  Args:
    student: the student's map.
    teacher: the teacher's map, which gets no gradient.
    distance: see AttentionTransfer.
    norm_scope: see AttentionTransfer.
  """
  student, teacher = matching.in_float32(student, teacher)
  difference = attention(student, norm_scope=norm_scope) - attention(
    teacher, norm_scope=norm_scope
  )
  square = jnp.square(difference)
  if distance == 'mean_square':
    return jnp.mean(square, (1, 2))
  total = jnp.sum(square, (1, 2))
  differs = total > 0  # The square root has no derivative at 0.
  return jnp.where(differs, jnp.sqrt(jnp.where(differs, total, 1)), 0)


class AttentionTransfer(nn.Module):
  """Sum over the taps of the distance of attention.

  Channel counts may differ. The default weight of 10,000 is CIRKD's, for one
  tap.

  Example:
    `--config.distill.method=at --config.distill.at.taps="('aspp','decoder')"`

  Attributes:
    taps: names of feature maps; those that both networks have are compared.
    match_size: 'to_teacher' or 'to_student' if heights or widths differ.
    distance: 'mean_square' as in the authors' code and CIRKD; 'norm' is the
      paper's || a(student) - a(teacher) ||, at most sqrt(2), which needs a
      small weight.
    norm_scope: 'image'; 'column' scales each column of an image to length 1
      instead, as AICSD's code does.
  """

  taps: Sequence[str] = ('aspp',)
  match_size: str = 'none'
  distance: str = 'mean_square'
  norm_scope: str = 'image'

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    check_choice('distance', self.distance, DISTANCES)
    check_choice('norm_scope', self.norm_scope, NORM_SCOPES)
    super().__post_init__()

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
    return matching.mean_over_images(
      {
        tap: attention_distance(
          *pair, distance=self.distance, norm_scope=self.norm_scope
        )
        for tap, pair in maps.items()
      }
    )
