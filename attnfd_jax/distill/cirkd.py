# SPDX-License-Identifier: Apache-2.0
"""Compares relations of pixels across images (CIRKD, arXiv 2204.06986).

Three weighted terms. With the pixel vectors of image i, scaled to length 1, as
the rows of S_i and T_i (student and teacher), vectors q of the teacher in
per-class queues, and temperature t:

  batch:  mean over images i, j and pixels of
          KL(softmax(T_i T_j' / t) || softmax(S_i S_j' / t))
  pixel, region:  mean over labeled pixels of
          KL(softmax(T q' / t) || softmax(h(S) q' / t)),  h a projection
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from attnfd_jax.distill import labels as label_maps
from attnfd_jax.distill import memory, taps
from attnfd_jax.distill.method import LossAndTerms, Scalar, Step
from attnfd_jax.distill.pooling import average_pool
from attnfd_jax.distill.vectors import unit
from attnfd_jax.errors import check_choice, check_range
from attnfd_jax.losses import Labels
from attnfd_jax.models import layers
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray


def _divergences(
  student: Float[AnyArray, 'b r c'],
  teacher: Float[AnyArray, 'b r d'],
  keys: tuple[Float[AnyArray, 'm c'], Float[AnyArray, 'm d']],
  temperature: float,
) -> Float[Array, 'b r']:
  """KL of the similarities to the keys (of student and teacher), by row."""
  log_p, target = (
    jax.nn.log_softmax(
      jnp.einsum('brc,mc->brm', x, y, precision='highest') / temperature
    )
    for x, y in zip((student, teacher), keys, strict=True)
  )
  return jnp.sum(jnp.exp(target) * (target - log_p), -1)


def _by_parts(
  x: Float[AnyArray, 'b n *rest'], parts: int
) -> Float[Array, '{parts} b rows *rest']:
  """Splits axis 1 into parts, padded with zeros."""
  b, n, *rest = x.shape
  rows = -(-n // parts)
  missing = ((0, 0), (0, parts * rows - n), *((0, 0) for _ in rest))
  x = jnp.pad(x, missing).reshape(b, parts, rows, *rest)
  # The batch remains an axis, sharded over the devices.
  return jnp.moveaxis(x, 1, 0)


def batch_distance(
  student: Float[AnyArray, 'b n c'],
  teacher: Float[AnyArray, 'b n d'],
  *,
  temperature: float = 0.1,
) -> Scalar:
  """The term 'batch'.

  Needs the memory of a few pairs of images only: rows are compared in parts,
  which are recomputed in the backward pass.

  >>> student, teacher = jnp.ones((1, 2, 1)), jnp.eye(2)[None]
  >>> float(batch_distance(student, teacher, temperature=1.0))
  0.1109...

  Args:
    student: unit vectors of the pixels of each image.
    teacher: unit vectors of the same pixels; they get no gradient.
    temperature: t.
  """
  b, n, _ = student.shape
  teacher = jax.lax.stop_gradient(teacher)
  rows = [_by_parts(x, b) for x in (student, teacher)]

  @jax.checkpoint
  def compare(part, keys):
    # Padding rows of zeros are equally similar to all keys: they add nothing.
    return jnp.sum(_divergences(part[0], part[1], keys, temperature))

  def add_part(total, part):
    def add_image(total, keys):
      return total + compare(part, keys), None

    return jax.lax.scan(add_image, total, (student, teacher))[0], None

  zero = jnp.zeros((), student.dtype)
  return jax.lax.scan(add_part, zero, rows)[0] / (b * b * n)


def memory_distance(
  student: Float[AnyArray, 'b n c'],
  teacher: Float[AnyArray, 'b n c'],
  keys: Float[AnyArray, 'm c'],
  valid: Bool[AnyArray, 'b n'],
  *,
  temperature: float = 0.1,
) -> Scalar:
  """The terms 'pixel' and 'region'; 0 if no row is valid.

  >>> student, teacher = jnp.ones((1, 1, 2)), jnp.array([[[1.0, 0.0]]])
  >>> keys, valid = jnp.eye(2), jnp.ones((1, 1), bool)
  >>> float(memory_distance(student, teacher, keys, valid, temperature=1.0))
  0.1109...

  Args:
    student: projected unit vectors of the pixels of each image.
    teacher: unit vectors of the same pixels; they get no gradient.
    keys: vectors of the teacher from the queues.
    valid: which pixels count, i.e. are labeled.
    temperature: t.
  """
  rows = [student, jax.lax.stop_gradient(teacher), valid.astype(student.dtype)]
  rows = [_by_parts(x, student.shape[0]) for x in rows]

  @jax.checkpoint
  def compare(part):
    student, teacher, weights = part
    both = keys, keys
    return jnp.sum(_divergences(student, teacher, both, temperature) * weights)

  def add_part(total, part):
    return total + compare(part), None

  zero = jnp.zeros((), student.dtype)
  total = jax.lax.scan(add_part, zero, rows)[0]
  return total / jnp.maximum(jnp.sum(valid, dtype=student.dtype), 1)


class Projection(nn.Module):
  """1x1 convolution, normalization, ReLU, 1x1 convolution; no biases."""

  features: int

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c'], *, train: bool
  ) -> Float[Array, 'b h w {self.features}']:
    """Projects the vector of each pixel."""
    init = layers.torch_uniform
    first = layers.ConvNorm(
      self.features,
      1,
      kernel_init=init(x.shape[-1]),
      dtype=x.dtype,
      name='hidden',
    )
    x = nn.relu(first(x, train=train))
    last = layers.Conv(
      self.features,
      1,
      kernel_init=init(self.features),
      dtype=x.dtype,
      name='last',
    )
    return last(x)


class CIRKD(nn.Module):
  """CIRKD, first version; needs labels.

  The queues take 4 * classes * channels of the teacher * (pixel_memory +
  region_memory) bytes, 470 MB for 21 classes and 256 channels, also in each
  checkpoint.

  Example:
    `--config.distill.method=kd+cirkd --config.distill.cirkd.pixel_memory=2000`

  Attributes:
    tap: name of the feature map to compare.
    batch_weight: weight of the term 'batch'; 0 omits it.
    pixel_weight: weight of the term 'pixel'; 0 omits it. The authors use 0.01
      for both memories on Pascal VOC.
    region_weight: weight of the term 'region'; 0 omits it.
    temperature: t of the term 'batch'.
    memory_temperature: t of the memories.
    pool: side of the windows over which the pixels of the term 'batch' are
      averaged; the authors' second version uses 4 for large maps. At stride 4
      the term is too slow without it.
    pixel_memory: number of pixel vectors kept per class.
    region_memory: number of class means kept per class.
    pixels: maximum number of pixels per image and class added to the memory.
    pixel_samples: number of pixel vectors compared per step, of all classes.
    region_samples: number of class means compared per step, of all classes.
    positions: 'class', or 'image' as the authors' code, which stores pixels of
      other classes, see memory.class_pixels.
    overflow: 'wrap', or 'reset' as the authors' code, see memory.pushed.
  """

  tap: str = 'aspp'
  batch_weight: float = 1.0
  pixel_weight: float = 0.1
  region_weight: float = 0.1
  temperature: float = 0.1
  memory_temperature: float = 0.1
  pool: int = 1
  pixel_memory: int = 20_000
  region_memory: int = 2_000
  pixels: int = 16
  pixel_samples: int = 4096
  region_samples: int = 1024
  positions: str = 'class'
  overflow: str = 'wrap'

  def __post_init__(self):
    for name in ('batch_weight', 'pixel_weight', 'region_weight'):
      check_range(name, getattr(self, name), 0, 1e30)
    for name in ('temperature', 'memory_temperature'):
      check_range(name, getattr(self, name), 1e-3, 1e6)
    for name in ('pool', 'region_memory', 'pixels'):
      check_range(name, getattr(self, name), 1, 2**30)
    for name in ('pixel_samples', 'region_samples'):
      check_range(name, getattr(self, name), 0, 2**30)
    check_range('pixel_memory', self.pixel_memory, self.pixels, 2**30)
    check_choice('positions', self.positions, memory.POSITIONS)
    check_choice('overflow', self.overflow, memory.OVERFLOWS)
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
    """See distill/method.py; one term per part, before its weight."""
    del step
    sides = taps.shared(student, teacher, [self.tap])
    student_map, teacher_map = (side[self.tap] for side in sides)
    if student_map.shape[1:3] != teacher_map.shape[1:3]:
      raise ValueError(
        f'Sizes differ at {self.tap!r}: student {student_map.shape}, teacher '
        f'{teacher_map.shape}. CIRKD compares pixel by pixel: use networks '
        'with the same output_stride, or another tap.'
      )
    student_map, teacher_map = taps.in_float32(student_map, teacher_map)
    terms, weights = {}, {}
    if self.batch_weight:
      student_rows, teacher_rows = (
        _rows(average_pool(x, self.pool)) for x in (student_map, teacher_map)
      )
      terms['batch'] = batch_distance(
        student_rows, teacher_rows, temperature=self.temperature
      )
      weights['batch'] = self.batch_weight
    if self.pixel_weight or self.region_weight:
      labels = label_maps.nearest(labels, *teacher_map.shape[1:3])
      pixel_labels = labels.reshape(labels.shape[0], -1)
      num_classes = student['logits'].shape[-1]
      valid, target = pixel_labels < num_classes, _rows(teacher_map)
      projection = Projection(teacher_map.shape[-1], name='projection')
      projected = _rows(projection(student_map, train=train))
      memories = self._memories(target, pixel_labels, num_classes, train)
      for name, keys in memories.items():
        terms[name] = memory_distance(
          projected, target, keys, valid, temperature=self.memory_temperature
        )
        weights[name] = getattr(self, f'{name}_weight')
    loss = sum(weight * terms[name] for name, weight in weights.items())
    return jnp.asarray(loss, student_map.dtype), terms

  def _memories(
    self,
    target: Float[Array, 'b n c'],
    labels: Integer[AnyArray, 'b n'],
    num_classes: int,
    train: bool,
  ) -> dict[str, Float[Array, 'm c']]:
    """The vectors to compare with, after adding those of this batch."""
    channels, memories = target.shape[-1], {}
    for name in ('pixel', 'region'):
      if not getattr(self, f'{name}_weight'):
        continue
      size = getattr(self, f'{name}_memory')

      def start(size=size):
        key = self.make_rng('distill')
        return memory.random_units(key, num_classes, size, channels)

      queue = self.variable('memory', name, start)
      pointers = self.variable(
        'memory', f'{name}_pointers', jnp.zeros, (num_classes,), jnp.int32
      )
      updates = train and self.is_mutable_collection('memory')
      if updates and not self.is_initializing():
        if name == 'region':
          means, present = memory.class_means(target, labels, num_classes)
          new = means[:, :, None], present[:, :, None]
        else:
          new = memory.class_pixels(
            self.make_rng('distill'),
            target,
            labels,
            num_classes,
            self.pixels,
            positions=self.positions,
          )
        # A single class mean always fits.
        overflow = self.overflow if name == 'pixel' else 'wrap'
        queue.value, pointers.value = memory.pushed(
          queue.value, pointers.value, *new, overflow=overflow
        )
      count = getattr(self, f'{name}_samples') // num_classes + 1
      # The same rows for every class.
      key = self.make_rng('distill')
      chosen = jax.random.permutation(key, size)[: min(count, size)]
      memories[name] = queue.value[:, chosen].reshape(-1, channels)
    return memories


def _rows(x: Float[AnyArray, 'b h w c']) -> Float[Array, 'b n c']:
  """Unit vectors of all pixels."""
  return unit(x.reshape(x.shape[0], -1, x.shape[-1]), (-1,))
