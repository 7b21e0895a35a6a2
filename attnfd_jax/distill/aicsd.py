# SPDX-License-Identifier: Apache-2.0
"""AICSD: similarity of the logit maps of classes (arXiv 2308.04243).

With p_i the softmax over positions of the logit map of class i,

  D_ij = KL(p_i || p_j),  d_i = D_i / |D_i|  for each image,
  loss = mean over images, i and j of (d_ij of the student - of the teacher)^2

The paper's adaptive weights are schedules, see docs/methods.md.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps
from attnfd_jax.distill.attnfd import unit
from attnfd_jax.errors import one_of
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers

CHOICES = {
  'softmax_over': ('positions', 'height'),
  'form': ('paper', 'code'),
  'reduction': ('mean', 'batchmean'),
}


def class_divergences(logits, *, softmax_over='positions', form='paper'):
  """KL divergences of the maps of all pairs of classes, [b, k, k] of [b, h, w,
  k] in at least float32; 'code' has one matrix [1, k, k] for the batch. See
  AICSD for the options.
  """
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  b, h, w, k = logits.shape
  groups = logits.reshape(b, 1, h * w, k)
  if softmax_over == 'height':
    groups = jnp.moveaxis(logits, 2, 1)
  # A softmax does not see the mean, and without it small differences keep
  # their digits.
  groups = groups - jnp.mean(groups, 2, keepdims=True)
  p = jax.nn.softmax(groups, 2)
  matrix = {'precision': 'highest'}
  if form == 'code':
    entropies = jnp.sum(p * jax.nn.log_softmax(groups, 2), (0, 1, 2))
    products = jnp.einsum('bgni,bgnj->ij', p, p, **matrix)
    upper = jnp.triu(entropies[None] - products)
    return (upper + jnp.triu(upper, 1).T)[None]
  # Without the sum of exponentials, which is the same for all positions.
  shift = jax.nn.logsumexp(groups, 2)  # [b, g, k]
  products = jnp.einsum('bgni,bgnj->bgij', p, groups, **matrix)
  own = jnp.diagonal(products, axis1=2, axis2=3) - shift
  divergences = own[..., None] - (products - shift[..., None, :])
  return jnp.sum(divergences, 1)


def similarity_distance(student, teacher, **options):
  """Mean over images of the squared distance of two `class_divergences`, with
  rows of length 1; the teacher's are constants.
  """
  taps.check_logits(student, teacher)
  teacher = jax.lax.stop_gradient(teacher)
  ours, theirs = (
    unit(class_divergences(x, **options), (-1,)) for x in (student, teacher)
  )
  return Mean.of(jnp.mean(jnp.square(ours - theirs), (1, 2)))


class AICSD(nn.Module):
  """Of the logits before the last resize, where both networks have them.

  Attributes:
    softmax_over: 'positions', or 'height' as branch `main` of the authors: each
      column of a map is a distribution of its own.
    form: 'paper', or 'code' as the authors' two branches: KLDivLoss is given a
      probability where it expects a logarithm, only i <= j is computed and
      mirrored, and one matrix is of the whole batch.
    reduction: 'mean', or 'batchmean' as the authors: divided by the number of
      images once more, as they divide the cross-entropy, see ce_batch_division.
  """

  softmax_over: str = 'positions'
  form: str = 'paper'
  reduction: str = 'mean'

  def __post_init__(self):
    for name, choices in CHOICES.items():
      one_of(name, getattr(self, name), choices)
    super().__post_init__()

  @property
  def divides_by_batch(self):
    """Beside the mean over images."""
    return self.reduction == 'batchmean'

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher)
    options = {'softmax_over': self.softmax_over, 'form': self.form}
    return similarity_distance(*pair, **options), {}
