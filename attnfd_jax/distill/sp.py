# SPDX-License-Identifier: Apache-2.0
"""Similarity of the images of a batch (Tung and Mori, arXiv 1907.09682).

With the maps of b images as the rows of F [b, h w c], of either side:

  G = rows of F F' scaled to length 1,
  loss = || G_student - G_teacher ||_F^2 / b^2
"""

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors


def similarities(x):
  """G of a map [b, h, w, c], [b, b]."""
  x = vectors.scaled(x.reshape(x.shape[0], -1), (0, 1))
  return vectors.unit(jnp.matmul(x, x.T, precision='highest'), (1,))


def similarity_distance(student, teacher):
  """The loss of two maps of the same images, of any sizes; 0 if it is one.

  Over the whole batch, on any number of devices.
  """
  if student.shape[0] != teacher.shape[0]:
    raise ValueError(f'Batches differ: {student.shape} and {teacher.shape}.')
  student, teacher = matching.in_float32(student, teacher)
  return jnp.mean(jnp.square(similarities(student) - similarities(teacher)))


class SimilarityPreserving(nn.Module):
  """Sum over the taps of the distance of similarities.

  A batch that is accumulated in parts is compared within each part.

  Attributes:
    taps: names of maps; those that both sides have are compared. Sizes and
      channels may differ.
  """

  taps: tuple[str, ...] = ('aspp',)

  def __post_init__(self):
    matching.check(self.taps, 'none')
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; a term for each tap if there are several."""
    del labels, train, step
    ours, theirs = matching.shared(student, teacher, self.taps)
    terms = {tap: similarity_distance(ours[tap], theirs[tap]) for tap in ours}
    return sum(terms.values()), (terms if len(terms) > 1 else {})
