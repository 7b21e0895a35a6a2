# SPDX-License-Identifier: Apache-2.0
"""Discriminates the logits of a teacher from those of a student.

The network of SKD (arXiv 1903.04197) and of later work: batch normalization of
the logits, four convolutions of stride 2 with spectral normalization (arXiv
1802.05957), self-attention (arXiv 1805.08318) after the third and the fourth,
and a last convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.models import convolution, layers
from attnfd_jax.types import AnyArray

KERNEL_SIZE = 4


def unit_vector(x: Float[AnyArray, ' n']) -> Float[Array, ' n']:
  """Scales x to length 1; zeros stay zeros.

  >>> unit_vector(jnp.array([0.0, 4.0])).round(3).tolist()
  [0.0, 1.0]
  """
  length = jnp.maximum(jnp.sum(jnp.square(x)), 1e-24)
  return jnp.multiply(x, jax.lax.rsqrt(length))


def power_iteration(
  matrix: Float[AnyArray, 'n m'], u: Float[AnyArray, ' m']
) -> tuple[Float[Array, ' m'], Float[Array, ' n']]:
  """One step toward the first right and left singular vectors of the matrix."""
  v = unit_vector(matrix @ u)
  return unit_vector(v @ matrix), v


def padded_to_kernel(
  x: Float[AnyArray, 'b _h _w c'], padding: int
) -> Float[AnyArray, 'b _h2 _w2 c']:
  """Pads x with zeros if it is too small for a kernel with this padding.

  Small crops leave less than a kernel to the last convolutions.
  """
  missing = [max(KERNEL_SIZE - 2 * padding - n, 0) for n in x.shape[1:3]]
  return jnp.pad(x, ((0, 0), *((0, pad) for pad in missing), (0, 0)))


class SpectralConv(nn.Module):
  """4x4 convolution of stride 2 with spectral normalization.

  The kernel is divided by its largest singular value as a matrix, estimated by
  one power iteration in each training pass. The singular vectors are in the
  collection 'spectral_norm' and get no gradient.
  """

  features: int

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b _h _w _c'], *, train: bool
  ) -> Float[Array, 'b _h2 _w2 {self.features}']:
    """Halves height and width, down to at least one pixel."""
    shape = (KERNEL_SIZE, KERNEL_SIZE, x.shape[-1], self.features)
    fan_in = shape[0] * shape[1] * shape[2]
    init = layers.torch_uniform(fan_in)
    kernel = self.param('kernel', init, shape)
    bias = self.param('bias', init, (self.features,))
    matrix = kernel.reshape(fan_in, self.features)

    def first_u():
      rng = self.make_rng('params')
      return unit_vector(jax.random.normal(rng, (self.features,), kernel.dtype))

    stored_u = self.variable('spectral_norm', 'u', first_u)
    # So that the gain is above 0 from the start, also without training.
    stored_v = self.variable(
      'spectral_norm', 'v', lambda: unit_vector(matrix @ stored_u.value)
    )
    u, v = stored_u.value, stored_v.value
    if train:
      u, v = power_iteration(jax.lax.stop_gradient(matrix), u)
      updates = self.is_mutable_collection('spectral_norm')
      if updates and not self.is_initializing():
        stored_u.value, stored_v.value = u, v
    gain = v @ matrix @ u
    x = convolution.convolve(
      padded_to_kernel(x, 1), kernel / gain, strides=2, padding=1
    )
    return x + layers.per_channel(bias, x)


class SelfAttention(nn.Module):
  """Self-attention over all pixels with a residual; starts as the identity."""

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c']
  ) -> Float[AnyArray, 'b h w c']:
    """Adds gamma times the attended values."""
    b, h, w, c = x.shape

    def project(name, features):
      init = layers.torch_uniform(c)
      conv = layers.Conv(
        features, 1, use_bias=True, kernel_init=init, name=name
      )
      return conv(x).reshape(b, h * w, features)

    narrow = max(c // 8, 1)
    query, key = project('query', narrow), project('key', narrow)
    weights = jax.nn.softmax(jnp.einsum('bic,bjc->bij', query, key))
    attended = jnp.einsum('bij,bjc->bic', weights, project('value', c))
    gamma = self.param('gamma', nn.initializers.zeros, ())
    return x + gamma * attended.reshape(x.shape)


class Discriminator(nn.Module):
  """A score for each image, high for logits of the teacher.

  Attributes:
    channels: channels of the first convolution; each of the next three doubles
      them.
  """

  channels: int = 64

  @nn.compact
  def __call__(
    self, logits: Float[AnyArray, 'b h w k'], *, train: bool
  ) -> Float[Array, ' b']:
    """Scores logits of at least float32.

    Logits of 65 x 65 pixels leave one pixel after the last convolution. Of
    larger ones the mean is taken; smaller ones are padded with zeros.
    """
    x = layers.BatchNorm(name='bn')(logits, train=train)
    for i in range(4):
      conv = SpectralConv(self.channels * 2**i, name=f'conv{i + 1}')
      x = nn.leaky_relu(conv(x, train=train), 0.1)
      if i >= 2:
        x = SelfAttention(name=f'attention{i + 1}')(x)
    init = layers.torch_uniform(KERNEL_SIZE**2 * x.shape[-1])
    last = layers.Conv(
      1, KERNEL_SIZE, padding=0, use_bias=True, kernel_init=init, name='last'
    )
    return jnp.mean(last(padded_to_kernel(x, 0)), (1, 2, 3))
