# SPDX-License-Identifier: Apache-2.0
"""Directions of vectors of any length, with finite gradients."""

import math

import jax
import jax.numpy as jnp

# Below this largest magnitude a vector is zero.
TINY = 1e-12
# Below this share of the values, what is left of them without their mean is
# rounding.
ROUNDING = 1e-6


def scaled(x, axes):
  """x over its largest magnitude along `axes`; zeros stay zeros.

  For what is computed next and does not depend on a factor: squares and
  products then neither vanish nor overflow. The divisor is a constant.
  """
  largest = _largest(x, axes)
  return jnp.where(largest > TINY, x / jnp.maximum(largest, TINY), 0)


def unit(x, axes):
  """x of length 1 along `axes`; zeros stay zeros, and get no gradient."""
  x = scaled(x, axes)
  square = jnp.sum(jnp.square(x), axes, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def standardized(x, axes):
  """(x - mean) / deviation along the tuple `axes`; zeros where all are equal.

  The deviation is that of these values, divided by their number.
  """
  centered = x - jnp.mean(x, axes, keepdims=True)
  varies = _largest(centered, axes) > ROUNDING * _largest(x, axes)
  count = math.prod(x.shape[axis] for axis in axes)
  return count**0.5 * unit(jnp.where(varies, centered, 0), axes)


def _largest(x, axes):
  return jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axes, keepdims=True)
