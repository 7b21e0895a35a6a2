# SPDX-License-Identifier: Apache-2.0
"""Defines CBAM: a channel gate, then a spatial gate (arXiv 1807.06521)."""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.models import layers
from attnfd_jax.types import AnyArray, DType


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: Float[AnyArray, '...'], axis: int) -> Float[Array, '...']:
  """Maximum along one axis, which is kept; only one element has a gradient.

  The gradient of jnp.max goes where x equals the maximum. In a larger program x
  may be recomputed with other rounding, and the gradient be lost or NaN.
  """
  return jnp.max(x, axis, keepdims=True)


@_largest.defjvp
def _largest_jvp(
  axis: int, primals: tuple[AnyArray], tangents: tuple[AnyArray]
) -> tuple[Any, jax.Array]:
  (x,), (tangent,) = primals, tangents
  index = jnp.argmax(x, axis, keepdims=True)
  positions = jax.lax.broadcasted_iota(index.dtype, x.shape, axis)
  selected = jnp.sum(tangent, axis, where=positions == index, keepdims=True)
  return _largest(x, axis), selected


class CBAM(nn.Module):
  """Refines a feature map: x * channel gate * spatial gate (AttnFD, cbam.py).

  Attributes:
    parameter_free: drop the MLP, the convolution and the normalization; the
      logit of each gate is the sum of both poolings.
    freeze_mlp: keep the initial MLP, which the authors' optimizer never sees.
    reduction: channels of x over those of the MLP's hidden layer.
    spatial_init: initializer of the spatial gate's convolution.
    dtype: compute dtype; by default that of x.
  """

  parameter_free: bool = False
  freeze_mlp: bool = False
  reduction: int = 16
  spatial_init: nn.initializers.Initializer = layers.fan_in_normal
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c'], *, train: bool
  ) -> Float[Array, 'b h w c']:
    """Returns the refined feature map."""
    b, h, w, channels = x.shape
    dtype = self.dtype or x.dtype
    average = jnp.mean(x, (1, 2))
    peak = _largest(x.reshape(b, h * w, channels), 1)[:, 0]
    if self.parameter_free:
      gate = average + peak
    else:
      hidden = max(channels // self.reduction, 1)
      reduce = self._dense('mlp_reduce', channels, hidden, dtype)
      expand = self._dense('mlp_expand', hidden, channels, dtype)
      gate = expand(nn.relu(reduce(average))) + expand(nn.relu(reduce(peak)))
    x = jnp.asarray(x * nn.sigmoid(gate)[:, None, None, :])

    peak = _largest(x, 3)
    average = jnp.mean(x, -1, keepdims=True)
    if self.parameter_free:
      return x * nn.sigmoid(peak + average)
    gate = layers.Conv(
      1, 7, kernel_init=self.spatial_init, dtype=dtype, name='spatial_conv'
    )(jnp.concatenate([peak, average], -1))
    # PyTorch's momentum is 0.01.
    norm = layers.BatchNorm(0.99, dtype=dtype, name='spatial_bn')
    return x * nn.sigmoid(norm(gate, train=train))

  def _dense(
    self, name: str, inputs: int, features: int, dtype: DType
  ) -> Callable[[jax.Array], jax.Array]:
    init = layers.torch_uniform(inputs)
    kernel = self.param(f'{name}_kernel', init, (inputs, features))
    bias = self.param(f'{name}_bias', init, (features,))
    if self.freeze_mlp:
      kernel, bias = jax.lax.stop_gradient((kernel, bias))

    def apply(x):
      operands = dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
      return operands[0] @ operands[1] + operands[2][None]

    return apply
