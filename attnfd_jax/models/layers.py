# SPDX-License-Identifier: Apache-2.0
"""Layers that agree with PyTorch up to rounding, on maps [b, h, w, c]."""

import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Untruncated normals, as torch draws them; he_normal would be truncated.
fan_in_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def torch_uniform(fan_in):
  """PyTorch's default for Linear and Conv2d: U(-1, 1) / sqrt(fan_in)."""

  def init(rng, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  return init


def at_least_float32(dtype):
  """The type in which statistics and norms of `dtype` maps are computed."""
  # NumPy's: jax's fails where users forbid implicit promotion.
  return np.promote_types(dtype, np.float32)


def per_channel(values, x):
  """values [c] as [..., 1, c], to broadcast with x of that rank."""
  return values.reshape((1,) * (x.ndim - 1) + values.shape)


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


def _pointwise(x, kernel, strides):
  """A 1x1 convolution as a matrix product."""
  h, w = ((n - 1) // strides + 1 for n in x.shape[1:3])
  return _strided(x, 0, 0, h, w, strides) @ kernel[0, 0]


def _shifted(x, kernel, strides, dilation, padding):
  """A depthwise convolution as a sum of shifted maps."""
  size = kernel.shape[0]
  pad = (padding, padding)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  reach = dilation * (size - 1) + 1
  height = (x.shape[1] - reach) // strides + 1
  width = (x.shape[2] - reach) // strides + 1
  total = 0
  for i in range(size):
    for j in range(size):
      window = _strided(x, i * dilation, j * dilation, height, width, strides)
      total += window * per_channel(kernel[i, j, 0], window)
  return total


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
      cpu=lambda x, w: _shifted(x, w, strides, dilation, padding),
      default=grouped,
    )
  same_size = strides == 1 and padding == dilation * (size // 2)
  # Of a symbolic size (export.py) nobody knows which taps see the map.
  known = all(isinstance(n, int) for n in x.shape[1:3])
  if dilation > 1 and same_size and known and inputs == x.shape[-1]:
    return lax.platform_dependent(
      x,
      kernel,
      cpu=lambda x, w: _by_taps(x, w, dilation),
      cuda=lambda x, w: _dilated(x, w, dilation),
      default=grouped,
    )
  return grouped(x, kernel)


class Conv(nn.Module):
  """Convolution with explicit symmetric padding, as in PyTorch."""

  features: int
  kernel_size: int = 3
  strides: int = 1
  dilation: int = 1
  padding: int | None = None  # None keeps the size at stride 1.
  depthwise: bool = False
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = fan_in_normal
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, affine=None):
    """[b, h, w, c] -> [b, h', w', features].

    Args:
      x: the map.
      affine: (factor, shift) of the result, [features] each, as part of the
        kernel and as bias; not together with use_bias.
    """
    k = self.kernel_size
    inputs = 1 if self.depthwise else x.shape[-1]
    kernel = self.param(
      'kernel', self.kernel_init, (k, k, inputs, self.features)
    )
    bias = None
    if affine is not None:
      factor, bias = affine
      kernel *= per_channel(factor, kernel)
    if self.use_bias:
      init = torch_uniform(k * k * inputs)
      bias = self.param('bias', init, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    padding = self.padding
    if padding is None:
      # 'SAME' would pad (0, 1) at stride 2 on even sizes; torch pads (1, 1).
      padding = self.dilation * (k - 1) // 2
    x = convolve(
      x, kernel, strides=self.strides, dilation=self.dilation, padding=padding
    )
    return x if bias is None else x + per_channel(bias, x)


class BatchNorm(nn.Module):
  """Batch normalisation with PyTorch's running variance, n / (n - 1) of Flax's.

  With `train` the statistics are those of the batch, over all devices when the
  batch is sharded under `jit`; the running ones move only if `batch_stats` is
  mutable, so that a network can use batch statistics and discard the update.
  """

  momentum: float = 0.9  # The decay: torch momentum 0.1.
  epsilon: float = 1e-5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape)
    dtype = self.dtype or x.dtype
    x = x.astype(at_least_float32(x.dtype))
    mean, var = running_mean.value, running_var.value
    if train:
      axes = tuple(range(x.ndim - 1))
      # Two passes: E[x^2] - E[x]^2 loses everything for maps far from zero.
      mean = jnp.mean(x, axes)
      var = jnp.mean(jnp.square(x - per_channel(mean, x)), axes)
      if (
        self.is_mutable_collection('batch_stats') and not self.is_initializing()
      ):
        n = x.size // x.shape[-1]
        unbiased = var * (n / max(n - 1, 1))
        keep, new = self.momentum, 1 - self.momentum
        running_mean.value = keep * running_mean.value + new * mean
        running_var.value = keep * running_var.value + new * unbiased
    scale = lax.rsqrt(var + self.epsilon) * scale
    x = (x - per_channel(mean, x)) * per_channel(scale, x)
    return (x + per_channel(bias, x)).astype(dtype)

  def affine(self):
    """(factor, shift) that it is with its running statistics, [c] each."""
    scale, bias = (self.get_variable('params', x) for x in ('scale', 'bias'))
    mean, var = (self.get_variable('batch_stats', x) for x in ('mean', 'var'))
    factor = lax.rsqrt(var + self.epsilon) * scale
    return factor, bias - mean * factor


class ConvNorm(nn.Module):
  """Convolution without bias, then batch normalisation.

  With running statistics they are one convolution, with a scaled kernel.
  """

  features: int
  kernel_size: int = 3
  strides: int = 1
  dilation: int = 1
  padding: int | None = None
  depthwise: bool = False
  kernel_init: nn.initializers.Initializer = fan_in_normal
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    conv = Conv(
      self.features,
      self.kernel_size,
      self.strides,
      self.dilation,
      self.padding,
      self.depthwise,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name='conv',
    )
    norm = BatchNorm(dtype=self.dtype, name='bn')
    if train or self.is_initializing():
      return norm(conv(x), train=train)
    return conv(x, norm.affine())


def finished(x, known):
  """x, computed once for all that read it.

  XLA computes sums and activations again in each reader rather than store
  them. Along a chain of residual sums that is each block in all later ones:
  work that grows with the square of the depth, and maps that stay in memory.

  Args:
    x: of any shape.
    known: a scalar that is no constant of the program, such as a weight.
  """

  def hold(x, known):
    # On a CPU, barriers are gone before operations are merged; a branch stays.
    broken = jnp.isnan(lax.stop_gradient(known))
    return lax.cond(broken, lambda x: jnp.full_like(x, jnp.nan), lambda x: x, x)

  return lax.platform_dependent(
    x, known, cpu=hold, default=lambda x, _: lax.optimization_barrier(x)
  )


def any_weight(module):
  """A scalar of the parameters that `module` has by now, for `finished`."""
  return jax.tree.leaves(module.variables['params'])[0].ravel()[0]


def max_pool(x):
  """3x3, stride 2, one pixel of padding: [b, h, w, c] -> half, rounded up.

  As maxima of shifted maps: their gradient needs no scatter, which is slow, and
  not deterministic on a GPU. Of equal values each gets a part of it.
  """

  def along(axis, x):
    half = (x.shape[axis] + 1) // 2
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    x = jnp.pad(x, padding, constant_values=-np.inf)
    first, second, third = (
      lax.slice_in_dim(x, i, i + 2 * half - 1, 2, axis) for i in range(3)
    )
    return jnp.maximum(jnp.maximum(first, second), third)

  return along(2, along(1, x))


def score_precision(dtype):
  """Of the products that resize scores of a network that computes in `dtype`.

  Those of bfloat16 are not made better by products of float32.
  """
  half = dtype is not None and jnp.finfo(dtype).bits < 32
  return lax.Precision.DEFAULT if half else lax.Precision.HIGHEST


def resize(x, height, width, *, precision=lax.Precision.HIGHEST):
  """Bilinear with align_corners: corner pixels of x stay corner pixels.

  Args:
    x: [b, h, w, c].
    height: of the result.
    width: of the result.
    precision: of its products, which a TPU or GPU may round.

  Returns:
    [b, height, width, c], of the type of x.
  """
  b, h, w, c = x.shape
  if (h, w) == (height, width):
    return x
  # A single output pixel is the corner; a single input pixel is a constant.
  x = x[:, : h if height > 1 else 1, : w if width > 1 else 1]
  h, w = x.shape[1:3]

  def step(size_out, size_in):
    return (size_out - 1) / (size_in - 1) if size_in > 1 else size_out

  scale = jnp.array(
    [step(height, h), step(width, w)], at_least_float32(x.dtype)
  )
  # scale_and_translate counts from pixel edges, align_corners from centres.
  shift = jnp.where(jnp.array([h, w]) > 1, 0.5 * (1 - scale), 0)
  return jax.image.scale_and_translate(
    x,
    (b, height, width, c),
    (1, 2),
    scale,
    shift,
    'linear',
    antialias=False,
    precision=precision,
  )
