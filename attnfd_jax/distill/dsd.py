# SPDX-License-Identifier: Apache-2.0
"""Double similarity distillation (DSD; Feng et al., TIP 2021), as in CIRKD.

Pixels: how attention, the energy of a map at each pixel, differs between the
maps of a network. Categories: how alike the classes' score maps are.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.pooling import average_pool
from attnfd_jax.distill.vectors import scaled, unit
from attnfd_jax.errors import InputError, within
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers, resizing

# Squared length below which the difference of unit vectors is rounding.
ROUNDING = 1e-12


def attention(x):
  """Mean square over the channels, [b, h, w, c] -> [b, h, w, 1], up to a
  factor of each image.
  """
  x = scaled(x.astype(layers.at_least_float32(x.dtype)), (1, 2, 3))
  return jnp.mean(jnp.square(x), -1, keepdims=True)


def residual_attention(maps):
  """Directions of the differences of attention: a list of [b, h, w, 1].

  One for each pair of maps [b, h', w', c'] of a network. Smaller maps are
  resized to the largest, so that maps of several strides can be compared; in
  CIRKD's network all are of one size. Zeros where two maps have the same
  attention.
  """
  size = max((x.shape[1:3] for x in maps), key=lambda size: size[0] * size[1])
  found = [resizing.resize(attention(x), *size) for x in maps]
  found = [unit(x, (1, 2)) for x in found]
  residuals = []
  for a, b in itertools.combinations(found, 2):
    square = jnp.sum(jnp.square(a - b), (1, 2), keepdims=True)
    residuals.append(unit(jnp.where(square > ROUNDING, a - b, 0), (1, 2)))
  return residuals


def pixel_distance(students, teachers):
  """Of each image, the mean over pairs of maps and pixels, [b].

  Args:
    students, teachers: lists of at least two maps [b, h, w, c], of the same
      places in both networks; the teacher's are constants.
  """
  ours, theirs = residual_attention(students), residual_attention(teachers)
  distances = [
    jnp.mean(jnp.square(a - jax.lax.stop_gradient(b)), (1, 2, 3))
    for a, b in zip(ours, theirs, strict=True)
  ]
  return sum(distances) / len(distances)


def category_similarity(logits, *, temperature, pool):
  """Products of the classes' distributions over pixels, [b, k, k]."""
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  logits = average_pool(logits, pool)
  b, h, w, k = logits.shape
  p = jax.nn.softmax(logits.reshape(b, h * w, k) / temperature, 1)
  return jnp.einsum('bni,bnj->bij', p, p)


def category_distance(student, teacher, *, temperature, pool):
  """Of each image, the mean over pairs of classes, [b]."""
  options = {'temperature': temperature, 'pool': pool}
  ours = category_similarity(student, **options)
  theirs = category_similarity(jax.lax.stop_gradient(teacher), **options)
  return jnp.mean(jnp.square(ours - theirs), (1, 2))


class DSD(nn.Module):
  """Both similarities; CIRKD trains with them and without KD.

  Attributes:
    taps: maps that are compared beside the logits; those that both networks
      have. CIRKD takes the scores of an auxiliary head, which our networks do
      not have, and the map before the classifier.
    pixel_weight, category_weight: of the two terms; 0 leaves one out.
    temperature: of the distributions over pixels.
    pool: side of the windows over which logits are averaged before.
    match_size: 'to_teacher' or 'to_student' where heights or widths of the maps
      of a tap differ.
    full_size: take logits of the size of the image.
  """

  taps: tuple[str, ...] = ('aspp', 'decoder')
  pixel_weight: float = 1000.0
  category_weight: float = 10.0
  temperature: float = 4.0
  pool: int = 2
  match_size: str = 'none'
  full_size: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    within('pixel_weight', self.pixel_weight, 0)
    within('category_weight', self.category_weight, 0)
    within('temperature', self.temperature, 1e-3, 1e6)
    within('pool', self.pool, 1, 1024)
    if not (self.pixel_weight or self.category_weight):
      raise InputError('pixel_weight or category_weight must be above 0.')
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; terms before their weights."""
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
    loss = sum(weights[name] * x for name, x in distances.items())
    return Mean.of(loss), {name: jnp.mean(x) for name, x in distances.items()}
