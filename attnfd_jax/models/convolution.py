# SPDX-License-Identifier: Apache-2.0
"""Convolutions of maps [b, h, w, c], in the form that a platform is fast in."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.models import resizing


def _grouped(x, kernel, strides, dilation, padding):
  return lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    ((padding, padding), (padding, padding)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def _strided(x, top, left, height, width, strides):
  """Every `strides`-th pixel of x from (top, left), height x width of them."""
  b, _, _, c = x.shape
  bottom = top + (height - 1) * strides + 1
  right = left + (width - 1) * strides + 1
  return lax.slice(
    x, (0, top, left, 0), (b, bottom, right, c), (1, strides, strides, 1)
  )


def _padded(x, padding):
  pad = (padding, padding)
  return jnp.pad(x, ((0, 0), pad, pad, (0, 0)))


def _pointwise(x, kernel, strides):
  """A 1x1 convolution as a matrix product."""
  b, h, w, c = x.shape
  h, w = ((n - 1) // strides + 1 for n in (h, w))
  # Pixels as a list: of maps, XLA would transpose a copy for the gradient.
  pixels = _strided(x, 0, 0, h, w, strides).reshape(-1, c)
  return (pixels @ kernel[0, 0]).reshape(b, h, w, kernel.shape[-1])


def _windows(x, size, dilation, height, width, strides):
  """The part of x that each tap of a kernel sees, in the order of its taps."""
  return [
    _strided(x, i * dilation, j * dilation, height, width, strides)
    for i in range(size)
    for j in range(size)
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x, kernel, strides, dilation):
  """A depthwise convolution without padding, as a sum of shifted maps.

  Its own rule for gradients: that of the operations would keep what each tap
  sees as a map of its own, and pad a gradient for each.
  """
  size = kernel.shape[0]
  reach = dilation * (size - 1) + 1
  height, width = ((n - reach) // strides + 1 for n in x.shape[1:3])
  windows = _windows(x, size, dilation, height, width, strides)
  taps = kernel.reshape(-1, 1, 1, 1, x.shape[-1])
  return sum(window * tap for window, tap in zip(windows, taps, strict=True))


def _shifted_forward(x, kernel, strides, dilation):
  return _shifted(x, kernel, strides, dilation), (x, kernel)


def _shifted_backward(strides, dilation, residuals, gradient):
  x, kernel = residuals
  size = kernel.shape[0]
  before = dilation * (size - 1)
  _, height, width, _ = gradient.shape
  pads = [
    (before, n - (m - 1) * strides - 1, strides - 1)
    for n, m in zip(x.shape[1:3], (height, width), strict=True)
  ]
  none = (0, 0, 0)
  zero = jnp.zeros((), gradient.dtype)
  spread = lax.pad(gradient, zero, (none, *pads, none))
  of_x = _shifted(spread, kernel[::-1, ::-1], 1, dilation)
  # One pass for the sums of all taps, along rows first: a row is short enough
  # for float32 to add up one by one, and never sharded.
  wide = np.promote_types(x.dtype, np.float32)
  products = [
    window.astype(wide) * gradient.astype(wide)
    for window in _windows(x, size, dilation, height, width, strides)
  ]
  sums = lax.reduce(
    products,
    [np.zeros((), wide)] * len(products),
    lambda a, b: [p + q for p, q in zip(a, b, strict=True)],
    (2,),
  )
  of_kernel = jnp.sum(jnp.stack(sums), (1, 2)).reshape(kernel.shape)
  return of_x, of_kernel.astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _by_taps(x, kernel, dilation):
  """A dilated convolution of the same size as a sum of matrix products.

  Each tap of the kernel sees the part of the map that it moves over the map;
  those of high dilation see little of it, or none, and the rest is no work.
  """
  h, w = x.shape[1:3]
  size = kernel.shape[0]
  total = 0
  for i in range(size):
    for j in range(size):
      down, right = (dilation * (n - size // 2) for n in (i, j))
      if abs(down) >= h or abs(right) >= w:
        continue
      window = x[
        :,
        max(down, 0) : h + min(down, 0),
        max(right, 0) : w + min(right, 0),
      ]
      rows, columns = ((max(-n, 0), max(n, 0)) for n in (down, right))
      total += jnp.pad(window @ kernel[i, j], ((0, 0), rows, columns, (0, 0)))
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dilated(x, kernel, dilation):
  """A dilated convolution of the same size for a GPU.

  Its library has a fast kernel for the result, and none for the gradient of
  the kernel: that is a matrix product for each tap. The barrier keeps sums of
  gradients out of the kernel that computes one, which would be a slow one.
  """
  return _grouped(x, kernel, 1, dilation, dilation * (kernel.shape[0] // 2))


def _dilated_forward(x, kernel, dilation):
  return _dilated(x, kernel, dilation), (x, kernel)


def _dilated_backward(dilation, residuals, gradient):
  x, kernel = residuals
  padding = dilation * (kernel.shape[0] // 2)
  _, of_x = jax.vjp(lambda x: _grouped(x, kernel, 1, dilation, padding), x)
  _, of_kernel = jax.vjp(lambda kernel: _by_taps(x, kernel, dilation), kernel)
  return lax.optimization_barrier(of_x(gradient)[0]), *of_kernel(gradient)


_dilated.defvjp(_dilated_forward, _dilated_backward)


def convolve(x, kernel, *, strides=1, dilation=1, padding=0):
  """Convolution of [b, h, w, c] with `kernel` [k, k, c / groups, features].

  The form is the one that is fast on the platform it is lowered for; the
  result is the same up to rounding. On a CPU, XLA runs 1x1 convolutions about
  2x, depthwise ones about 40x and those of ASPP 1.3x to 25x faster in the forms
  below (docs/speed.md).
  """
  size, _, inputs, features = kernel.shape

  def grouped(x, kernel):
    return _grouped(x, kernel, strides, dilation, padding)

  if size == 1 and padding == 0 and inputs == x.shape[-1]:
    return lax.platform_dependent(
      x, kernel, cpu=lambda x, w: _pointwise(x, w, strides), default=grouped
    )
  if inputs == 1 and features == x.shape[-1] > 1:
    return lax.platform_dependent(
      x,
      kernel,
      cpu=lambda x, w: _shifted(_padded(x, padding), w, strides, dilation),
      default=grouped,
    )
  same_size = strides == 1 and 2 * padding == dilation * (size - 1)
  # Of a symbolic size (export.py) nobody knows which taps see the map.
  known = all(isinstance(n, int) for n in x.shape[1:3])
  dense = inputs == x.shape[-1] and size % 2 == 1
  if dilation > 1 and same_size and known and dense:
    return lax.platform_dependent(
      x,
      kernel,
      cpu=lambda x, w: _by_taps(x, w, dilation),
      cuda=lambda x, w: _dilated(x, w, dilation),
      default=grouped,
    )
  return grouped(x, kernel)


def _interpolation(size_out, size_in, taps):
  """What the taps of a kernel see of a resized line: [out, in * taps].

  Row y has, for tap i, what pixel y + i - taps // 2 of the line is made of, and
  zeros beyond its ends.
  """
  line = jnp.eye(size_in)[None, :, None]
  line = resizing.resize(line, size_out, 1)[0, :, 0]
  line = jnp.pad(line, ((taps // 2, taps // 2), (0, 0)))
  shifted = [line[i : i + size_out] for i in range(taps)]
  return jnp.stack(shifted, -1).reshape(size_out, size_in * taps)


def _of_resized(x, kernel, height, width):
  """A convolution of x resized to height x width, which it keeps.

  Products over channels and resizing commute: the taps are applied to the
  small map, and their results resized, each moved by its tap.
  """
  b, h, w, c = x.shape
  size, _, _, features = kernel.shape
  taps = kernel.transpose(2, 1, 0, 3).reshape(c, -1)
  y = _pointwise(x, taps[None, None], 1)
  y = y.reshape(b, h, w * size, size * features)
  y = _interpolation(width, w, size).astype(y.dtype) @ y
  y = y.reshape(b, h, width, size, features).swapaxes(2, 3)
  y = y.reshape(b, h * size, width * features)
  y = _interpolation(height, h, size).astype(y.dtype) @ y
  return y.reshape(b, height, width, features)


def convolve_joined(coarse, fine, kernel):
  """`convolve` of [coarse, resized to the size of fine; fine], the same size.

  On a CPU coarse is never resized: with a sixteenth of the pixels its part of
  the work is a tenth (docs/speed.md).

  Args:
    coarse: [b, h', w', c'].
    fine: [b, h, w, c].
    kernel: [k, k, c' + c, features], k odd.

  Returns:
    [b, h, w, features].
  """
  height, width = fine.shape[1:3]
  padding = kernel.shape[0] // 2

  def joined(coarse, fine, kernel):
    coarse = resizing.resize(coarse, height, width)
    x = jnp.concatenate([coarse, fine], -1)
    return convolve(x, kernel, padding=padding)

  def apart(coarse, fine, kernel):
    channels = coarse.shape[-1]
    y = convolve(fine, kernel[:, :, channels:], padding=padding)
    return y + _of_resized(coarse, kernel[:, :, :channels], height, width)

  return lax.platform_dependent(coarse, fine, kernel, cpu=apart, default=joined)
