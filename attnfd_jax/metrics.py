# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics from one confusion matrix over the whole data set."""

import math

import jax.numpy as jnp
import numpy as np

from attnfd_jax.losses import IGNORE_LABEL


def confusion_matrix(
  predictions, labels, *, num_classes, ignore_label=IGNORE_LABEL
):
  """Counts pixels by (label, prediction), int32 [k, k]; jit-able, summable.

  Predictions in [0, k) and labels are integers of one shape, k is num_classes.
  Sum batches on the host in int64: a training set has more than 2^31 pixels.
  Labels outside [0, k), or equal to `ignore_label`, do not count: padding needs
  no mask, but wrong labels must be caught when data is read.

  Raises:
    ValueError: if the shapes differ, or there are so many pixels that a count
      could exceed int32.
  """
  predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
  if predictions.shape != labels.shape:
    raise ValueError(f'{predictions.shape=} must equal {labels.shape=}.')
  if labels.size >= 2**31:
    raise ValueError(f'{labels.shape=} overflows int32; use smaller batches.')
  # uint8 * 19 would wrap at 256.
  predictions, labels = predictions.astype(jnp.int32), labels.astype(jnp.int32)
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  cell = jnp.where(valid, labels * num_classes + predictions, 0)
  counts = jnp.zeros(num_classes**2, jnp.int32)
  counts = counts.at[cell].add(valid.astype(jnp.int32))
  return counts.reshape(num_classes, num_classes)


def host_confusion_matrix(
  predictions, labels, *, num_classes, ignore_label=IGNORE_LABEL
):
  """As `confusion_matrix`, of NumPy arrays of any size, int64 [k, k]."""
  if predictions.shape != labels.shape:
    raise ValueError(f'{predictions.shape=} must equal {labels.shape=}.')
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  # Types that cannot wrap, and only for the pixels that count.
  cell = labels[valid].astype(np.intp) * num_classes + predictions[valid]
  counts = np.bincount(cell, minlength=num_classes**2).astype(np.int64)
  return counts.reshape(num_classes, num_classes)


def boundary_matrix(
  predictions, labels, *, num_classes, ratio=0.02, ignore_label=IGNORE_LABEL
):
  """What boundary IoU of one image needs, int64 [k + 1, k + 1]; summable.

  A confusion matrix of the bands along the inner side of all contours; row and
  column k are the pixels outside of the band of the labels, or of the
  predictions. `boundary_iou_per_class` of the sum over all images is Cheng et
  al., arXiv 2103.16562, equation 1, with its counts over the whole set.

  Pixels whose label is ignored belong to no mask of either side; like the
  border of the image, and as in the paper's code, they bound a mask.

  Args:
    predictions, labels: uint8 [h, w].
    num_classes: k, below 255.
    ratio: width of the band, of the image's diagonal.
    ignore_label: label of the pixels that do not count.
  """
  import cv2  # Slow to load, and `import attnfd_jax` needs this module.

  if num_classes >= IGNORE_LABEL:
    raise ValueError(f'{num_classes=} must be below {IGNORE_LABEL}.')
  reach = max(round(ratio * math.hypot(*labels.shape)), 1)
  valid = (labels != ignore_label) & (labels < num_classes)
  square = np.ones((2 * reach + 1,) * 2, np.uint8)
  border = {'borderType': cv2.BORDER_CONSTANT, 'borderValue': IGNORE_LABEL}

  def banded(ids):
    ids = np.where(valid, ids, IGNORE_LABEL).astype(np.uint8)
    # For every id at once its mask after erosion: all ids of a square are the
    # same. Of the two only the larger sees the border, which is no id.
    least, most = (f(ids, square, **border) for f in (cv2.erode, cv2.dilate))
    return np.where(valid & (least == most), np.uint8(num_classes), ids)

  bands = banded(predictions), banded(labels)
  return host_confusion_matrix(*bands, num_classes=num_classes + 1)


def _divide(a, b):
  """a / b in float64, NaN where b is 0."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.divide(a, b, out=np.full(b.shape, np.nan), where=b > 0)


def _sums(counts):
  """Pixels of each class in float64: hits, of the label, of the prediction."""
  counts = np.asarray(counts, np.float64)
  return np.diag(counts), counts.sum(1), counts.sum(0)


def iou_per_class(counts):
  """Intersection over union, float64 [k]; NaN for a class that never occurs."""
  hits, labeled, predicted = _sums(counts)
  return _divide(hits, predicted + labeled - hits)


def boundary_iou_per_class(counts):
  """Of a sum of `boundary_matrix`, float64 [k]; NaN for an absent class."""
  return iou_per_class(counts)[:-1]


def accuracy_per_class(counts):
  """Share of labeled pixels that is found, float64 [k]; NaN for no pixels."""
  hits, labeled, _ = _sums(counts)
  return _divide(hits, labeled)


def _nanmean(values):
  present = values[~np.isnan(values)]
  return float(present.mean()) if present.size else float('nan')


def mean_iou(counts):
  """Mean of `iou_per_class` over the classes that occur; NaN if none does."""
  return _nanmean(iou_per_class(counts))


def pixel_accuracy(counts):
  """Share of the counted pixels that are right; NaN if there are none."""
  hits, labeled, _ = _sums(counts)
  return float(_divide(hits.sum(), labeled.sum()))


def class_accuracy(counts):
  """Mean recall over the classes that occur in the labels."""
  return _nanmean(accuracy_per_class(counts))


def frequency_weighted_iou(counts):
  """Mean IoU weighted by the share of each class in the labels, or NaN."""
  _, labeled, _ = _sums(counts)
  if not labeled.any():
    return float('nan')
  share = labeled / labeled.sum()
  return float(np.sum(share * iou_per_class(counts), where=share > 0))


def _by_name(values, class_names):
  return {
    name: None if np.isnan(value) else float(value)
    for name, value in zip(class_names, values, strict=True)
  }


def summarise(counts, class_names):
  """The entries of result.json that come from `counts`; fractions, not %."""
  return {
    'miou': mean_iou(counts),
    'pixel_accuracy': pixel_accuracy(counts),
    'class_accuracy': class_accuracy(counts),
    'fw_iou': frequency_weighted_iou(counts),
    'iou_per_class': _by_name(iou_per_class(counts), class_names),
    'accuracy_per_class': _by_name(accuracy_per_class(counts), class_names),
  }


def summarise_boundary(counts, class_names):
  """Entries for a sum of `boundary_matrix`."""
  iou = boundary_iou_per_class(counts)
  return {
    'boundary_miou': _nanmean(iou),
    'boundary_iou_per_class': _by_name(iou, class_names),
  }
