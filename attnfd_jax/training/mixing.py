# SPDX-License-Identifier: Apache-2.0
"""CutMix (arXiv 1905.04899) of images and their masks, on the device.

Teacher and student see the same mixed image, as in "a good teacher is patient
and consistent" (arXiv 2106.05237).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def _boxes(rng: jax.Array, b: int, h: int, w: int) -> jax.Array:
  """A random box in each image, as a boolean mask [b, h, w].

  As in the paper, with lambda from Beta(1, 1): the area is uniform in (0, 1),
  the aspect ratio is the image's, the center is anywhere in the image, and the
  box is clipped to it.
  """
  area, *center = jax.random.uniform(rng, (3, b, 1))

  def inside(size, center):
    half = jnp.sqrt(area) / 2
    position = (jnp.arange(size, dtype=jnp.float32)[None] + 0.5) / size
    return jnp.abs(position - center) < half  # [b, size]

  rows, columns = map(inside, (h, w), center)
  return rows[:, :, None] & columns[:, None, :]


def cutmix(
  batch: Mapping[str, jax.Array], rng: jax.Array, *, probability: float
) -> dict[str, jax.Array]:
  """Pastes a box of the next image in the batch, and its label, into each.

  Args:
    batch: 'image' [b, h, w, 3] and 'label' [b, h, w]. The next image of the
      last one is the first; batches are in random order.
    rng: for the boxes, and the choice of images.
    probability: of each image to be changed.
  """
  box_rng, chosen_rng = jax.random.split(rng)
  b, h, w = batch['label'].shape
  chosen = jax.random.bernoulli(chosen_rng, probability, (b, 1, 1))
  pasted = _boxes(box_rng, b, h, w) & chosen

  def mix(x):
    mask = pasted.reshape(pasted.shape + (1,) * (x.ndim - 3))
    return jnp.where(mask, jnp.roll(x, -1, axis=0), x)

  return {name: mix(x) for name, x in batch.items()}
