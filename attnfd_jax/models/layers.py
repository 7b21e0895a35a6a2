# SPDX-License-Identifier: Apache-2.0
"""Layers that agree with PyTorch up to rounding, on maps [b, h, w, c]."""

import dataclasses
import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.models import convolution, cpu_forms

# Of RGB in 0 to 1 over ImageNet, as torchvision normalizes it.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Untruncated normals, as torch draws them; he_normal would be truncated.
fan_in_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def torch_uniform(fan_in):
  """PyTorch's default for Linear and Conv2d: U(-1, 1) / sqrt(fan_in)."""
  bound = fan_in**-0.5
  return functools.partial(
    jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound
  )


def at_least_float32(dtype):
  """The type in which statistics and norms of `dtype` maps are computed."""
  # NumPy's: jax's fails where users forbid implicit promotion.
  return np.promote_types(dtype, np.float32)


def per_channel(values, x):
  """values [c] as [..., 1, c], to broadcast with x of that rank."""
  return values.reshape((1,) * (x.ndim - 1) + values.shape)


def options_of(module, kind=None):
  """{field: value} of a module, {field: default} of a class; of base `kind`."""
  names = [field.name for field in dataclasses.fields(kind or module)]
  own = [x for x in names if x not in ('parent', 'name') and hasattr(module, x)]
  return {name: getattr(module, name) for name in own}


class _Convolution(nn.Module):
  features: int
  kernel_size: int = 3
  strides: int = 1
  dilation: int = 1
  padding: int | None = None  # None keeps the size at stride 1.
  depthwise: bool = False
  kernel_init: nn.initializers.Initializer = fan_in_normal
  dtype: jnp.dtype | None = None


class Conv(_Convolution):
  """Convolution with explicit symmetric padding, as in PyTorch."""

  use_bias: bool = False

  @nn.compact
  def __call__(self, x, affine=None, *, coarse=None):
    """[b, h, w, c] -> [b, h', w', features].

    `affine` is (factor, shift) of the result, [features] each, as part of the
    kernel and as bias; not together with use_bias. `coarse` is a smaller map,
    which is resized to x and whose channels come before those of x.
    """
    k, dilation, padding = self.kernel_size, self.dilation, self.padding
    inputs = 1 if self.depthwise else x.shape[-1]
    if coarse is not None:
      form = (self.strides, dilation, padding, self.depthwise, k % 2)
      if form != (1, 1, None, False, 1):
        raise ValueError(
          'coarse needs a dense kernel of odd size at stride 1, undilated and '
          'with the default padding.'
        )
      inputs += coarse.shape[-1]
    shape, bias = (k, k, inputs, self.features), None
    kernel = self.param('kernel', self.kernel_init, shape)
    if affine is not None:
      factor, bias = affine
      # Not in place: a parameter may be an array of NumPy, and the caller's.
      kernel = kernel * per_channel(factor, kernel)
    if self.use_bias:
      init = torch_uniform(k * k * inputs)
      bias = self.param('bias', init, (self.features,))
    x, coarse, kernel, bias = nn.dtypes.promote_dtype(
      x, coarse, kernel, bias, dtype=self.dtype
    )
    if coarse is not None:
      x = convolution.convolve_joined(coarse, x, kernel)
    else:
      # 'SAME' would pad (0, 1) at stride 2 on even sizes; torch pads (1, 1).
      padding = dilation * (k - 1) // 2 if padding is None else padding
      x = convolution.convolve(
        x, kernel, strides=self.strides, dilation=dilation, padding=padding
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
      moves = self.is_mutable_collection('batch_stats')
      if moves and not self.is_initializing():
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


class ConvNorm(_Convolution):
  """Convolution without bias, then batch normalisation.

  With running statistics they are one convolution, with a scaled kernel.
  """

  epsilon: float = BatchNorm.epsilon

  @nn.compact
  def __call__(self, x, *, train, coarse=None):
    """Of x, and of what Conv joins to it."""
    conv = Conv(**options_of(self, _Convolution), name='conv')
    norm = BatchNorm(epsilon=self.epsilon, dtype=self.dtype, name='bn')
    if train or self.is_initializing():
      return norm(conv(x, coarse=coarse), train=train)
    return conv(x, norm.affine(), coarse=coarse)


def finished(x, params):
  """x, computed once for all that read it; `params` must not be constants.

  XLA computes sums and activations again in each reader rather than store
  them. Along a chain of residual sums that is each block in all later ones:
  work that grows with the square of the depth, and maps that stay in memory.
  """
  return lax.platform_dependent(
    x,
    jax.tree.leaves(params)[0].ravel()[0],
    cpu=cpu_forms.hold,
    default=lambda x, _: lax.optimization_barrier(x),
  )


def max_pool(x):
  """3x3, stride 2, one pixel of padding: [b, h, w, c] -> half, rounded up.

  As maxima of shifted maps: their gradient needs no scatter, which is slow, and
  not deterministic on a GPU. Of equal values each gets a part of it.
  """
  for axis in (1, 2):
    reach = 2 * ((x.shape[axis] + 1) // 2) - 1
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    x = jnp.pad(x, padding, constant_values=-np.inf)
    shifted = [lax.slice_in_dim(x, i, i + reach, 2, axis) for i in range(3)]
    x = functools.reduce(jnp.maximum, shifted)
  return x
