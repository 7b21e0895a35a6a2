# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics from one confusion matrix over the whole data set."""

import jax.numpy as jnp
import numpy as np

from attnfd_jax.losses import IGNORE_LABEL


def confusion_matrix(
  predictions, labels, *, num_classes, ignore_label=IGNORE_LABEL
):
  """Counts pixels by (label, prediction), int32 [k, k]; jit-able, summable.

  Sum batches on the host in int64: a training set has more than 2^31 pixels.
  Labels outside [0, num_classes) do not count, so padding needs no mask, but
  wrong labels must be caught when data is read.

  Args:
    predictions: integers in [0, num_classes), any shape.
    labels: integers of the same shape.
    num_classes: k.
    ignore_label: label of the pixels that do not count.

  Raises:
    ValueError: if the shapes differ.
  """
  predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
  if predictions.shape != labels.shape:
    raise ValueError(f'{predictions.shape=} must equal {labels.shape=}.')
  # uint8 * 19 would wrap at 256.
  predictions = predictions.astype(jnp.int32)
  labels = labels.astype(jnp.int32)
  valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
  cell = jnp.where(valid, labels * num_classes + predictions, 0)
  counts = jnp.zeros(num_classes**2, jnp.int32)
  counts = counts.at[cell].add(valid.astype(jnp.int32))
  return counts.reshape(num_classes, num_classes)


def _divide(a, b):
  """a / b in float64, NaN where b is 0."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.divide(a, b, out=np.full(b.shape, np.nan), where=b > 0)


def iou_per_class(counts):
  """Intersection over union, float64 [k]; NaN for a class that is absent from
  labels and predictions.
  """
  counts = np.asarray(counts, np.float64)
  hits = np.diag(counts)
  return _divide(hits, counts.sum(0) + counts.sum(1) - hits)


def _nanmean(values):
  present = values[~np.isnan(values)]
  return float(present.mean()) if present.size else float('nan')


def mean_iou(counts):
  """Mean of `iou_per_class` over the classes that occur; NaN if none does."""
  return _nanmean(iou_per_class(counts))


def pixel_accuracy(counts):
  """Share of the counted pixels that are right; NaN if there are none."""
  counts = np.asarray(counts, np.float64)
  return float(_divide(np.trace(counts), counts.sum()))


def class_accuracy(counts):
  """Mean recall over the classes that occur in the labels."""
  counts = np.asarray(counts, np.float64)
  return _nanmean(_divide(np.diag(counts), counts.sum(1)))


def frequency_weighted_iou(counts):
  """Mean IoU weighted by the share of each class in the labels; NaN if there
  are no pixels.
  """
  counts = np.asarray(counts, np.float64)
  if not counts.sum():
    return float('nan')
  share = _divide(counts.sum(1), np.full(len(counts), counts.sum()))
  return float(np.sum(share * iou_per_class(counts), where=share > 0))


def summarise(counts, class_names):
  """The entries of result.json that come from `counts`; fractions, not %."""
  iou = iou_per_class(counts)
  return {
    'miou': mean_iou(counts),
    'pixel_accuracy': pixel_accuracy(counts),
    'class_accuracy': class_accuracy(counts),
    'fw_iou': frequency_weighted_iou(counts),
    'iou_per_class': {
      name: None if np.isnan(value) else float(value)
      for name, value in zip(class_names, iou, strict=True)
    },
  }
