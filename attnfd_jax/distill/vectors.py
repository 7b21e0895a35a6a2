# SPDX-License-Identifier: Apache-2.0
"""Normalizes vectors of any length, with finite gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.types import AnyArray

# A vector whose largest magnitude is smaller counts as zero.
TINY = 1e-12
# Deviations from the mean below this fraction of the values are rounding.
ROUNDING = 1e-6


def scaled(
  x: Float[AnyArray, '*shape'], axes: tuple[int, ...]
) -> Float[Array, '*shape']:
  """Divides x by its largest magnitude along `axes`; zeros stay zeros.

  For computations whose result does not depend on a factor: squares and
  products then neither underflow nor overflow. The divisor gets no gradient.

  >>> scaled(jnp.array([1.0, -4.0]), (0,)).tolist()
  [0.25, -1.0]
  """
  largest = _largest(x, axes)
  return jnp.where(largest > TINY, x / jnp.maximum(largest, TINY), 0)


def unit(
  x: Float[AnyArray, '*shape'], axes: tuple[int, ...]
) -> Float[Array, '*shape']:
  """Scales x to length 1 along `axes`; zeros stay zeros and get no gradient.

  >>> unit(jnp.array([3.0, 4.0]), (0,)).round(3).tolist()
  [0.6..., 0.8...]
  """
  x = scaled(x, axes)
  square = jnp.sum(jnp.square(x), axes, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def standardized(
  x: Float[AnyArray, '*shape'], axes: tuple[int, ...]
) -> Float[Array, '*shape']:
  """Returns (x - mean) / deviation along `axes`; zeros where x is constant.

  The deviation divides by n, not by n - 1.

  >>> standardized(jnp.array([1.0, 5.0]), (0,)).round(3).tolist()
  [-1.0, 1.0]
  """
  centered = x - jnp.mean(x, axes, keepdims=True)
  varies = _largest(centered, axes) > ROUNDING * _largest(x, axes)
  count = math.prod(x.shape[axis] for axis in axes)
  return count**0.5 * unit(jnp.where(varies, centered, 0), axes)


def _largest(x, axes):
  return jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axes, keepdims=True)
