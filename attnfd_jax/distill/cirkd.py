# SPDX-License-Identifier: Apache-2.0
"""CIRKD: relations of pixels across images (arXiv 2204.06986).

Three terms, each with its weight. With rows F_i of pixel vectors of length 1 of
image i, and q vectors of the teacher that are remembered for each class,

  batch:  mean over images i, j and pixels of
          KL(softmax(T_i T_j' / t) || softmax(S_i S_j' / t))
  pixel, region:  mean over labeled pixels of
          KL(softmax(T q' / t) || softmax(h(S) q' / t)),  h a projection
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import labels as label_maps
from attnfd_jax.distill import memory, taps
from attnfd_jax.distill.pooling import average_pool
from attnfd_jax.distill.vectors import unit
from attnfd_jax.errors import one_of, within
from attnfd_jax.models import layers


def _divergences(student, teacher, keys, temperature):
  """KL of similarities to keys of (student, teacher), by row: [b, r]."""
  log_p, target = (
    jax.nn.log_softmax(
      jnp.einsum('brc,mc->brm', x, y, precision='highest') / temperature
    )
    for x, y in zip((student, teacher), keys, strict=True)
  )
  return jnp.sum(jnp.exp(target) * (target - log_p), -1)


def _by_parts(x, parts):
  """[b, n, ...] -> [parts, b, n / parts, ...], with zeros at the end."""
  b, n, *rest = x.shape
  rows = -(-n // parts)
  missing = ((0, 0), (0, parts * rows - n), *((0, 0) for _ in rest))
  x = jnp.pad(x, missing).reshape(b, parts, rows, *rest)
  # The batch stays an axis, which devices share.
  return jnp.moveaxis(x, 1, 0)


def batch_distance(student, teacher, *, temperature=0.1):
  """The term 'batch' of unit vectors [b, n, c] and [b, n, c'].

  In the memory of a few pairs of images: parts of the rows are compared one
  after the other, and again for the gradient.
  """
  b, n, _ = student.shape
  teacher = jax.lax.stop_gradient(teacher)
  rows = [_by_parts(x, b) for x in (student, teacher)]

  @jax.checkpoint
  def compare(part, keys):
    # Rows of zeros are equally like all: they add nothing.
    return jnp.sum(_divergences(*part, keys, temperature))

  def add_part(total, part):
    def add_image(total, keys):
      return total + compare(part, keys), None

    return jax.lax.scan(add_image, total, (student, teacher))[0], None

  zero = jnp.zeros((), student.dtype)
  return jax.lax.scan(add_part, zero, rows)[0] / (b * b * n)


def memory_distance(student, teacher, keys, valid, *, temperature=0.1):
  """Mean over valid rows of KL of similarities to keys [m, c]; 0 without any.

  Of unit vectors [b, n, c] of both, and valid, [b, n].
  """
  rows = [student, jax.lax.stop_gradient(teacher), valid.astype(student.dtype)]
  rows = [_by_parts(x, student.shape[0]) for x in rows]

  @jax.checkpoint
  def compare(part):
    ours, theirs, weights = part
    both = keys, keys
    return jnp.sum(_divergences(ours, theirs, both, temperature) * weights)

  def add_part(total, part):
    return total + compare(part), None

  zero = jnp.zeros((), student.dtype)
  total = jax.lax.scan(add_part, zero, rows)[0]
  return total / jnp.maximum(jnp.sum(valid, dtype=student.dtype), 1)


class Projection(nn.Module):
  """1x1 convolution, normalization, ReLU, 1x1 convolution; no biases."""

  features: int

  @nn.compact
  def __call__(self, x, *, train):
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
  """CIRKD, first version.

  The queues take 4 * classes * channels of the teacher * (pixel_memory +
  region_memory) bytes, 470 MB at 21 classes and 256 channels: they are in each
  checkpoint.

  Attributes:
    tap: the map that is compared.
    batch_weight, pixel_weight, region_weight: of the three terms, 0 leaves one
      out. The authors take 0.01 for both memories on Pascal VOC.
    temperature: of the batch.
    memory_temperature: of the memories.
    pool: size of the means of pixels in the batch term; the authors' second
      version takes 4 where maps are large. At stride 4 the term is too slow
      without.
    pixel_memory, region_memory: vectors that are kept of each class.
    pixels: that an image adds to the memory of each class, at most.
    pixel_samples, region_samples: vectors of a step, of all classes.
    positions: 'class', or 'image' as the authors' code, which remembers pixels
      of other classes: see memory.class_pixels.
    overflow: 'wrap', or 'reset' as the authors' code: see memory.pushed.
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
      within(name, getattr(self, name), 0, 1e30)
    for name in ('temperature', 'memory_temperature'):
      within(name, getattr(self, name), 1e-3, 1e6)
    for name in ('pool', 'region_memory', 'pixels'):
      within(name, getattr(self, name), 1, 2**30)
    for name in ('pixel_samples', 'region_samples'):
      within(name, getattr(self, name), 0, 2**30)
    within('pixel_memory', self.pixel_memory, self.pixels, 2**30)
    one_of('positions', self.positions, memory.POSITIONS)
    one_of('overflow', self.overflow, memory.OVERFLOWS)
    super().__post_init__()

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; a term for each part, before its weight."""
    del step
    sides = taps.shared(student, teacher, [self.tap])
    ours, theirs = (side[self.tap] for side in sides)
    if ours.shape[1:3] != theirs.shape[1:3]:
      raise ValueError(
        f'Sizes differ at {self.tap!r}: student {ours.shape}, teacher '
        f'{theirs.shape}. CIRKD compares pixel by pixel: use networks of one '
        'output_stride, or another tap.'
      )
    ours, theirs = taps.in_float32(ours, theirs)
    terms, weights = {}, {}
    if self.batch_weight:
      pair = [_rows(average_pool(x, self.pool)) for x in (ours, theirs)]
      terms['batch'] = batch_distance(*pair, temperature=self.temperature)
      weights['batch'] = self.batch_weight
    if self.pixel_weight or self.region_weight:
      labels = label_maps.nearest(labels, *theirs.shape[1:3])
      labels = labels.reshape(labels.shape[0], -1)
      num_classes = student['logits'].shape[-1]
      valid, target = labels < num_classes, _rows(theirs)
      projection = Projection(theirs.shape[-1], name='projection')
      projected = _rows(projection(ours, train=train))
      memories = self._memories(target, labels, num_classes, train)
      for name, keys in memories.items():
        terms[name] = memory_distance(
          projected, target, keys, valid, temperature=self.memory_temperature
        )
        weights[name] = getattr(self, f'{name}_weight')
    loss = sum(weight * terms[name] for name, weight in weights.items())
    return jnp.asarray(loss, ours.dtype), terms

  def _memories(self, target, labels, num_classes, train):
    """{'pixel', 'region'}: the vectors of a step, after its own were added."""
    channels, found = target.shape[-1], {}
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
      moves = train and self.is_mutable_collection('memory')
      if moves and not self.is_initializing():
        if name == 'region':
          means, there = memory.class_means(target, labels, num_classes)
          new = means[:, :, None], there[:, :, None]
        else:
          new = memory.class_pixels(
            self.make_rng('distill'),
            target,
            labels,
            num_classes,
            self.pixels,
            positions=self.positions,
          )
        # One vector of a region always fits.
        overflow = self.overflow if name == 'pixel' else 'wrap'
        queue.value, pointers.value = memory.pushed(
          queue.value, pointers.value, *new, overflow=overflow
        )
      count = getattr(self, f'{name}_samples') // num_classes + 1
      # The same of every class.
      key = self.make_rng('distill')
      chosen = jax.random.permutation(key, size)[: min(count, size)]
      found[name] = queue.value[:, chosen].reshape(-1, channels)
    return found


def _rows(x):
  """[b, h, w, c] -> unit vectors [b, h * w, c]."""
  return unit(x.reshape(x.shape[0], -1, x.shape[-1]), (-1,))
