# SPDX-License-Identifier: Apache-2.0
"""Windows side by side over a map; the last may be smaller."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def average_pool(x, size):
  """Means of windows of size x size, [b, h, w, c]."""
  if size == 1:
    return x
  padding = [(0, -n % size) for n in x.shape[1:3]]
  window = (size, size)
  return nn.avg_pool(x, window, window, padding, count_include_pad=False)


def _largest(x, axis):
  """Maximum along an axis, by halves, which overlap where it is odd.

  The gradient of jnp.max compares x with the maximum. Where XLA computes x
  again for that, rounded in another way, none is equal, and 0 / 0 is NaN.
  """
  while (n := x.shape[axis]) > 1:
    half = (n + 1) // 2
    first = jax.lax.slice_in_dim(x, 0, half, axis=axis)
    last = jax.lax.slice_in_dim(x, n - half, n, axis=axis)
    x = jnp.where(first >= last, first, last)
  return jnp.squeeze(x, axis)


def max_pool(x, height, width):
  """Maxima of windows of height x width, [b, h, w, c]."""
  b, h, w, c = x.shape
  pads = -h % height, -w % width
  padding = ((0, 0), *((0, pad) for pad in pads), (0, 0))
  x = jnp.pad(x, padding, constant_values=-np.inf)
  rows, columns = (h + pads[0]) // height, (w + pads[1]) // width
  x = x.reshape(b, rows, height, columns, width, c)
  return _largest(_largest(x, 4), 2)
