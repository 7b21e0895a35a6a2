# SPDX-License-Identifier: Apache-2.0
"""The terms of two players: a discriminator and a student that deceives it."""

import jax
import jax.numpy as jnp

GAMES = ('wgan_gp', 'hinge')


def discriminator_loss(real, fake, game):
  """Of scores [b] of a teacher's and a student's outputs: one float.

  'hinge': mean relu(1 - real) + mean relu(1 + fake), 0 once both are beyond 1.
  'wgan_gp': mean fake - mean real, to which a gradient penalty belongs.
  """
  if game == 'hinge':
    return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
  return jnp.mean(fake) - jnp.mean(real)


def mixed(real, fake, share):
  """Between the two, [b, h, w, k]; `share` [b] is what an image has of real."""
  share = share.reshape(-1, 1, 1, 1)
  return share * real + (1 - share) * fake


def gradient_penalty(slopes):
  """Mean of (length - 1)^2 over the images of gradients [b, h, w, k]."""
  square = jnp.sum(jnp.square(slopes), (1, 2, 3))
  # The derivative of a bare root is infinite at 0.
  positive = square > 0
  length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
  return jnp.mean(jnp.square(length - 1))
