# SPDX-License-Identifier: Apache-2.0
"""Defines layers that compute the same as PyTorch's, up to rounding."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
from flax.linen import dtypes
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
import numpy as np

from attnfd_jax.models import convolution, cpu_forms
from attnfd_jax.types import AnyArray, DType, PyTree

# Of ImageNet in RGB from 0 to 1, as in torchvision.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Not truncated, as in PyTorch; he_normal is truncated.
fan_in_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
  """PyTorch's initializer of Linear and Conv2d: U(-1, 1) / sqrt(fan_in)."""
  bound = fan_in**-0.5
  return functools.partial(
    jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound
  )


def at_least_float32(dtype: DType) -> np.dtype:
  """The dtype for statistics and norms of feature maps of a dtype."""
  # jnp.promote_types raises where users forbid implicit promotion.
  return np.promote_types(dtype, np.float32)


def per_channel(
  values: Shaped[AnyArray, ' c'], x: Shaped[AnyArray, '...']
) -> Shaped[AnyArray, '*ones c']:
  """Reshapes one value per channel to the rank of x, to broadcast with it."""
  return values.reshape((1,) * (x.ndim - 1) + values.shape)


def options_of(module: Any, kind: type | None = None) -> dict[str, Any]:
  """Fields of a module with their values, or of a class with their defaults.

  With `kind`, a base class, only its fields.
  """
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
  dtype: DType | None = None


class Conv(_Convolution):
  """Convolution with explicit symmetric padding, as in PyTorch."""

  use_bias: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[AnyArray, 'b h w c'],
    affine: tuple[Float[AnyArray, ' f'], Float[AnyArray, ' f']] | None = None,
    *,
    coarse: Float[AnyArray, 'b h_coarse w_coarse c_coarse'] | None = None,
  ) -> Float[Array, 'b h_out w_out f']:
    """Convolves a feature map.

    Args:
      x: the feature map.
      affine: factor and shift that are applied to the result, as part of the
        kernel and as the bias; not together with use_bias.
      coarse: a smaller map that is resized to x; its channels come before those
        of x.

    Raises:
      ValueError: if `coarse` is given and the options do not allow it.
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
      # Not in place: a parameter may be the caller's NumPy array.
      kernel = kernel * per_channel(factor, kernel)
    if self.use_bias:
      init = torch_uniform(k * k * inputs)
      bias = self.param('bias', init, (self.features,))
    x, coarse, kernel, bias = dtypes.promote_dtype(
      x, coarse, kernel, bias, dtype=self.dtype
    )
    if coarse is not None:
      x = convolution.convolve_joined(coarse, x, kernel)
    else:
      # PyTorch pads (1, 1) at stride 2 on even sizes; 'SAME' pads (0, 1).
      padding = dilation * (k - 1) // 2 if padding is None else padding
      x = convolution.convolve(
        x, kernel, strides=self.strides, dilation=dilation, padding=padding
      )
    return x if bias is None else x + per_channel(bias, x)


class BatchNorm(nn.Module):
  """Batch normalization whose running variance is unbiased, as in PyTorch.

  Batch statistics are over all devices when the batch is sharded under `jit`.
  They update the running ones only if `batch_stats` is mutable, so that a
  network can use batch statistics and discard the update.
  """

  momentum: float = 0.9  # The decay, 1 minus PyTorch's momentum.
  epsilon: float = 1e-5
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, '*batch c'], *, train: bool
  ) -> Float[Array, '*batch c']:
    """Normalizes by batch statistics if `train`, else by running statistics."""
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
      # In two passes: E[x^2] - E[x]^2 cancels for means far from zero.
      mean = jnp.mean(x, axes)
      var = jnp.mean(jnp.square(x - per_channel(mean, x)), axes)
      is_mutable = self.is_mutable_collection('batch_stats')
      if is_mutable and not self.is_initializing():
        n = x.size // x.shape[-1]
        unbiased = var * (n / max(n - 1, 1))
        keep, new = self.momentum, 1 - self.momentum
        running_mean.value = keep * running_mean.value + new * mean
        running_var.value = keep * running_var.value + new * unbiased
    scale = lax.rsqrt(var + self.epsilon) * scale
    x = (x - per_channel(mean, x)) * per_channel(scale, x)
    return jnp.asarray(x + per_channel(bias, x), dtype)

  def affine(self) -> tuple[Float[Array, ' c'], Float[Array, ' c']]:
    """Factor and shift that do what normalizing by running statistics does."""
    scale, bias = (self.get_variable('params', x) for x in ('scale', 'bias'))
    mean, var = (self.get_variable('batch_stats', x) for x in ('mean', 'var'))
    factor = lax.rsqrt(var + self.epsilon) * scale
    return factor, bias - mean * factor


class ConvNorm(_Convolution):
  """Convolution without bias, then batch normalization.

  With running statistics both are one convolution, with a scaled kernel.
  """

  epsilon: float = BatchNorm.epsilon

  @nn.compact
  def __call__(
    self,
    x: Float[AnyArray, 'b h w c'],
    *,
    train: bool,
    coarse: Float[AnyArray, 'b h_coarse w_coarse c_coarse'] | None = None,
  ) -> Float[Array, 'b h_out w_out f']:
    """See Conv for `coarse` and BatchNorm for `train`."""
    conv = Conv(**options_of(self, _Convolution), name='conv')
    norm = BatchNorm(epsilon=self.epsilon, dtype=self.dtype, name='bn')
    if train or self.is_initializing():
      return norm(conv(x, coarse=coarse), train=train)
    return conv(x, norm.affine(), coarse=coarse)


def computed_once(
  x: Float[AnyArray, '*dims'], params: PyTree
) -> Float[Array, '*dims']:
  """Returns x, which XLA then computes only once; a barrier against fusion.

  XLA would recompute sums and activations in each operation that reads them.
  With a chain of residual sums that is each block in all later ones: the work
  grows with the square of the depth, and all maps stay in memory.

  Args:
    x: the result of a block.
    params: any parameters, which must not be constants of the program.
  """
  return lax.platform_dependent(
    x,
    jax.tree.leaves(params)[0].ravel()[0],
    cpu=cpu_forms.computed_once,
    default=lambda x, _: lax.optimization_barrier(x),
  )


def max_pool(
  x: Float[AnyArray, 'b h w c'],
) -> Float[Array, 'b h_half w_half c']:
  """Max pooling of 3x3 with stride 2 and padding 1; sizes are rounded up.

  It is a maximum of shifted maps, whose gradient needs no scatter: that is
  slow, and not deterministic on GPUs. Equal values share the gradient.
  """
  for axis in (1, 2):
    reach = 2 * ((x.shape[axis] + 1) // 2) - 1
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    x = jnp.pad(x, padding, constant_values=-np.inf)
    shifted = [lax.slice_in_dim(x, i, i + reach, 2, axis) for i in range(3)]
    x = functools.reduce(jnp.maximum, shifted)
  return x
