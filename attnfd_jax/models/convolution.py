# SPDX-License-Identifier: Apache-2.0
"""Convolutions of maps [b, h, w, c], in the form that a platform is fast in."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from attnfd_jax.models import cpu_forms, resizing


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dilated(x, kernel, dilation):
  """A dilated convolution of the same size for a GPU.

  Its library has a fast kernel for the result, and none for the gradient of
  the kernel: that is a matrix product for each tap. The barrier keeps sums of
  gradients out of the kernel that computes one, which would be a slow one.
  """
  return _grouped(x, kernel, 1, dilation, dilation * (kernel.shape[0] // 2))


def _dilated_backward(dilation, residuals, gradient):
  x, kernel = residuals
  padding = dilation * (kernel.shape[0] // 2)
  _, of_x = jax.vjp(lambda x: _grouped(x, kernel, 1, dilation, padding), x)
  _, of_kernel = jax.vjp(lambda w: cpu_forms.by_taps(x, w, dilation), kernel)
  return lax.optimization_barrier(of_x(gradient)[0]), *of_kernel(gradient)


_dilated.defvjp(lambda *args: (_dilated(*args), args[:2]), _dilated_backward)


def convolve(x, kernel, *, strides=1, dilation=1, padding=0):
  """Convolution of [b, h, w, c] with `kernel` [k, k, c / groups, features].

  The form is the one that is fast on the platform it is lowered for; the
  result is the same up to rounding. On a CPU, XLA runs 1x1 convolutions about
  2x, depthwise ones about 40x and those of ASPP 1.3x to 25x faster in the forms
  below (docs/speed.md).
  """
  size, _, inputs, features = kernel.shape
  same_size = strides == 1 and 2 * padding == dilation * (size - 1)
  # Of a symbolic size (export.py) nobody knows which taps see the map.
  known = all(isinstance(n, int) for n in x.shape[1:3])
  dense = inputs == x.shape[-1]

  def grouped(x, kernel):
    return _grouped(x, kernel, strides, dilation, padding)

  def shifted(x, kernel):
    pad = (padding, padding)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    return cpu_forms.shifted(x, kernel, strides, dilation)

  if dense and size == 1 and padding == 0:
    forms = {'cpu': lambda x, w: cpu_forms.pointwise(x, w, strides)}
  elif inputs == 1 and features == x.shape[-1] > 1:
    forms = {'cpu': shifted}
  elif dense and dilation > 1 and same_size and known and size % 2 == 1:
    forms = {
      'cpu': lambda x, w: cpu_forms.by_taps(x, w, dilation),
      'cuda': lambda x, w: _dilated(x, w, dilation),
    }
  else:
    return grouped(x, kernel)
  return lax.platform_dependent(x, kernel, default=grouped, **forms)


def convolve_joined(coarse, fine, kernel):
  """`convolve` of [coarse, resized to the size of fine; fine], the same size.

  On a CPU coarse is never resized: with a sixteenth of the pixels its part of
  the work is a tenth (docs/speed.md). The kernel, [k, k, c' + c, features], is
  of odd size.
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
    return y + cpu_forms.convolve_resized(
      coarse, kernel[:, :, :channels], height, width
    )

  return lax.platform_dependent(coarse, fine, kernel, cpu=apart, default=joined)
