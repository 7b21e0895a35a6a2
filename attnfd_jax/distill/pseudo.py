# SPDX-License-Identifier: Apache-2.0
"""Trains with confident predictions of the teacher as pseudo-labels.

Lee, ICML 2013 workshop.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from attnfd_jax.distill import taps
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_range
from attnfd_jax.losses import (
  IGNORE_LABEL,
  Labels,
  Logits,
  softmax_cross_entropy,
)
from attnfd_jax.models.network import Outputs


def confident_labels(
  logits: Logits, *, min_confidence: float
) -> Integer[Array, 'b h w']:
  """Predicted classes; 255 where their probability is below `min_confidence`.

  >>> logits = jnp.array([[[[0.0, 3.0], [0.0, 1.0]]]])
  >>> confident_labels(logits, min_confidence=0.9).tolist()
  [[[1, 255]]]
  """
  labels = jnp.argmax(logits, -1).astype(jnp.int32)
  confidence = jnp.max(jax.nn.softmax(logits), -1)
  return jnp.where(confidence >= min_confidence, labels, IGNORE_LABEL)


class PseudoLabels(nn.Module):
  """Cross-entropy with the teacher's confident predictions as labels.

  Only on images without any label, as if `predict --min_confidence` had written
  masks for them. The term `kept` is the fraction of their pixels at which the
  teacher is confident.

  Example:
    `--config.distill.method=pseudo --config.distill.pseudo.min_confidence=0.8`

  Attributes:
    min_confidence: minimum probability of a class to be used as a label.
    everywhere: also on images that have labels.
    full_size: use logits at the size of the image, as `predict` writes them,
      even if both networks have coarse logits.
  """

  min_confidence: float = 0.9
  everywhere: bool = False
  full_size: bool = False

  def __post_init__(self):
    check_range('min_confidence', self.min_confidence, 0, 1)
    super().__post_init__()

  @property
  def needs_unlabeled(self) -> bool:
    """Whether it uses unlabeled images only."""
    return not self.everywhere

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; the term is `kept`."""
    del train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    taps.check_logits(*pair)
    student_logits, teacher_logits = taps.in_float32(*pair)
    targets = confident_labels(
      teacher_logits, min_confidence=self.min_confidence
    )
    used = jnp.ones(labels.shape[0], bool)
    if not self.everywhere:
      used = jnp.all(labels == IGNORE_LABEL, (1, 2))
    targets = jnp.where(used[:, None, None], targets, IGNORE_LABEL)
    kept = jnp.sum(targets != IGNORE_LABEL, dtype=jnp.float32)
    pixels = jnp.sum(used, dtype=jnp.float32) * targets[0].size
    loss = softmax_cross_entropy(student_logits, targets)
    return loss, {'kept': kept / jnp.maximum(pixels, 1)}
