# SPDX-License-Identifier: Apache-2.0
"""Implements operations in forms that XLA runs faster, on CPUs only.

All compute the same as the plain operations, up to rounding, and could be
deleted: models/convolution.py and training/step.py would then use the plain
ones on a CPU, as on other platforms. Speedups are in docs/speed.md.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from attnfd_jax.models import resizing
from attnfd_jax.models.resizing import Size
from attnfd_jax.types import AnyArray, PyTree

FeatureMap: TypeAlias = Float[AnyArray, 'b h w c']
Kernel: TypeAlias = Float[AnyArray, 'k k i f']  # i is c / groups.
Result: TypeAlias = Float[Array, 'b h_out w_out f']

# Convolutions.


def _windows(
  x: FeatureMap, size: int, strides: int, dilation: int
) -> list[jax.Array]:
  """The slice of x that each tap of a kernel reads, in the order of taps."""
  b, h, w, c = x.shape
  reach = dilation * (size - 1)
  rows, columns = ((n - reach - 1) // strides * strides + 1 for n in (h, w))
  return [
    lax.slice(
      x, (0, i, j, 0), (b, i + rows, j + columns, c), (1, strides, strides, 1)
    )
    for i in range(0, reach + 1, dilation)
    for j in range(0, reach + 1, dilation)
  ]


def pointwise(
  x: FeatureMap, kernel: Float[AnyArray, '1 1 c f'], strides: int
) -> Result:
  """A 1x1 convolution as a matrix product."""
  (window,) = _windows(x, 1, strides, 1)
  # With four dimensions, XLA would transpose a copy for the gradient.
  pixels = window.reshape(-1, window.shape[-1])
  return (pixels @ kernel[0, 0]).reshape(*window.shape[:3], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted(
  x: FeatureMap, kernel: Float[AnyArray, 'k k 1 c'], strides: int, dilation: int
) -> Float[Array, 'b h_out w_out c']:
  """A depthwise convolution without padding, as a sum of shifted maps.

  Has its own gradient: autodiff would store a slice of x for each tap, and pad
  a gradient for each.
  """
  windows = _windows(x, kernel.shape[0], strides, dilation)
  taps = kernel.reshape(-1, 1, 1, 1, x.shape[-1])
  products = (window * tap for window, tap in zip(windows, taps, strict=True))
  return functools.reduce(operator.add, products)


def _shifted_backward(
  strides: int,
  dilation: int,
  residuals: tuple[AnyArray, AnyArray],
  gradient: Result,
) -> tuple[Any, Array]:
  x, kernel = residuals
  size = kernel.shape[0]
  pads = [
    (dilation * (size - 1), n - (m - 1) * strides - 1, strides - 1)
    for n, m in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
  ]
  none, zero = (0, 0, 0), jnp.zeros((), gradient.dtype)
  spread = lax.pad(gradient, zero, (none, *pads, none))
  of_x = shifted(spread, kernel[::-1, ::-1], 1, dilation)
  # One pass sums the products of all taps, along the width first: it is short
  # enough to sum sequentially in float32, and never sharded.
  wide = np.promote_types(x.dtype, np.float32)
  products = [
    window.astype(wide) * gradient.astype(wide)
    for window in _windows(x, size, strides, dilation)
  ]
  sums = lax.reduce(
    products,
    [np.zeros((), wide)] * len(products),
    lambda a, b: [p + q for p, q in zip(a, b, strict=True)],
    (2,),
  )
  of_kernel = jnp.sum(jnp.stack(sums), (1, 2)).reshape(kernel.shape)
  return of_x, of_kernel.astype(kernel.dtype)


shifted.defvjp(lambda *args: (shifted(*args), args[:2]), _shifted_backward)


def by_taps(
  x: FeatureMap, kernel: Float[AnyArray, 'k k c f'], dilation: int
) -> Float[Array, 'b h w f']:
  """A dilated convolution with 'SAME' padding as a sum of matrix products.

  Each tap is multiplied with the part of the map that it reads, without the
  padding; with a high dilation that is a small part, or none.
  """
  (h, w), total = x.shape[1:3], 0
  for tap in np.ndindex(kernel.shape[:2]):
    down, right = (dilation * (n - kernel.shape[0] // 2) for n in tap)
    if abs(down) < h and abs(right) < w:
      rows = slice(max(down, 0), h + min(down, 0))
      columns = slice(max(right, 0), w + min(right, 0))
      pads = [(max(-n, 0), max(n, 0)) for n in (down, right)]
      product = x[:, rows, columns] @ kernel[tap]
      total += jnp.pad(product, ((0, 0), *pads, (0, 0)))
  return jnp.asarray(total)


def _interpolation(
  size_out: Size, size_in: Size, taps: int
) -> Float[Array, 'n_out n_in_taps']:
  """Matrix that resizes a line once for each tap of a kernel.

  Row y has, for tap i, the weights of pixel y + i - taps // 2 of the resized
  line, and zeros beyond its ends. Columns are [size_in, taps].
  """
  pad = (taps // 2, taps // 2)
  line = jnp.pad(resizing.matrix(size_out, size_in), (pad, (0, 0)))
  shifted = [line[i : i + size_out] for i in range(taps)]
  return jnp.stack(shifted, -1).reshape(size_out, size_in * taps)


def convolve_resized(
  x: FeatureMap,
  kernel: Float[AnyArray, 'k k c f'],
  height: Size,
  width: Size,
) -> Float[Array, 'b height width f']:
  """A convolution, with 'SAME' padding, of x resized to height x width.

  Sums over channels and resizing commute: each tap is applied to the small map,
  and its result is shifted and resized.
  """
  b, h, w, c = x.shape
  size, _, _, features = kernel.shape
  taps = kernel.transpose(2, 1, 0, 3).reshape(c, -1)
  y = pointwise(x, taps[None, None], 1)
  y = y.reshape(b, h, w * size, size * features)
  y = _interpolation(width, w, size).astype(y.dtype) @ y
  y = y.reshape(b, h, width, size, features).swapaxes(2, 3)
  y = y.reshape(b, h * size, width * features)
  y = _interpolation(height, h, size).astype(y.dtype) @ y
  return y.reshape(b, height, width, features)


# Barriers, where XLA would recompute values or use more memory.


def computed_once(
  x: Float[AnyArray, '*dims'], value: jax.typing.ArrayLike
) -> Float[Array, '*dims']:
  """Implements layers.computed_once on a CPU.

  There, XLA removes optimization barriers before it fuses operations; it keeps
  a branch whose condition it does not know. `value` is any that is not NaN.
  """
  broken = jnp.isnan(lax.stop_gradient(value))
  return lax.cond(broken, lambda x: jnp.full_like(x, jnp.nan), lambda x: x, x)


def scan(
  body: Callable[[Any, PyTree], tuple[Any, PyTree]],
  start: tuple[PyTree, PyTree],
  parts: PyTree,
  *,
  platform: str,
) -> tuple[Any, PyTree]:
  """lax.scan, unrolled on a CPU, where XLA's convolutions in loops are slow.

  The second half of the carry is a tree of floats, for which the next part
  waits: otherwise all parts would be in memory at once.
  """
  if platform != 'cpu':
    return lax.scan(body, start, parts)

  def ordered(carry, part):
    value = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(carry[1]))
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    # If a gradient is not finite, the step is lost anyway.
    return body(carry, lax.cond(jnp.isnan(value), zeros, lambda x: x, part))

  return lax.scan(ordered, start, parts, unroll=True)
