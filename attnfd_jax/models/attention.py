# SPDX-License-Identifier: Apache-2.0
"""CBAM: a channel gate, then a spatial gate (arXiv 1807.06521)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.models import layers


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x, axis):
  """Maximum along one axis, which is kept; its gradient goes to one place.

  That of jnp.max goes where x equals the maximum. In a larger program x may be
  computed a second time and rounded otherwise: it then goes nowhere, or is NaN.
  """
  return jnp.max(x, axis, keepdims=True)


@_largest.defjvp
def _largest_jvp(axis, primals, tangents):
  (x,), (tangent,) = primals, tangents
  index = jnp.argmax(x, axis, keepdims=True)
  places = jax.lax.broadcasted_iota(index.dtype, x.shape, axis)
  moved = jnp.sum(tangent, axis, where=places == index, keepdims=True)
  return _largest(x, axis), moved


class CBAM(nn.Module):
  """Refines a map: x * channel gate * spatial gate (AttnFD, cbam.py).

  The parameter-free form drops the MLP, the convolution and the normalisation
  and takes the sum of both poolings for the logit of each gate.
  """

  parameter_free: bool = False
  # The authors' optimiser never sees the MLP: it keeps its random start.
  freeze_mlp: bool = False
  reduction: int = 16
  spatial_init: nn.initializers.Initializer = layers.fan_in_normal
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    """Returns the refined map, [b, h, w, c] as x."""
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
    x = x * nn.sigmoid(gate)[:, None, None, :]

    peak = _largest(x, 3)
    average = jnp.mean(x, -1, keepdims=True)
    if self.parameter_free:
      return x * nn.sigmoid(peak + average)
    gate = layers.Conv(
      1, 7, kernel_init=self.spatial_init, dtype=dtype, name='spatial_conv'
    )(jnp.concatenate([peak, average], -1))
    # torch momentum 0.01.
    norm = layers.BatchNorm(0.99, dtype=dtype, name='spatial_bn')
    return x * nn.sigmoid(norm(gate, train=train))

  def _dense(self, name, inputs, features, dtype):
    init = layers.torch_uniform(inputs)
    kernel = self.param(f'{name}_kernel', init, (inputs, features))
    bias = self.param(f'{name}_bias', init, (features,))
    if self.freeze_mlp:
      kernel, bias = jax.lax.stop_gradient((kernel, bias))

    def apply(x):
      operands = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
      return operands[0] @ operands[1] + operands[2][None]

    return apply
