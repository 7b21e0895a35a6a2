# SPDX-License-Identifier: Apache-2.0
"""Correlates predictions, DIST (Huang et al., arXiv 2205.10536).

With probabilities p [b, h, w, k] at temperature T and Pearson's correlation r:

  inter = 1 - mean over pixels of r(p_student, p_teacher) over the classes,
  intra = 1 - mean over classes of r over all pixels of the batch,
  loss = T^2 (inter_weight * inter + intra_weight * intra)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps
from attnfd_jax.distill.method import LossAndTerms, Scalar, Step
from attnfd_jax.errors import check_range
from attnfd_jax.losses import Labels, Logits
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

EPSILON = 1e-8  # In the authors' denominator.


def correlation(
  x: Float[AnyArray, '*shape'],
  y: Float[AnyArray, '*shape'],
  axes: tuple[int, ...],
) -> Float[Array, '...']:
  """Pearson's correlation along `axes`; 0 where x or y is constant.

  >>> x, y = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 2.0, 4.0])
  >>> float(correlation(x, y, (0,)).round(3))
  1.0
  """
  x, y = (x - jnp.mean(x, axes, keepdims=True) for x in (x, y))

  def length(x):
    square = jnp.sum(jnp.square(x), axes)
    positive = square > 0  # The square root has no derivative at 0.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)

  return jnp.sum(x * y, axes) / (length(x) * length(y) + EPSILON)


def prediction_distances(
  student: Logits, teacher: Logits, *, temperature: float = 1.0
) -> tuple[Scalar, Scalar]:
  """The terms inter and intra, each from 0 to 2.

  The term intra spans the whole batch, on any number of devices. A class to
  which one network gives the same probability everywhere has no correlation and
  adds 1 / k.

  >>> logits = jnp.array([2.0, 0.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
  >>> [round(float(x), 3) for x in prediction_distances(logits, -logits)]
  [2.0, 2.0]

  Args:
    student: logits.
    teacher: logits of the same shape; they get no gradient.
    temperature: T.

  Raises:
    ValueError: if the shapes differ.
  """
  taps.check_logits(student, teacher)
  student, teacher = (
    jax.nn.softmax(x / temperature) for x in taps.in_float32(student, teacher)
  )
  inter = 1 - jnp.mean(correlation(student, teacher, (3,)))
  intra = 1 - jnp.mean(correlation(student, teacher, (0, 1, 2)))
  return inter, intra


class Dist(nn.Module):
  """DIST, from coarse logits if both networks have them.

  For intra, MMRazor and torchdistill correlate over the images only, at each
  pixel, because their code is written for image classification; that variant
  is not implemented. With gradient accumulation, each part of the batch is
  compared separately.

  Example:
    `--config.distill.method=dist --config.distill.dist.intra_weight=2`

  Attributes:
    inter_weight: weight of inter, the paper's beta.
    intra_weight: weight of intra, the paper's gamma.
    temperature: T.
    full_size: compare logits at the size of the image, as AttnFD's authors do.
    divides_by_batch: whether `train` divides the loss by the effective batch
      size, as AttnFD's authors do.
  """

  inter_weight: float = 1.0
  intra_weight: float = 1.0
  temperature: float = 1.0
  full_size: bool = False
  divides_by_batch: bool = False

  def __post_init__(self):
    check_range('inter_weight', self.inter_weight, 0, 1e30)
    check_range('intra_weight', self.intra_weight, 0, 1e30)
    check_range('temperature', self.temperature, 1e-3, 1e6)
    super().__post_init__()

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; the terms are inter and intra."""
    del labels, train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    inter, intra = prediction_distances(*pair, temperature=self.temperature)
    loss = self.inter_weight * inter + self.intra_weight * intra
    return self.temperature**2 * loss, {'inter': inter, 'intra': intra}
