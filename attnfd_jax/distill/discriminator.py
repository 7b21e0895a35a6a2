# SPDX-License-Identifier: Apache-2.0
"""A network that tells logits of a teacher from those of a student.

That of SKD (arXiv 1903.04197) and of those who follow it: normalized logits,
four convolutions of stride 2 with spectral normalization (arXiv 1802.05957),
self-attention (arXiv 1805.08318) after the third and the fourth, and a last
convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.models import convolution, layers

KERNEL_SIZE = 4


def unit_vector(x):
  """x of length 1; zeros stay zeros."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x)), 1e-24))


def power_iteration(matrix, u):
  """u [out], v [in] nearer to the first singular vectors of [in, out]."""
  v = unit_vector(matrix @ u)
  return unit_vector(v @ matrix), v


def padded_to_kernel(x, padding):
  """x with zeros where it is too small for a kernel with this padding.

  Small crops leave less than a kernel to the last convolutions.
  """
  missing = [max(KERNEL_SIZE - 2 * padding - n, 0) for n in x.shape[1:3]]
  return jnp.pad(x, ((0, 0), *((0, pad) for pad in missing), (0, 0)))


class SpectralConv(nn.Module):
  """4x4 convolution of stride 2, its kernel divided by its largest gain.

  The gain is the largest singular value of the kernel as a matrix, estimated
  by one power iteration in each training pass. Its vectors are in the
  collection 'spectral_norm'; they are constants to the gradient.
  """

  features: int

  @nn.compact
  def __call__(self, x, *, train):
    """[b, h, w, c] -> [b, h / 2, w / 2, features], at least one pixel."""
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
    # A gain above 0 from the start, also where nothing is trained yet.
    stored_v = self.variable(
      'spectral_norm', 'v', lambda: unit_vector(matrix @ stored_u.value)
    )
    u, v = stored_u.value, stored_v.value
    if train:
      u, v = power_iteration(jax.lax.stop_gradient(matrix), u)
      moves = self.is_mutable_collection('spectral_norm')
      if moves and not self.is_initializing():
        stored_u.value, stored_v.value = u, v
    gain = v @ matrix @ u
    x = convolution.convolve(
      padded_to_kernel(x, 1), kernel / gain, strides=2, padding=1
    )
    return x + layers.per_channel(bias, x)


class SelfAttention(nn.Module):
  """Adds what each pixel finds at others; nothing at the start."""

  @nn.compact
  def __call__(self, x):
    """[b, h, w, c] -> the same shape."""
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
    found = jnp.einsum('bij,bjc->bic', weights, project('value', c))
    gamma = self.param('gamma', nn.initializers.zeros, ())
    return x + gamma * found.reshape(x.shape)


class Discriminator(nn.Module):
  """A score for each image, high for a teacher's.

  Attributes:
    channels: of the first convolution; each further one has twice as many.
  """

  channels: int = 64

  @nn.compact
  def __call__(self, logits, *, train):
    """Logits [b, h, w, k] of at least float32 -> scores [b].

    For maps of 65 x 65 the last convolution leaves one pixel; of more the mean
    is taken, and smaller maps are padded with zeros.
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
