# SPDX-License-Identifier: Apache-2.0
"""Losses of adversarial training: a discriminator and a student.

The discriminator learns to tell outputs of the teacher (real) from those of the
student (fake); the student learns to make its own look real.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.types import AnyArray

GAMES = ('wgan_gp', 'hinge')


def discriminator_loss(
  real: Float[AnyArray, ' _'], fake: Float[AnyArray, ' _'], game: str
) -> Float[Array, '']:
  """Loss of the discriminator, without the gradient penalty.

  >>> real, fake = jnp.array([3.0, 0.5]), jnp.array([-2.0, 0.0])
  >>> [float(discriminator_loss(real, fake, game)) for game in GAMES]
  [-2.75, 0.75]

  Args:
    real: its scores of the teacher's outputs.
    fake: its scores of the student's outputs.
    game: 'hinge' is mean relu(1 - real) + mean relu(1 + fake), so that scores
      beyond 1 and -1 cost nothing. 'wgan_gp' is mean fake - mean real, which
      needs a gradient penalty.
  """
  if game == 'hinge':
    return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
  return jnp.mean(fake) - jnp.mean(real)


def mixed(
  real: Float[AnyArray, 'b h w k'],
  fake: Float[AnyArray, 'b h w k'],
  share: Float[Array, ' b'],
) -> Float[Array, 'b h w k']:
  """Interpolates between both; `share` is the fraction of real per image."""
  share = share.reshape(-1, 1, 1, 1)
  return share * real + (1 - share) * fake


def gradient_penalty(slopes: Float[AnyArray, 'b h w k']) -> Float[Array, '']:
  """Mean over images of (length - 1)^2 of the gradient of the score.

  >>> float(gradient_penalty(jnp.array([[[[3.0, 4.0]]]])))  # (5 - 1)^2
  16.0
  """
  square = jnp.sum(jnp.square(slopes), (1, 2, 3))
  # The derivative of the square root is infinite at 0.
  positive = square > 0
  length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
  return jnp.mean(jnp.square(length - 1))
