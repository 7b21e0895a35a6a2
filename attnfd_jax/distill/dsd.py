# SPDX-License-Identifier: Apache-2.0
"""Double similarity distillation (DSD; Feng et al., TIP 2021), as in CIRKD.

Pixel similarity compares, between student and teacher, how attention (the
energy of a feature map at each pixel) differs between the maps of a network.
Category similarity compares how similar the logit maps of the classes are.
"""

from collections.abc import Sequence
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.distill.pooling import average_pool
from attnfd_jax.distill.vectors import scaled, unit
from attnfd_jax.errors import check_range, InputError
from attnfd_jax.losses import Labels, Logits, Mean
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

# A difference of unit vectors with a smaller squared length is rounding.
ROUNDING = 1e-12


def attention(x: Float[AnyArray, 'b h w c']) -> Float[Array, 'b h w 1']:
  """Mean square over the channels, up to a constant factor per image."""
  x = scaled(x.astype(layers.at_least_float32(x.dtype)), (1, 2, 3))
  return jnp.mean(jnp.square(x), -1, keepdims=True)


def residual_attention(
  maps: Sequence[Float[AnyArray, 'b _h _w _c']],
) -> list[Float[Array, 'b h w 1']]:
  """Difference in attention of each pair of maps, scaled to length 1.

  Smaller maps are resized to the largest, so that maps of several strides can
  be compared; in CIRKD's network all have the same size. Zeros where two maps
  have the same attention.

  Args:
    maps: feature maps of one network, of any size.
  """
  size = max((x.shape[1:3] for x in maps), key=lambda size: size[0] * size[1])
  resized = [resizing.resize(attention(x), *size) for x in maps]
  attentions = [unit(x, (1, 2)) for x in resized]
  residuals = []
  for a, b in itertools.combinations(attentions, 2):
    square = jnp.sum(jnp.square(a - b), (1, 2), keepdims=True)
    residuals.append(unit(jnp.where(square > ROUNDING, a - b, 0), (1, 2)))
  return residuals


def pixel_distance(
  students: Sequence[Float[AnyArray, 'b _h _w _c']],
  teachers: Sequence[Float[AnyArray, 'b _h _w _c']],
) -> Float[Array, ' b']:
  """Mean squared difference of residual attention, per image.

  >>> one, two = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [1.0]]]])
  >>> pixel_distance([one, two], [two, one]).round(3).tolist()
  [2.0]

  Args:
    students: at least two feature maps of the student.
    teachers: the teacher's maps at the same taps; they get no gradient.
  """
  student_residuals = residual_attention(students)
  teacher_residuals = residual_attention(teachers)
  distances = [
    jnp.mean(jnp.square(a - jax.lax.stop_gradient(b)), (1, 2, 3))
    for a, b in zip(student_residuals, teacher_residuals, strict=True)
  ]
  return matching.total(distances) / len(distances)


def category_similarity(
  logits: Logits, *, temperature: float, pool: int
) -> Float[Array, 'b k k']:
  """Products of the distributions of all pairs of classes over the pixels.

  Args:
    logits: of each pixel and class.
    temperature: divides the logits before the softmax over pixels.
    pool: side of the windows over which logits are averaged first.
  """
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  logits = average_pool(logits, pool)
  b, h, w, k = logits.shape
  p = jax.nn.softmax(logits.reshape(b, h * w, k) / temperature, 1)
  return jnp.einsum('bni,bnj->bij', p, p)


def category_distance(
  student: Logits, teacher: Logits, *, temperature: float, pool: int
) -> Float[Array, ' b']:
  """Mean squared difference of category similarity, per image.

  >>> student = jnp.array([[[[9.0], [-9.0]]]])
  >>> category_distance(student, 0 * student, temperature=1, pool=1).tolist()
  [0.25]

  Args:
    student: logits.
    teacher: logits of the same shape; they get no gradient.
    temperature: see category_similarity.
    pool: see category_similarity.
  """
  student_similarity, teacher_similarity = (
    category_similarity(x, temperature=temperature, pool=pool)
    for x in (student, jax.lax.stop_gradient(teacher))
  )
  return jnp.mean(jnp.square(student_similarity - teacher_similarity), (1, 2))


class DSD(nn.Module):
  """Both similarities; CIRKD trains with them and without KD.

  Example:
    `--config.distill.method=dsd --config.distill.dsd.category_weight=0`

  Attributes:
    taps: names of the feature maps to compare along with the logits; those that
      both networks have. CIRKD uses the logits of an auxiliary head, which our
      networks do not have, and the map before the classifier.
    pixel_weight: weight of the pixel similarity; 0 omits it.
    category_weight: weight of the category similarity; 0 omits it.
    temperature: of the distributions over pixels.
    pool: side of the windows over which logits are averaged first.
    match_size: 'to_teacher' or 'to_student' if heights or widths of the maps
      differ.
    full_size: use logits at the size of the image.
  """

  taps: Sequence[str] = ('aspp', 'decoder')
  pixel_weight: float = 1000.0
  category_weight: float = 10.0
  temperature: float = 4.0
  pool: int = 2
  match_size: str = 'none'
  full_size: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    check_range('pixel_weight', self.pixel_weight, 0)
    check_range('category_weight', self.category_weight, 0)
    check_range('temperature', self.temperature, 1e-3, 1e6)
    check_range('pool', self.pool, 1, 1024)
    if not (self.pixel_weight or self.category_weight):
      raise InputError('pixel_weight or category_weight must be above 0.')
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
    """See distill/method.py; the terms are before weighting."""
    del labels, train, step
    logits = matching.logits(student, teacher, full_size=self.full_size)
    matching.check_logits(*logits)
    weights, distances = {}, {}
    if self.pixel_weight:
      pairs = matching.pairs(
        student, teacher, self.taps, match_size=self.match_size
      )
      sides = zip(*pairs.values(), logits, strict=True)
      weights['pixel'] = self.pixel_weight
      distances['pixel'] = pixel_distance(*map(list, sides))
    if self.category_weight:
      weights['category'] = self.category_weight
      distances['category'] = category_distance(
        *logits, temperature=self.temperature, pool=self.pool
      )
    loss = matching.total(weights[name] * x for name, x in distances.items())
    return Mean.of(loss), {name: jnp.mean(x) for name, x in distances.items()}
