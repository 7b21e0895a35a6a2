# SPDX-License-Identifier: Apache-2.0
"""Stores vectors of labeled feature maps in one queue per class."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from attnfd_jax.distill.vectors import unit
from attnfd_jax.types import AnyArray

OVERFLOWS = ('wrap', 'reset')
POSITIONS = ('class', 'image')


def random_units(key: jax.Array, *shape: int) -> Float[Array, '...']:
  """Random vectors of length 1 along the last axis."""
  return unit(jax.random.normal(key, shape), (-1,))


def class_means(
  vectors: Float[AnyArray, 'b n c'],
  labels: Integer[AnyArray, 'b n'],
  num_classes: int,
) -> tuple[Float[Array, 'b k c'], Bool[Array, 'b k']]:
  """Mean vector of each class and image, scaled to length 1.

  Args:
    vectors: a vector per pixel.
    labels: class indices; other values are ignored.
    num_classes: k.

  Returns:
    The means, and which classes are present.
  """
  members = jax.nn.one_hot(labels, num_classes, dtype=vectors.dtype)
  sums = jnp.einsum('bnk,bnc->bkc', members, vectors, precision='highest')
  return unit(sums, (-1,)), jnp.sum(members, 1) > 0


def class_pixels(
  key: jax.Array,
  vectors: Float[AnyArray, 'b n c'],
  labels: Integer[AnyArray, 'b n'],
  num_classes: int,
  count: int,
  *,
  positions: str,
) -> tuple[Float[Array, 'b k {count} c'], Bool[Array, 'b k {count}']]:
  """Draws up to `count` vectors of each class and image at random.

  Args:
    key: for the draw.
    vectors: a vector per pixel.
    labels: class indices; other values are ignored.
    num_classes: k.
    count: maximum number of vectors.
    positions: 'class' draws among the pixels of the class. 'image' draws the
      same number among the first pixels of the image, whatever their class, as
      CIRKD's code does (cirkd_memory.py, perm[:K]).

  Returns:
    The vectors, and which of them are valid.
  """
  b, n, _ = vectors.shape
  labels = jnp.where(labels < num_classes, labels, num_classes)
  labels = labels.astype(jnp.int32)
  members = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
  sizes = jnp.sum(members, 1)  # [b, k]
  rank = jnp.arange(count, dtype=jnp.int32)[None, None]
  valid = rank < sizes[..., None]
  index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (b, n))
  if positions == 'class':
    # Sorted by class, in random order within each.
    draw = jax.random.bits(key, (b, n))
    *_, order = jax.lax.sort((labels, draw, index), dimension=1, num_keys=2)
    starts = jnp.cumsum(sizes, 1) - sizes
    place = jnp.minimum(starts[..., None] + rank, n - 1)
    chosen = jnp.take_along_axis(order, place.reshape(b, -1), axis=1)
  else:
    draw = jax.random.uniform(key, (b, num_classes, n))
    draw = jnp.where(index[:, None] < sizes[..., None], draw, -1)
    chosen = jax.lax.top_k(draw, min(count, n))[1]
    missing = count - chosen.shape[-1]
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, missing))).reshape(b, -1)
  pixels = jnp.take_along_axis(vectors, chosen[..., None], axis=1)
  return pixels.reshape(b, num_classes, count, -1), valid


def pushed(
  queue: Float[AnyArray, 'k size c'],
  pointers: Integer[AnyArray, ' k'],
  vectors: Float[AnyArray, 'b k m c'],
  valid: Bool[AnyArray, 'b k m'],
  *,
  overflow: str,
) -> tuple[Float[Array, 'k size c'], Integer[Array, ' k']]:
  """Pushes vectors onto the queues, image by image.

  Args:
    queue: the queue of each class.
    pointers: the next row of each queue to be replaced.
    vectors: new vectors; m is at most the size of a queue.
    valid: which vectors to push; valid ones come first.
    overflow: 'wrap' continues at the first row. With 'reset', as in CIRKD's
      code, vectors that would reach the end replace the last rows, and the
      pointer returns to the first.

  Returns:
    The new queues and pointers.
  """
  num_classes, size, _ = queue.shape
  classes = jnp.arange(num_classes)[:, None]

  def push(carry, image):
    queue, pointers = carry
    vectors, valid = image
    count = jnp.sum(valid, -1, dtype=pointers.dtype)
    start, end = pointers, pointers + count
    if overflow == 'reset':
      full = end >= size
      start = jnp.where(full, size - count, start)
      end = jnp.where(full, 0, end)
    row = (start[:, None] + jnp.arange(valid.shape[-1])[None]) % size
    # Rows past the end are dropped.
    row = jnp.where(valid, row, size)
    queue = queue.at[classes, row].set(vectors, mode='drop')
    return (queue, end % size), None

  carry, _ = jax.lax.scan(push, (queue, pointers), (vectors, valid))
  return carry  # pyright: ignore[reportReturnType]  # Arrays, whatever comes in.
