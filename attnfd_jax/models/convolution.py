# SPDX-License-Identifier: Apache-2.0
"""Convolves feature maps, in the form that is fastest on each platform."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.models import cpu_forms, resizing
from attnfd_jax.models.cpu_forms import FeatureMap, Kernel, Result
from attnfd_jax.types import AnyArray


def _grouped(
  x: FeatureMap, kernel: Kernel, strides: int, dilation: int, padding: int
) -> Result:
  return lax.conv_general_dilated(
    jnp.asarray(x),
    jnp.asarray(kernel),
    (strides, strides),
    ((padding, padding), (padding, padding)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dilated(x: FeatureMap, kernel: Kernel, dilation: int) -> Result:
  """A dilated convolution with 'SAME' padding for GPUs.

  cuDNN is fast in the forward pass, but not in the gradient of the kernel, for
  which there is a matrix product for each tap instead. The barrier keeps XLA
  from fusing a sum of gradients into the convolution, which is then slow.
  """
  return _grouped(x, kernel, 1, dilation, dilation * (kernel.shape[0] // 2))


def _dilated_backward(
  dilation: int, residuals: tuple[AnyArray, AnyArray], gradient: Result
) -> tuple[Array, Array]:
  x, kernel = residuals
  padding = dilation * (kernel.shape[0] // 2)
  _, of_x = jax.vjp(lambda x: _grouped(x, kernel, 1, dilation, padding), x)
  _, of_kernel = jax.vjp(lambda w: cpu_forms.by_taps(x, w, dilation), kernel)
  return lax.optimization_barrier(of_x(gradient)[0]), *of_kernel(gradient)


_dilated.defvjp(lambda *args: (_dilated(*args), args[:2]), _dilated_backward)


def convolve(
  x: FeatureMap,
  kernel: Kernel,
  *,
  strides: int = 1,
  dilation: int = 1,
  padding: int = 0,
) -> Result:
  """Convolves with a square kernel; the number of groups follows from shapes.

  The form depends on the platform for which it is lowered; results are equal up
  to rounding. On a CPU, the forms below are faster by about 2x for 1x1
  convolutions, 40x for depthwise ones and 1.3x to 25x for those of ASPP
  (docs/speed.md).
  """
  size, _, inputs, features = kernel.shape
  same_size = strides == 1 and 2 * padding == dilation * (size - 1)
  # With a symbolic size (exporting/stablehlo.py) it is unknown which taps
  # overlap the map.
  is_concrete = all(isinstance(n, int) for n in x.shape[1:3])
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
  elif dense and dilation > 1 and same_size and is_concrete and size % 2 == 1:
    forms = {
      'cpu': lambda x, w: cpu_forms.by_taps(x, w, dilation),
      'cuda': lambda x, w: _dilated(x, w, dilation),
    }
  else:
    return grouped(x, kernel)
  return lax.platform_dependent(x, kernel, default=grouped, **forms)


def convolve_joined(
  coarse: Float[AnyArray, 'b h_coarse w_coarse c_coarse'],
  fine: Float[AnyArray, 'b h w c'],
  kernel: Kernel,
) -> Float[Array, 'b h w f']:
  """Convolves `coarse`, resized to the size of `fine`, and `fine` together.

  The size of the kernel is odd and the padding 'SAME'; its first input channels
  are for `coarse`. On a CPU `coarse` itself is never resized: with a sixteenth
  of the pixels, its part of the work is a tenth (docs/speed.md).
  """
  height, width = fine.shape[1:3]
  padding = kernel.shape[0] // 2

  def joined(coarse, fine, kernel):
    coarse = resizing.resize(coarse, height, width)
    x = jnp.concatenate([coarse, fine], -1)
    return convolve(x, kernel, padding=padding)

  def separate(coarse, fine, kernel):
    channels = coarse.shape[-1]
    y = convolve(fine, kernel[:, :, channels:], padding=padding)
    return y + cpu_forms.convolve_resized(
      coarse, kernel[:, :, :channels], height, width
    )

  return lax.platform_dependent(
    coarse, fine, kernel, cpu=separate, default=joined
  )
