# SPDX-License-Identifier: Apache-2.0
"""CutMix (arXiv 1905.04899) of images with their masks, on the devices.

Teacher and student see the same mixed image, as a patient and consistent
teacher should (arXiv 2106.05237).
"""

import jax
import jax.numpy as jnp


def _boxes(rng, b, h, w):
  """bool [b, h, w]: a box of each image whose area is uniform in (0, 1).

  As the paper draws it, with lambda from Beta(1, 1): sides in proportion to the
  image's, centre anywhere in it, cut off at its edges.
  """
  area, *centre = jax.random.uniform(rng, (3, b, 1))

  def inside(size, centre):
    half = jnp.sqrt(area) / 2
    place = (jnp.arange(size, dtype=jnp.float32)[None] + 0.5) / size
    return jnp.abs(place - centre) < half  # [b, size]

  rows, columns = map(inside, (h, w), centre)
  return rows[:, :, None] & columns[:, None, :]


def cutmix(batch, rng, *, probability):
  """Pastes a box of the next image of the batch, and of its label, into each.

  Args:
    batch: {'image': [b, h, w, 3], 'label': [b, h, w]}. The next image of the
      last one is the first; the order of a batch is random.
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
