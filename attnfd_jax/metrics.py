# SPDX-License-Identifier: Apache-2.0
"""Computes segmentation metrics from a confusion matrix of the whole data set.

All metrics are fractions, not percent. All but the boundary IoU take the matrix
that `confusion_matrix` or `host_confusion_matrix` counts: rows are labels,
columns are predictions.
"""

from collections.abc import Sequence
import math
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float64, Int32, Int64, Integer, Real
import numpy as np

from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.types import AnyArray

Counts: TypeAlias = Real[AnyArray, 'k k']
_PerClass: TypeAlias = Float64[np.ndarray, ' k']


def confusion_matrix(
  predictions: Integer[AnyArray, '*pixels'],
  labels: Integer[AnyArray, '*pixels'],
  *,
  num_classes: int,
  ignore_label: int = IGNORE_LABEL,
) -> Int32[Array, 'k k']:
  """Counts the pixels of each label (row) and prediction (column).

  Works under jit. Add up the batches of a data set on the host in int64: a
  training set has more than 2^31 pixels.

  >>> predictions = jnp.array([0, 1, 1, 1])
  >>> labels = jnp.array([0, 0, 1, 255])  # The last pixel is ignored.
  >>> confusion_matrix(predictions, labels, num_classes=2).tolist()
  [[1, 1], [0, 1]]

  Args:
    predictions: class indices in [0, num_classes).
    labels: class indices. Pixels with other labels do not count, so padding
      needs no mask, but wrong labels must be detected when data is read.
    num_classes: number of classes.
    ignore_label: label of the pixels to leave out.

  Raises:
    ValueError: if the shapes differ, or there are so many pixels that a count
      could overflow int32.
  """
  predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
  if predictions.shape != labels.shape:
    raise ValueError(f'{predictions.shape=} must equal {labels.shape=}.')
  if labels.size >= 2**31:
    raise ValueError(f'{labels.shape=} overflows int32; use smaller batches.')
  # In uint8, labels * num_classes would overflow.
  predictions, labels = predictions.astype(jnp.int32), labels.astype(jnp.int32)
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  cell = jnp.where(valid, labels * num_classes + predictions, 0)
  counts = jnp.zeros(num_classes**2, jnp.int32)
  counts = counts.at[cell].add(valid.astype(jnp.int32))
  return counts.reshape(num_classes, num_classes)


def host_confusion_matrix(
  predictions: Integer[np.ndarray, '*pixels'],
  labels: Integer[np.ndarray, '*pixels'],
  *,
  num_classes: int,
  ignore_label: int = IGNORE_LABEL,
) -> Int64[np.ndarray, 'k k']:
  """Same as `confusion_matrix`, in NumPy and for any number of pixels.

  >>> predictions, labels = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 255])
  >>> host_confusion_matrix(predictions, labels, num_classes=2).tolist()
  [[1, 1], [0, 1]]
  """
  if predictions.shape != labels.shape:
    raise ValueError(f'{predictions.shape=} must equal {labels.shape=}.')
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  # In a dtype that cannot overflow, and only for the pixels that count.
  cell = labels[valid].astype(np.intp) * num_classes + predictions[valid]
  counts = np.bincount(cell, minlength=num_classes**2).astype(np.int64)
  return counts.reshape(num_classes, num_classes)


def boundary_matrix(
  predictions: Integer[np.ndarray, 'h w'],
  labels: Integer[np.ndarray, 'h w'],
  *,
  num_classes: int,
  ratio: float = 0.02,
  ignore_label: int = IGNORE_LABEL,
) -> Int64[np.ndarray, 'k_plus_1 k_plus_1']:
  """Counts the pixels near contours of one image, for the boundary IoU.

  A confusion matrix of the bands along the inner side of all contours. The last
  row has the pixels outside the bands of the labels, the last column those
  outside the bands of the predictions. Sum the matrices of all images and pass
  them to `boundary_iou_per_class`. Cheng et al., arXiv 2103.16562, equation 1,
  with counts over the whole data set.

  Pixels with `ignore_label` belong to no mask of either side. Like the border
  of the image, and as in the paper's code, they bound a mask.

  >>> labels = np.repeat(np.array([[0, 0, 0, 0, 1, 1, 1, 1]]), 8, axis=0)
  >>> predictions = np.repeat(np.array([[0, 0, 0, 0, 0, 1, 1, 1]]), 8, axis=0)
  >>> boundary_matrix(predictions, labels, num_classes=2).tolist()
  [[14, 0, 6], [8, 12, 0], [0, 6, 18]]

  Args:
    predictions: class indices of one image, not negative.
    labels: class indices of one image, not negative; those from num_classes on
      do not count.
    num_classes: number of classes, less than 255.
    ratio: width of the bands as a fraction of the image's diagonal.
    ignore_label: label of the pixels to leave out.

  Raises:
    ValueError: if there are too many classes.
  """
  import cv2  # Slow to load, and `import attnfd_jax` needs this module.

  if num_classes >= IGNORE_LABEL:
    raise ValueError(f'{num_classes=} must be below {IGNORE_LABEL}.')
  reach = max(round(ratio * math.hypot(*labels.shape)), 1)
  valid = (labels != ignore_label) & (labels < num_classes)
  square = np.ones((2 * reach + 1,) * 2, np.uint8)
  border: dict[str, Any] = {
    'borderType': cv2.BORDER_CONSTANT,
    'borderValue': IGNORE_LABEL,
  }

  def banded(ids):
    ids = np.where(valid, ids, IGNORE_LABEL).astype(np.uint8)
    # Erodes the masks of all ids at once: a pixel is inside if its square has a
    # single id. Outside the image, dilate sees IGNORE_LABEL and so a second id.
    least, most = (f(ids, square, **border) for f in (cv2.erode, cv2.dilate))
    return np.where(valid & (least == most), np.uint8(num_classes), ids)

  bands = banded(predictions), banded(labels)
  return host_confusion_matrix(*bands, num_classes=num_classes + 1)


def _divide(a: Any, b: Any) -> Float64[np.ndarray, '*dims']:
  """Divides in float64; NaN where b is 0."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.divide(a, b, out=np.full(b.shape, np.nan), where=b > 0)


def _sums(counts: Counts) -> tuple[_PerClass, _PerClass, _PerClass]:
  """Pixels of each class: correct ones, in the labels, in the predictions."""
  counts = np.asarray(counts, np.float64)
  return np.diag(counts), counts.sum(1), counts.sum(0)


def iou_per_class(counts: Counts) -> _PerClass:
  """Intersection over union of each class; NaN for a class that never occurs.

  >>> iou_per_class(np.array([[1, 1], [0, 4]])).tolist()
  [0.5, 0.8]
  """
  hits, labeled, predicted = _sums(counts)
  return _divide(hits, predicted + labeled - hits)


def boundary_iou_per_class(
  counts: Real[AnyArray, 'k_plus_1 k_plus_1'],
) -> _PerClass:
  """Boundary IoU of each class; NaN for a class that never occurs.

  >>> counts = np.array([[2, 0, 2], [0, 3, 0], [0, 1, 9]])
  >>> boundary_iou_per_class(counts).tolist()
  [0.5, 0.75]

  Args:
    counts: sum of `boundary_matrix` over images.
  """
  return iou_per_class(counts)[:-1]


def accuracy_per_class(counts: Counts) -> _PerClass:
  """Recall of each class; NaN for a class without labeled pixels.

  >>> accuracy_per_class(np.array([[1, 1], [0, 4]])).tolist()
  [0.5, 1.0]
  """
  hits, labeled, _ = _sums(counts)
  return _divide(hits, labeled)


def _nanmean(values: _PerClass) -> float:
  present = values[~np.isnan(values)]
  return float(present.mean()) if present.size else float('nan')


def mean_iou(counts: Counts) -> float:
  """Mean of `iou_per_class` over the classes that occur; NaN if none does.

  >>> mean_iou(np.array([[1, 1], [0, 4]]))
  0.65
  """
  return _nanmean(iou_per_class(counts))


def pixel_accuracy(counts: Counts) -> float:
  """Fraction of the counted pixels that are correct; NaN if there are none.

  >>> pixel_accuracy(np.array([[1, 1], [0, 4]]))
  0.833333...
  """
  hits, labeled, _ = _sums(counts)
  return float(_divide(hits.sum(), labeled.sum()))


def class_accuracy(counts: Counts) -> float:
  """Mean recall over the classes that occur in the labels; NaN if none does.

  >>> class_accuracy(np.array([[1, 1], [0, 4]]))
  0.75
  """
  return _nanmean(accuracy_per_class(counts))


def frequency_weighted_iou(counts: Counts) -> float:
  """Mean IoU weighted by the frequency of the labels; NaN without labels.

  >>> round(frequency_weighted_iou(np.array([[1, 1], [0, 4]])), 6)
  0.7
  """
  _, labeled, _ = _sums(counts)
  if not labeled.any():
    return float('nan')
  frequency = labeled / labeled.sum()
  return float(np.sum(frequency * iou_per_class(counts), where=frequency > 0))


def _by_name(
  values: _PerClass, class_names: Sequence[str]
) -> dict[str, float | None]:
  return {
    name: None if np.isnan(value) else float(value)
    for name, value in zip(class_names, values, strict=True)
  }


def summarize(counts: Counts, class_names: Sequence[str]) -> dict[str, Any]:
  """All metrics as in result.json: None for a class that never occurs.

  >>> summarize(np.array([[1, 1], [0, 4]]), ['road', 'car'])['iou_per_class']
  {'road': 0.5, 'car': 0.8}
  """
  return {
    'miou': mean_iou(counts),
    'pixel_accuracy': pixel_accuracy(counts),
    'class_accuracy': class_accuracy(counts),
    'fw_iou': frequency_weighted_iou(counts),
    'iou_per_class': _by_name(iou_per_class(counts), class_names),
    'accuracy_per_class': _by_name(accuracy_per_class(counts), class_names),
  }


def summarize_boundary(
  counts: Real[AnyArray, 'k_plus_1 k_plus_1'], class_names: Sequence[str]
) -> dict[str, Any]:
  """Boundary IoU as in result.json, from a sum of `boundary_matrix`.

  >>> counts = np.array([[2, 0, 2], [0, 3, 0], [0, 1, 9]])
  >>> summarize_boundary(counts, ['road', 'car'])['boundary_miou']
  0.625
  """
  iou = boundary_iou_per_class(counts)
  return {
    'boundary_miou': _nanmean(iou),
    'boundary_iou_per_class': _by_name(iou, class_names),
  }
