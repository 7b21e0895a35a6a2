# SPDX-License-Identifier: Apache-2.0
"""Compares similarities of class maps in logits (AICSD, arXiv 2308.04243).

With p_i the softmax over positions of the logit map of class i,

  D_ij = KL(p_i || p_j),  d_i = D_i / |D_i|  for each image,
  loss = mean over images, i and j of (d_ij of the student - of the teacher)^2

For the paper's adaptive weights use weight schedules, see docs/methods.md.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps
from attnfd_jax.distill.attnfd import unit
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_choice
from attnfd_jax.losses import Labels, Logits, Mean
from attnfd_jax.models import layers
from attnfd_jax.models.network import Outputs

CHOICES = {
  'softmax_over': ('positions', 'height'),
  'form': ('paper', 'code'),
  'reduction': ('mean', 'batchmean'),
}


def class_divergences(
  logits: Logits, *, softmax_over: str = 'positions', form: str = 'paper'
) -> Float[Array, 'b_or_1 k k']:
  """KL divergences between the maps of all pairs of classes, at least float32.

  >>> logits = jnp.array([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
  >>> class_divergences(logits).round(4).tolist()
  [[[0.0, 0.3278...], [0.4337..., 0.0]]]

  Args:
    logits: of each pixel and class.
    softmax_over: see AICSD.
    form: see AICSD; 'code' gives one matrix for the whole batch.
  """
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  b, h, w, k = logits.shape
  groups = logits.reshape(b, 1, h * w, k)
  if softmax_over == 'height':
    groups = jnp.moveaxis(logits, 2, 1)
  # The softmax does not depend on the mean; without it, small differences keep
  # their digits.
  groups = groups - jnp.mean(groups, 2, keepdims=True)
  p = jax.nn.softmax(groups, 2)
  if form == 'code':
    entropies = jnp.sum(p * jax.nn.log_softmax(groups, 2), (0, 1, 2))
    products = jnp.einsum('bgni,bgnj->ij', p, p, precision='highest')
    upper = jnp.triu(entropies[None] - products)
    return (upper + jnp.triu(upper, 1).T)[None]
  # The log of the sum of exponentials is the same for all positions.
  shift = jax.nn.logsumexp(groups, 2)  # [b, g, k]
  products = jnp.einsum('bgni,bgnj->bgij', p, groups, precision='highest')
  own = jnp.diagonal(products, axis1=2, axis2=3) - shift
  divergences = own[..., None] - (products - shift[..., None, :])
  return jnp.sum(divergences, 1)


def similarity_distance(
  student: Logits,
  teacher: Logits,
  *,
  softmax_over: str = 'positions',
  form: str = 'paper',
) -> Mean:
  """Mean squared difference of class divergences with rows of length 1.

  >>> logits = jnp.array([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
  >>> round(float(similarity_distance(logits, 0 * logits).value), 3)
  0.5

  Args:
    student: logits.
    teacher: logits of the same shape; they get no gradient.
    softmax_over: see AICSD.
    form: see AICSD.

  Raises:
    ValueError: if the shapes differ.
  """
  taps.check_logits(student, teacher)
  teacher = jax.lax.stop_gradient(teacher)
  student_rows, teacher_rows = (
    unit(class_divergences(x, softmax_over=softmax_over, form=form), (-1,))
    for x in (student, teacher)
  )
  return Mean.of(jnp.mean(jnp.square(student_rows - teacher_rows), (1, 2)))


class AICSD(nn.Module):
  """Similarity of class maps, from coarse logits if both networks have them.

  Example:
    `--config.distill.method=kd+aicsd --config.distill.aicsd.form=code`

  Attributes:
    softmax_over: 'positions', or 'height' as in the authors' branch `main`:
      each column of a map is a distribution of its own.
    form: 'paper', or 'code' as in both of the authors' branches: KLDivLoss
      receives probabilities where it expects logarithms, only i <= j is
      computed and mirrored, and there is one matrix for the whole batch.
    reduction: 'mean', or 'batchmean' as the authors: divided by the effective
      batch size once more, as they do with the cross-entropy, see
      ce_batch_division.
  """

  softmax_over: str = 'positions'
  form: str = 'paper'
  reduction: str = 'mean'

  def __post_init__(self):
    for name, choices in CHOICES.items():
      check_choice(name, getattr(self, name), choices)
    super().__post_init__()

  @property
  def divides_by_batch(self) -> bool:
    """Whether to divide once more, after the mean over images."""
    return self.reduction == 'batchmean'

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher)
    options = {'softmax_over': self.softmax_over, 'form': self.form}
    return similarity_distance(*pair, **options), {}
