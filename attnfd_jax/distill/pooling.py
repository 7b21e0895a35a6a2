# SPDX-License-Identifier: Apache-2.0
"""Pools over adjacent windows; the last one may be smaller."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from attnfd_jax.types import AnyArray


def average_pool(
  x: Float[AnyArray, 'b h w c'], size: int
) -> Float[AnyArray, 'b rows columns c']:
  """Averages over windows of size x size.

  >>> average_pool(jnp.arange(3.0).reshape(1, 1, 3, 1), 2).ravel().tolist()
  [0.5, 2.0]
  """
  if size == 1:
    return x
  padding = [(0, -n % size) for n in x.shape[1:3]]
  window = (size, size)
  # Flax infers the type of `padding` from its default, a string.
  return nn.avg_pool(
    x,
    window,
    window,
    padding,  # pyright: ignore[reportArgumentType]
    count_include_pad=False,
  )


def _largest(x: Float[Array, '...'], axis: int) -> Float[Array, '...']:
  """Maximum along an axis, by halves, which overlap for odd sizes.

  The gradient of jnp.max compares x with the maximum. If XLA recomputes x for
  that with different rounding, no element is equal, and 0 / 0 gives NaN.
  """
  while (n := x.shape[axis]) > 1:
    half = (n + 1) // 2
    first = jax.lax.slice_in_dim(x, 0, half, axis=axis)
    last = jax.lax.slice_in_dim(x, n - half, n, axis=axis)
    x = jnp.where(first >= last, first, last)
  return jnp.squeeze(x, axis)


def max_pool(
  x: Float[AnyArray, 'b h w c'], height: int, width: int
) -> Float[Array, 'b rows columns c']:
  """Takes maxima over windows of height x width.

  >>> max_pool(jnp.arange(3.0).reshape(1, 1, 3, 1), 1, 2).ravel().tolist()
  [1.0, 2.0]
  """
  b, h, w, c = x.shape
  pads = -h % height, -w % width
  padding = ((0, 0), *((0, pad) for pad in pads), (0, 0))
  x = jnp.pad(x, padding, constant_values=-np.inf)
  rows, columns = (h + pads[0]) // height, (w + pads[1]) // width
  x = x.reshape(b, rows, height, columns, width, c)
  return _largest(_largest(x, 4), 2)
