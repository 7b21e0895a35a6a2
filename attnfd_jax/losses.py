# SPDX-License-Identifier: Apache-2.0
"""Task losses: pure functions, masked, in float32, 0 where no pixel is labeled.

All take logits and labels and return a `Mean`; the arguments they share are
described at softmax_cross_entropy. Labels are class indices or `ignore_label`,
which the data pipeline ensures: here, any other label would give NaN or train
the wrong class.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer
import numpy as np
import optax

from attnfd_jax.models import resizing
from attnfd_jax.types import AnyArray

IGNORE_LABEL = 255

Logits: TypeAlias = Float[AnyArray, 'b h w k']
Labels: TypeAlias = Integer[AnyArray, 'b h w']
ClassWeights: TypeAlias = Sequence[float] | Float[AnyArray, ' k'] | None
_PixelLosses: TypeAlias = Float[Array, 'b h w']
_PixelMask: TypeAlias = Bool[Array, 'b h w']


class Mean(NamedTuple):
  """A mean as a sum and a count, float32 scalars.

  When a batch is processed in parts, sums and counts are added up and divided
  once: every labeled pixel has the same weight, however many pixels are ignored
  in its part.
  """

  total: Float[Array, '']
  # Shadows the method of tuples.
  count: Float[Array, ''] | float  # pyright: ignore

  @classmethod
  def of(cls, values: Float[Array, '...']) -> 'Mean':
    """The mean over all elements."""
    return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))

  @property
  def value(self) -> Float[Array, '']:
    """The sum divided by the count; 0 if the count is 0."""
    return self.total / jnp.where(self.count > 0, self.count, 1)


def _float(logits: Float[AnyArray, '...']) -> Float[Array, '...']:
  dtype = np.promote_types(logits.dtype, np.float32)
  return jnp.asarray(logits.astype(dtype))


def _check_shapes(
  logits: AnyArray, labels: AnyArray, class_weights: ClassWeights = None
) -> None:
  if logits.shape[:-1] != labels.shape:
    raise ValueError(f'{logits.shape=} does not fit {labels.shape=}.')
  if class_weights is not None and len(class_weights) != logits.shape[-1]:
    given = f'{len(class_weights)} class_weights'
    raise ValueError(f'{given} for {logits.shape[-1]} classes.')


def _cross_entropy_one_hot(
  logits: Float[Array, 'b h w k'], labels: Integer[Array, 'b h w']
) -> _PixelLosses:
  """optax.softmax_cross_entropy_with_integer_labels without a gather.

  The gradient of a gather is a scatter, for which XLA has no deterministic
  implementation on GPUs, or a slow one.
  """
  one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  label_logits = jnp.sum(jnp.where(one_hot, logits, 0), -1)
  return jax.nn.logsumexp(logits, -1) - label_logits


def _pixel_losses(
  logits: Logits,
  labels: Labels,
  ignore_label: int,
  class_weights: ClassWeights,
) -> tuple[_PixelLosses, _PixelMask]:
  """Cross-entropy of each pixel, and which pixels are labeled."""
  _check_shapes(logits, labels, class_weights)
  labels = jnp.asarray(labels)
  labeled = labels != ignore_label
  losses = jax.lax.platform_dependent(
    _float(logits),
    jnp.where(labeled, labels, 0).astype(jnp.int32),
    cuda=_cross_entropy_one_hot,
    default=optax.softmax_cross_entropy_with_integer_labels,
  )
  return losses, labeled


def _weighted_mean(
  losses: _PixelLosses,
  labels: Labels,
  mask: _PixelMask,
  class_weights: ClassWeights,
) -> Mean:
  """Over the pixels of the mask, weighted by the class of their labels."""
  if class_weights is None:
    total = jnp.sum(losses, where=mask)
    return Mean(total, jnp.sum(mask, dtype=losses.dtype))
  table = jnp.asarray(class_weights, losses.dtype)
  weights = table[jnp.where(mask, labels, 0).astype(jnp.int32)]
  total = jnp.sum(losses * weights, where=mask)
  return Mean(total, jnp.sum(weights, where=mask))


def softmax_cross_entropy(
  logits: Logits,
  labels: Labels,
  *,
  class_weights: ClassWeights = None,
  ignore_label: int = IGNORE_LABEL,
) -> Mean:
  """Mean cross-entropy over the labeled pixels.

  >>> logits, labels = jnp.zeros((1, 2, 2, 4)), jnp.full((1, 2, 2), 3)
  >>> float(softmax_cross_entropy(logits, labels).value)  # log(4)
  1.386294...

  Args:
    logits: of each pixel and class.
    labels: class indices; pixels with `ignore_label` do not count.
    class_weights: weight of each class in the mean. The count is the sum of the
      weights, so multiplying all weights by a constant changes nothing.
    ignore_label: label of the pixels to leave out.

  Raises:
    ValueError: if the shapes do not match.
  """
  losses, labeled = _pixel_losses(logits, labels, ignore_label, class_weights)
  return _weighted_mean(losses, labels, labeled, class_weights)


def upsampled_cross_entropy(
  logits: Float[AnyArray, 'b h w k'],
  labels: Integer[AnyArray, 'b height width'],
  *,
  parts: int,
  precision: jax.lax.PrecisionLike = 'highest',
  ignore_label: int = IGNORE_LABEL,
) -> Mean:
  """softmax_cross_entropy of logits resized to the size of the labels.

  Uses less memory than resizing first: neither the full-size logits nor their
  gradients are ever materialized. One part of the rows at a time is resized (as
  by models.resizing.resize), and resized again in the backward pass. The result
  is the same up to rounding.

  >>> logits, labels = jnp.zeros((1, 2, 2, 4)), jnp.full((1, 8, 8), 3)
  >>> float(upsampled_cross_entropy(logits, labels, parts=2).value)
  1.386294...

  Args:
    logits: at a lower resolution than the labels.
    labels: class indices or `ignore_label`.
    parts: number of parts; more parts use less memory.
    precision: of the matrix products that resize, see jax.lax.Precision.
    ignore_label: label of the pixels to leave out.
  """
  logits, labels = _float(logits), jnp.asarray(labels)
  _, h, w, _ = logits.shape
  b, height, width = labels.shape
  rows = -(-height // parts)
  padding = parts * rows - height
  down = jnp.pad(resizing.matrix(height, h), ((0, padding), (0, 0)))
  down = down.astype(logits.dtype).reshape(parts, rows, h)
  across = resizing.matrix(width, w).astype(logits.dtype)
  labels = jnp.pad(
    labels, ((0, 0), (0, padding), (0, 0)), constant_values=ignore_label
  )
  labels = jnp.moveaxis(labels.reshape(b, parts, rows, width), 1, 0)

  @jax.checkpoint
  def add_part(sums, part):
    down, labels = part
    resized = jnp.einsum(
      'Hh,bhwk,Ww->bHWk', down, logits, across, precision=precision
    )
    mean = softmax_cross_entropy(resized, labels, ignore_label=ignore_label)
    return jax.tree.map(jnp.add, sums, mean), None

  zero = jnp.zeros((), logits.dtype)
  return jax.lax.scan(add_part, Mean(zero, zero), (down, labels))[0]


def ohem_cross_entropy(
  logits: Logits,
  labels: Labels,
  *,
  threshold: float = 0.7,
  min_kept: float = 1 / 16,
  class_weights: ClassWeights = None,
  ignore_label: int = IGNORE_LABEL,
) -> Mean:
  """Online hard example mining: cross-entropy over the hard pixels only.

  A pixel is hard if its label has a probability of at most `threshold`. If
  fewer than the fraction `min_kept` of the labeled pixels are hard, the hardest
  ones up to that fraction are used, and at least one. The selection is over the
  whole batch, on any number of devices; with gradient accumulation, over each
  part. Shrivastava et al., arXiv 1604.03540, applied to pixels.

  >>> logits = jnp.array([4.0, 0.0, 0.0, 4.0]).reshape(1, 1, 2, 2)
  >>> labels = jnp.zeros((1, 1, 2), int)  # Only the second pixel is wrong.
  >>> float(ohem_cross_entropy(logits, labels).value)
  4.018149...

  Args:
    logits: see softmax_cross_entropy.
    labels: see softmax_cross_entropy.
    threshold: a probability in (0, 1]; 1 gives the plain cross-entropy.
    min_kept: a fraction in [0, 1].
    class_weights: weights in the mean; they do not affect the selection.
    ignore_label: label of the pixels to leave out.
  """
  losses, labeled = _pixel_losses(logits, labels, ignore_label, class_weights)
  hardness = jax.lax.stop_gradient(losses)
  ordered = jnp.sort(jnp.where(labeled, hardness, -1).ravel(), descending=True)
  kept = jnp.ceil(min_kept * jnp.sum(labeled, dtype=losses.dtype))
  last = jnp.maximum(kept.astype(jnp.int32) - 1, 0)
  cutoff = jnp.minimum(-math.log(threshold), ordered[last])
  hard = labeled & (hardness >= cutoff)
  return _weighted_mean(losses, labels, hard, class_weights)


def focal_loss(
  logits: Logits,
  labels: Labels,
  *,
  gamma: float = 2.0,
  class_weights: ClassWeights = None,
  ignore_label: int = IGNORE_LABEL,
) -> Mean:
  """Mean of (1 - p)^gamma times the cross-entropy, p the label's probability.

  Lin et al., arXiv 1708.02002, for each pixel; the authors' --loss-type=focal
  scales the mean over all pixels instead (METHOD 4.4).

  >>> logits, labels = jnp.zeros((1, 2, 2, 4)), jnp.full((1, 2, 2), 3)
  >>> float(focal_loss(logits, labels, gamma=2.0).value)  # 0.75^2 log(4)
  0.779790...

  Args:
    logits: see softmax_cross_entropy.
    labels: see softmax_cross_entropy.
    gamma: at least 0, which gives the cross-entropy.
    class_weights: the paper's alpha.
    ignore_label: label of the pixels to leave out.
  """
  losses, labeled = _pixel_losses(logits, labels, ignore_label, class_weights)
  # expm1 avoids cancellation; powers below 1 have no derivative at 0.
  wrong = jnp.maximum(-jnp.expm1(-losses), 1e-6)
  return _weighted_mean(wrong**gamma * losses, labels, labeled, class_weights)


def dice_loss(
  logits: Logits, labels: Labels, *, ignore_label: int = IGNORE_LABEL
) -> Mean:
  """One minus the soft Dice coefficient, averaged over the classes present.

  The Dice coefficient of a class is 2 sum(p y) / (sum(p) + sum(y)), summed over
  the labeled pixels of the batch (with gradient accumulation, of each part),
  where p is the probability of the class and y is 1 where it is the label.
  Every class has the same weight, whatever its area. The count of the Mean is
  the number of classes. Milletari et al., arXiv 1606.04797, without squares.

  >>> logits = jnp.array([9.0, -9.0]).reshape(1, 1, 1, 2)
  >>> round(float(dice_loss(logits, jnp.array([[[1]]])).value), 6)
  1.0

  Args:
    logits: see softmax_cross_entropy.
    labels: see softmax_cross_entropy.
    ignore_label: label of the pixels to leave out.
  """
  _check_shapes(logits, labels)
  labels = jnp.asarray(labels)
  labeled = labels != ignore_label
  p = jax.nn.softmax(_float(logits))
  # All zeros where the label is ignored.
  target = jax.nn.one_hot(
    jnp.where(labeled, labels.astype(jnp.int32), -1), p.shape[-1], dtype=p.dtype
  )
  pixels = tuple(range(labels.ndim))
  overlap, area = jnp.sum(p * target, pixels), jnp.sum(target, pixels)
  sizes = jnp.sum(p, pixels, where=labeled[..., None]) + area
  present = area > 0
  dice = 2 * overlap / jnp.where(present, sizes, 1)
  total = jnp.sum(1 - dice, where=present)
  return Mean(total, jnp.sum(present, dtype=p.dtype))
