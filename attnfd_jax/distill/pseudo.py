# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels (Lee, ICML 2013 workshop): the teacher's classes as labels,
where it is sure.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps
from attnfd_jax.errors import within
from attnfd_jax.losses import IGNORE_LABEL, softmax_cross_entropy


def confident_labels(logits, *, min_confidence):
  """Most probable classes of logits [b, h, w, k], int32 [b, h, w]; 255 where
  their probability is below `min_confidence`.
  """
  labels = jnp.argmax(logits, -1).astype(jnp.int32)
  confidence = jnp.max(jax.nn.softmax(logits), -1)
  return jnp.where(confidence >= min_confidence, labels, IGNORE_LABEL)


class PseudoLabels(nn.Module):
  """Cross-entropy with the teacher's confident classes.

  Of the images without any label, as a data set of masks by
  `predict --min_confidence` would give them. The term `kept` is the share of
  their pixels that the teacher is sure of.

  Attributes:
    min_confidence: least probability of a class to be a label.
    everywhere: also of images that have labels.
    full_size: logits of the size of the image, as `predict` writes them, and
      not those before the last resize where both networks have them.
  """

  min_confidence: float = 0.9
  everywhere: bool = False
  full_size: bool = False

  def __post_init__(self):
    within('min_confidence', self.min_confidence, 0, 1)
    super().__post_init__()

  @property
  def needs_unlabeled(self):
    """Without unlabeled images there is nothing to learn."""
    return not self.everywhere

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    taps.check_logits(*pair)
    ours, theirs = taps.in_float32(*pair)
    found = confident_labels(theirs, min_confidence=self.min_confidence)
    taught = jnp.ones(labels.shape[0], bool)
    if not self.everywhere:
      taught = jnp.all(labels == IGNORE_LABEL, (1, 2))
    found = jnp.where(taught[:, None, None], found, IGNORE_LABEL)
    kept = jnp.sum(found != IGNORE_LABEL, dtype=jnp.float32)
    pixels = jnp.sum(taught, dtype=jnp.float32) * found[0].size
    loss = softmax_cross_entropy(ours, found)
    return loss, {'kept': kept / jnp.maximum(pixels, 1)}
