# SPDX-License-Identifier: Apache-2.0
"""Queues of vectors, one for each class, filled from labeled maps."""

import jax
import jax.numpy as jnp

from attnfd_jax.distill.vectors import unit

OVERFLOWS = ('wrap', 'reset')
POSITIONS = ('class', 'image')


def random_units(key, *shape):
  """Vectors of length 1 along the last axis."""
  return unit(jax.random.normal(key, shape), (-1,))


def class_means(vectors, labels, num_classes):
  """Unit means [b, k, c] of vectors [b, n, c] by labels [b, n], and present,
  [b, k]. A label outside the classes counts nowhere.
  """
  members = jax.nn.one_hot(labels, num_classes, dtype=vectors.dtype)
  sums = jnp.einsum('bnk,bnc->bkc', members, vectors, precision='highest')
  return unit(sums, (-1,)), jnp.sum(members, 1) > 0


def class_pixels(key, vectors, labels, num_classes, count, *, positions):
  """Up to `count` vectors of each class of each image, drawn at random.

  Args:
    key: of the draw.
    vectors: [b, n, c].
    labels: [b, n]; one outside the classes counts nowhere.
    positions: 'class' draws among the pixels of the class. 'image' draws as
      many among the first pixels of the image, whatever they show, which is
      what CIRKD's code does (cirkd_memory.py, perm[:K]).

  Returns:
    [b, k, count, c], and which of them are there, [b, k, count].
  """
  b, n, _ = vectors.shape
  labels = jnp.where(labels < num_classes, labels, num_classes)
  labels = labels.astype(jnp.int32)
  members = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
  sizes = jnp.sum(members, 1)  # [b, k]
  rank = jnp.arange(count, dtype=jnp.int32)[None, None]
  there = rank < sizes[..., None]
  index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (b, n))
  if positions == 'class':
    # Classes one after the other, each in random order.
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
  found = jnp.take_along_axis(vectors, chosen[..., None], axis=1)
  return found.reshape(b, num_classes, count, -1), there


def pushed(queue, pointers, vectors, there, *, overflow):
  """Queues and pointers after the vectors of each image, one after the other.

  Args:
    queue: [k, size, c].
    pointers: [k], the next row to be replaced.
    vectors: [b, k, m, c], m at most size.
    there: [b, k, m], first those that are.
    overflow: 'wrap' goes on at the first row. 'reset' is CIRKD's code: vectors
      that would reach the end replace the last rows, and the next is the first.
  """
  num_classes, size, _ = queue.shape
  classes = jnp.arange(num_classes)[:, None]

  def push(carry, image):
    queue, pointers = carry
    vectors, there = image
    count = jnp.sum(there, -1, dtype=pointers.dtype)
    start, end = pointers, pointers + count
    if overflow == 'reset':
      full = end >= size
      start = jnp.where(full, size - count, start)
      end = jnp.where(full, 0, end)
    row = (start[:, None] + jnp.arange(there.shape[-1])[None]) % size
    # Rows past the end are dropped.
    row = jnp.where(there, row, size)
    queue = queue.at[classes, row].set(vectors, mode='drop')
    return (queue, end % size), None

  return jax.lax.scan(push, (queue, pointers), (vectors, there))[0]
