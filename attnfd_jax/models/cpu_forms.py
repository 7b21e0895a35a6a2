# SPDX-License-Identifier: Apache-2.0
"""Forms of operations that XLA is fast in on a CPU, and on nothing else.

Everything in here computes what the plain operation computes, up to rounding,
and could be deleted: models/convolution.py and training/step.py would then run
the plain form on a CPU as they do elsewhere. What each form brings was measured
in docs/speed.md.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.models import resizing

# Convolutions.


def _windows(x, size, strides, dilation):
  """What each tap of a kernel sees of x, in the order of the taps."""
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


def pointwise(x, kernel, strides):
  """A 1x1 convolution as a matrix product."""
  (seen,) = _windows(x, 1, strides, 1)
  # Pixels as a list: of maps, XLA would transpose a copy for the gradient.
  pixels = seen.reshape(-1, seen.shape[-1])
  return (pixels @ kernel[0, 0]).reshape(*seen.shape[:3], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted(x, kernel, strides, dilation):
  """A depthwise convolution without padding, as a sum of shifted maps.

  Its own rule for gradients: that of the operations would keep what each tap
  sees as a map of its own, and pad a gradient for each.
  """
  windows = _windows(x, kernel.shape[0], strides, dilation)
  taps = kernel.reshape(-1, 1, 1, 1, x.shape[-1])
  return sum(window * tap for window, tap in zip(windows, taps, strict=True))


def _shifted_backward(strides, dilation, residuals, gradient):
  x, kernel = residuals
  size = kernel.shape[0]
  pads = [
    (dilation * (size - 1), n - (m - 1) * strides - 1, strides - 1)
    for n, m in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
  ]
  none, zero = (0, 0, 0), jnp.zeros((), gradient.dtype)
  spread = lax.pad(gradient, zero, (none, *pads, none))
  of_x = shifted(spread, kernel[::-1, ::-1], 1, dilation)
  # One pass for the sums of all taps, along rows first: a row is short enough
  # for float32 to add up one by one, and never sharded.
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


def by_taps(x, kernel, dilation):
  """A dilated convolution of the same size as a sum of matrix products.

  Each tap of the kernel sees the part of the map that it moves over the map;
  those of high dilation see little of it, or none, and the rest is no work.
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
  return total


def _interpolation(size_out, size_in, taps):
  """What the taps of a kernel see of a resized line: [out, in * taps].

  Row y has, for tap i, what pixel y + i - taps // 2 of the line is made of, and
  zeros beyond its ends.
  """
  pad = (taps // 2, taps // 2)
  line = jnp.pad(resizing.matrix(size_out, size_in), (pad, (0, 0)))
  shifted = [line[i : i + size_out] for i in range(taps)]
  return jnp.stack(shifted, -1).reshape(size_out, size_in * taps)


def convolve_resized(x, kernel, height, width):
  """A convolution of x resized to height x width, which it keeps.

  Products over channels and resizing commute: the taps are applied to the
  small map, and their results resized, each moved by its tap.
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


# Order, where XLA would compute more often or more at a time.


def hold(x, known):
  """layers.finished: on a CPU, barriers are gone before operations are merged;
  a branch that XLA cannot foresee stays.
  """
  broken = jnp.isnan(lax.stop_gradient(known))
  return lax.cond(broken, lambda x: jnp.full_like(x, jnp.nan), lambda x: x, x)


def scan(body, start, parts, *, platform):
  """lax.scan with a carry (anything, float tree).

  In a loop XLA's convolutions for a CPU are plain ones on one core: there the
  loop is unrolled, and a part waits for the float tree of the one before, else
  memory would hold all parts at once.
  """
  if platform != 'cpu':
    return lax.scan(body, start, parts)

  def ordered(carry, part):
    known = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(carry[1]))
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    # If a gradient is not finite, the step is lost anyhow.
    return body(carry, lax.cond(jnp.isnan(known), zeros, lambda x: x, part))

  return lax.scan(ordered, start, parts, unroll=True)
