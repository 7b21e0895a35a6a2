# SPDX-License-Identifier: Apache-2.0
"""Correlation of predictions, DIST (Huang et al., arXiv 2205.10536).

With probabilities p [b, h, w, k] at temperature T and Pearson's correlation r:

  inter = 1 - mean over pixels of r(p_student, p_teacher) over the classes,
  intra = 1 - mean over classes of r over all pixels of the batch,
  loss = T^2 (inter_weight * inter + intra_weight * intra)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps
from attnfd_jax.errors import within

EPSILON = 1e-8  # Of the authors' denominator.


def correlation(x, y, axes):
  """Pearson's over `axes`, which it removes; 0 where x or y is constant."""
  x, y = (x - jnp.mean(x, axes, keepdims=True) for x in (x, y))

  def length(x):
    square = jnp.sum(jnp.square(x), axes)
    known = square > 0  # A root has no derivative at 0.
    return jnp.where(known, jnp.sqrt(jnp.where(known, square, 1)), 0)

  return jnp.sum(x * y, axes) / (length(x) * length(y) + EPSILON)


def prediction_distances(student, teacher, *, temperature=1.0):
  """inter and intra of two logits [b, h, w, k], scalars from 0 to 2.

  intra is over the whole batch, on any number of devices. A class of which one
  side has the same probability everywhere has no correlation, and adds 1 / k.
  """
  taps.check_logits(student, teacher)
  student, teacher = (
    jax.nn.softmax(x / temperature) for x in taps.in_float32(student, teacher)
  )
  inter = 1 - jnp.mean(correlation(student, teacher, (3,)))
  intra = 1 - jnp.mean(correlation(student, teacher, (0, 1, 2)))
  return inter, intra


class Dist(nn.Module):
  """DIST of the logits before the last resize, where both networks have them.

  MMRazor and torchdistill correlate over the images alone in intra, at each
  pixel, as their code is written for images with one label; that is not here.
  A batch that is accumulated in parts is compared within each part.

  Attributes:
    inter_weight, intra_weight: of the two terms, the paper's beta and gamma.
    temperature: T.
    full_size: compare logits of the size of the image, as AttnFD's authors do.
    divides_by_batch: whether `train` divides the loss by the number of images,
      as AttnFD's authors do.
  """

  inter_weight: float = 1.0
  intra_weight: float = 1.0
  temperature: float = 1.0
  full_size: bool = False
  divides_by_batch: bool = False

  def __post_init__(self):
    within('inter_weight', self.inter_weight, 0, 1e30)
    within('intra_weight', self.intra_weight, 0, 1e30)
    within('temperature', self.temperature, 1e-3, 1e6)
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; the terms are inter and intra."""
    del labels, train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    inter, intra = prediction_distances(*pair, temperature=self.temperature)
    loss = self.inter_weight * inter + self.intra_weight * intra
    return self.temperature**2 * loss, {'inter': inter, 'intra': intra}
