# SPDX-License-Identifier: Apache-2.0
"""Losses over arrays: pure, masked, in float32, safe when no pixel counts.

All take logits [b, h, w, k] and labels [b, h, w] and return a `Mean`; what they
have in common is at softmax_cross_entropy. Labels outside the classes must have
been refused when data was read: 255 would give NaN with a finite gradient here,
-1 would train the last class.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnfd_jax.models import resizing

IGNORE_LABEL = 255


class Mean(NamedTuple):
  """A loss as a sum and what it is divided by, float32 scalars.

  Of a batch that is computed in parts, totals and counts add up and are divided
  once: pixels weigh the same, however many are ignored in each part.
  """

  total: jax.Array
  count: jax.Array | float

  @classmethod
  def of(cls, values):
    """Of an array of floats: their sum, and how many they are."""
    return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))

  @property
  def value(self):
    """total / count; 0 if nothing counts."""
    return self.total / jnp.where(self.count > 0, self.count, 1)


def _float(logits):
  return logits.astype(np.promote_types(logits.dtype, np.float32))


def _check_shapes(logits, labels, class_weights=None):
  if logits.shape[:-1] != labels.shape:
    raise ValueError(f'{logits.shape=} does not fit {labels.shape=}.')
  if class_weights is not None and len(class_weights) != logits.shape[-1]:
    given = f'{len(class_weights)} class_weights'
    raise ValueError(f'{given} for {logits.shape[-1]} classes.')


def _by_selection(logits, labels):
  """As optax's function of integer labels. The gradient of that is a scatter,
  which XLA cannot do, or does slowly, where a GPU must repeat its bits.
  """
  chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  score = jnp.sum(jnp.where(chosen, logits, 0), -1)
  return jax.nn.logsumexp(logits, -1) - score


def _cross_entropies(logits, labels, valid):
  """Of each pixel, [b, h, w]; of class 0 where not valid."""
  return jax.lax.platform_dependent(
    _float(logits),
    jnp.where(valid, labels, 0).astype(jnp.int32),
    cuda=_by_selection,
    default=optax.softmax_cross_entropy_with_integer_labels,
  )


def _pixel_losses(logits, labels, ignore_label, class_weights):
  """Cross-entropies [b, h, w], and True where they count."""
  _check_shapes(logits, labels, class_weights)
  valid = labels != ignore_label
  return _cross_entropies(logits, labels, valid), valid


def _mean(losses, labels, counted, class_weights):
  """Over the pixels that are counted, weighted by their labels."""
  if class_weights is None:
    total = jnp.sum(losses, where=counted)
    return Mean(total, jnp.sum(counted, dtype=losses.dtype))
  table = jnp.asarray(class_weights, losses.dtype)
  weights = table[jnp.where(counted, labels, 0).astype(jnp.int32)]
  total = jnp.sum(losses * weights, where=counted)
  return Mean(total, jnp.sum(weights, where=counted))


def softmax_cross_entropy(
  logits, labels, *, class_weights=None, ignore_label=IGNORE_LABEL
):
  """Cross-entropy of the pixels that count, as a sum and a count.

  Args:
    logits: [b, h, w, k].
    labels: integers [b, h, w]; `ignore_label` does not count.
    class_weights: k numbers; the mean is weighted by those of the labels, and
      the count their sum, so that a common factor changes nothing.
    ignore_label: value of the pixels to leave out.

  Raises:
    ValueError: if the shapes do not fit.
  """
  losses, valid = _pixel_losses(logits, labels, ignore_label, class_weights)
  return _mean(losses, labels, valid, class_weights)


def upsampled_cross_entropy(
  logits, labels, *, parts, precision='highest', ignore_label=IGNORE_LABEL
):
  """softmax_cross_entropy of logits resized to the labels, part by part.

  Resized as models.resizing.resize does it. Logits at full size, and their
  gradients, never exist as a whole: a part of the rows is resized, scored, and
  resized again for the gradient. The Mean is that of the whole up to rounding.

  Args:
    logits: [b, h, w, k].
    labels: [b, height, width].
    parts: of the rows of the labels.
    precision: of the products that resize.
    ignore_label: see softmax_cross_entropy.
  """
  logits = _float(logits)
  _, h, w, _ = logits.shape
  b, height, width = labels.shape
  rows = -(-height // parts)
  missing = parts * rows - height
  down = jnp.pad(resizing.matrix(height, h), ((0, missing), (0, 0)))
  down = down.astype(logits.dtype).reshape(parts, rows, h)
  across = resizing.matrix(width, w).astype(logits.dtype)
  below = ((0, 0), (0, missing), (0, 0))
  labels = jnp.pad(labels, below, constant_values=ignore_label)
  labels = jnp.moveaxis(labels.reshape(b, parts, rows, width), 1, 0)

  @jax.checkpoint
  def add_part(sums, part):
    down, labels = part
    rule = 'Hh,bhwk,Ww->bHWk'
    resized = jnp.einsum(rule, down, logits, across, precision=precision)
    found = softmax_cross_entropy(resized, labels, ignore_label=ignore_label)
    return jax.tree.map(jnp.add, sums, found), None

  zero = jnp.zeros((), logits.dtype)
  return jax.lax.scan(add_part, Mean(zero, zero), (down, labels))[0]


def ohem_cross_entropy(
  logits,
  labels,
  *,
  threshold=0.7,
  min_kept=1 / 16,
  class_weights=None,
  ignore_label=IGNORE_LABEL,
):
  """Cross-entropy over the hard pixels alone (OHEM).

  Hard is a pixel whose class has a probability of at most `threshold`. If
  these are fewer than the share `min_kept` of the pixels that count, the
  hardest ones up to that share; at least one. Over the whole batch, or the part
  that is computed at a time, on any number of devices. Shrivastava et al.,
  arXiv 1604.03540, for pixels.

  `threshold` is in (0, 1], 1 the plain cross-entropy; `min_kept` from 0 to 1.
  Class weights enter the mean, not the choice.
  """
  losses, valid = _pixel_losses(logits, labels, ignore_label, class_weights)
  known = jax.lax.stop_gradient(losses)
  ordered = jnp.sort(jnp.where(valid, known, -1).ravel(), descending=True)
  kept = jnp.ceil(min_kept * jnp.sum(valid, dtype=losses.dtype))
  last = jnp.maximum(kept.astype(jnp.int32) - 1, 0)
  cutoff = jnp.minimum(-math.log(threshold), ordered[last])
  return _mean(losses, labels, valid & (known >= cutoff), class_weights)


def focal_loss(
  logits, labels, *, gamma=2.0, class_weights=None, ignore_label=IGNORE_LABEL
):
  """Mean of (1 - p)^gamma times cross-entropy, p that of the label.

  Lin et al., arXiv 1708.02002; per pixel, unlike the authors' --loss-type
  focal, which rescales the mean (METHOD 4.4). `gamma` is not negative, 0 the
  cross-entropy; the class weights are the paper's alpha.
  """
  losses, valid = _pixel_losses(logits, labels, ignore_label, class_weights)
  # 1 - p without cancellation; a power below 1 has no derivative at 0.
  wrong = jnp.maximum(-jnp.expm1(-losses), 1e-6)
  return _mean(wrong**gamma * losses, labels, valid, class_weights)


def dice_loss(logits, labels, *, ignore_label=IGNORE_LABEL):
  """1 - mean soft Dice of the classes that occur in the labels of the batch.

  Dice of a class is 2 sum(p y) / (sum(p) + sum(y)) over the pixels that count
  of the batch, or of the part that is computed at a time, p the probability and
  y 1 where it is the label: every class weighs the same, whatever its size. The
  count is that of the classes. Milletari et al., arXiv 1606.04797, without
  their squares.
  """
  _check_shapes(logits, labels)
  valid = labels != ignore_label
  p = jax.nn.softmax(_float(logits))
  labels = jnp.where(valid, labels.astype(jnp.int32), -1)
  # A row of zeros where nothing counts.
  target = jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype)
  pixels = tuple(range(labels.ndim))
  both, size = jnp.sum(p * target, pixels), jnp.sum(target, pixels)
  total = jnp.sum(p, pixels, where=valid[..., None]) + size
  present = size > 0
  dice = 2 * both / jnp.where(present, total, 1)
  total = jnp.sum(1 - dice, where=present)
  return Mean(total, jnp.sum(present, dtype=p.dtype))
