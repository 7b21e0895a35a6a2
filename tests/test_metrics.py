# SPDX-License-Identifier: Apache-2.0
"""Confusion matrix and what is computed from it, against loops in NumPy."""

import json

import jax
import numpy as np
import pytest

from attnfd_jax import metrics

# Both sides are float64; they may sum in another order.
EXACT = {'rtol': 1e-12, 'atol': 1e-12}


def make(num_classes=19, dtype=np.uint8, seed=0):
  generator = np.random.default_rng(seed)
  shape = (2, 12, 15)
  labels = generator.integers(0, num_classes, shape)
  right = generator.random(shape) < 0.6
  predictions = generator.integers(0, num_classes, shape)
  predictions = np.where(right, labels, predictions)
  return predictions.astype(dtype), labels.astype(dtype)


def count_by_hand(predictions, labels, num_classes):
  counts = np.zeros((num_classes, num_classes), int)
  pairs = zip(labels.reshape(-1), predictions.reshape(-1), strict=True)
  for label, prediction in pairs:
    if 0 <= label < num_classes:
      counts[label, prediction] += 1
  return counts


def iou_by_hand(counts):
  values = []
  for i in range(len(counts)):
    union = counts[i].sum() + counts[:, i].sum() - counts[i, i]
    values.append(counts[i, i] / union if union else float('nan'))
  return np.array(values)


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.int32])
def test_counts_rows_of_labels(dtype):
  # In uint8, 14 * 19 + 0 would be 10.
  predictions, labels = make(dtype=dtype)
  actual = metrics.confusion_matrix(predictions, labels, num_classes=19)
  assert actual.dtype == np.int32
  np.testing.assert_array_equal(actual, count_by_hand(predictions, labels, 19))
  assert np.any(np.asarray(actual) != np.asarray(actual).T)


@pytest.mark.parametrize(
  ('outside', 'dtype'),
  [(255, np.uint8), (19, np.uint8), (-1, np.int32), (-19, np.int32), (99, int)],
  ids=['ignored', 'one_too_large', 'negative', 'negative19', 'large'],
)
def test_labels_out_of_range_never_count(outside, dtype):
  predictions, labels = make(dtype=dtype)
  counted = np.random.default_rng(1).random(labels.shape) < 0.5
  labels = np.where(counted, labels, outside).astype(dtype)
  actual = metrics.confusion_matrix(predictions, labels, num_classes=19)
  assert actual.sum() == counted.sum()
  expected = count_by_hand(predictions[counted], labels[counted], 19)
  np.testing.assert_array_equal(actual, expected)


def test_ignored_class_inside_the_range():
  predictions, labels = make(num_classes=4)
  actual = metrics.confusion_matrix(
    predictions, labels, num_classes=4, ignore_label=2
  )
  expected = count_by_hand(predictions, labels, 4)
  expected[2] = 0
  np.testing.assert_array_equal(actual, expected)


def test_batches_add_up_under_jit():
  predictions, labels = make()
  count = jax.jit(metrics.confusion_matrix, static_argnames='num_classes')
  parts = [
    count(p, y, num_classes=19)
    for p, y in zip(predictions, labels, strict=True)
  ]
  np.testing.assert_array_equal(
    sum(parts), count(predictions, labels, num_classes=19)
  )


def test_shapes_must_be_equal():
  with pytest.raises(ValueError, match=r'\(2, 3\).*\(2, 4\)'):
    metrics.confusion_matrix(
      np.zeros((2, 3), int), np.zeros((2, 4), int), num_classes=2
    )


@pytest.mark.parametrize('absent', [(), (3,), (0, 18)], ids=str)
def test_values_equal_the_formulas(absent):
  predictions, labels = make(seed=3)
  counts = count_by_hand(predictions, labels, 19)
  counts[list(absent)] = 0
  counts[:, list(absent)] = 0
  iou = iou_by_hand(counts)
  actual = metrics.iou_per_class(counts)
  assert np.isnan(actual).nonzero()[0].tolist() == list(absent)
  np.testing.assert_allclose(actual, iou, **EXACT)
  np.testing.assert_allclose(metrics.mean_iou(counts), np.nanmean(iou), **EXACT)
  rows, hits = counts.sum(1), np.diag(counts)
  np.testing.assert_allclose(
    metrics.pixel_accuracy(counts), hits.sum() / counts.sum(), **EXACT
  )
  seen = rows > 0
  np.testing.assert_allclose(
    metrics.class_accuracy(counts), (hits[seen] / rows[seen]).mean(), **EXACT
  )
  weights = rows / counts.sum()
  np.testing.assert_allclose(
    metrics.frequency_weighted_iou(counts),
    sum(weights[i] * iou[i] for i in range(19) if seen[i]),
    **EXACT,
  )


def test_a_class_that_is_only_predicted_counts_as_zero():
  # Three pixels of class 0, one of them taken for class 1; no class 2.
  counts = np.array([[2, 1, 0], [0, 0, 0], [0, 0, 0]])
  iou = metrics.iou_per_class(counts)
  np.testing.assert_allclose(iou, [2 / 3, 0, np.nan], **EXACT)
  np.testing.assert_allclose(metrics.mean_iou(counts), 1 / 3, **EXACT)
  np.testing.assert_allclose(metrics.class_accuracy(counts), 2 / 3, **EXACT)


def test_permuted_classes_permute_iou():
  predictions, labels = make()
  order = np.random.default_rng(5).permutation(19)

  def run(predictions, labels):
    counts = metrics.confusion_matrix(predictions, labels, num_classes=19)
    return metrics.iou_per_class(counts)

  before, after = (
    run(predictions, labels),
    run(order[predictions], order[labels]),
  )
  np.testing.assert_array_equal(after[order], before)


def test_totals_beyond_int32():
  counts = np.array([[6_000_000_000, 1], [3, 3_000_000_000]], np.int64)
  np.testing.assert_allclose(
    metrics.pixel_accuracy(counts), 9e9 / (9e9 + 4), **EXACT
  )
  np.testing.assert_allclose(
    metrics.iou_per_class(counts), [6e9 / (6e9 + 4), 3e9 / (3e9 + 4)], **EXACT
  )


def test_summary_is_json():
  counts = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]], np.int32)
  summary = metrics.summarise(counts, ('road', 'car', 'sky'))
  # allow_nan=False: NaN is no JSON, an absent class is null.
  again = json.loads(json.dumps(summary, allow_nan=False))
  assert again == summary
  assert list(summary['iou_per_class']) == ['road', 'car', 'sky']
  assert summary['iou_per_class']['sky'] is None
  assert summary['miou'] == metrics.mean_iou(counts)
  np.testing.assert_allclose(summary['miou'], (3 / 6 + 4 / 7) / 2, **EXACT)
  np.testing.assert_allclose(summary['pixel_accuracy'], 7 / 10, **EXACT)
  np.testing.assert_allclose(
    summary['class_accuracy'], (3 / 4 + 4 / 6) / 2, **EXACT
  )
  np.testing.assert_allclose(
    summary['fw_iou'], 0.4 * 3 / 6 + 0.6 * 4 / 7, **EXACT
  )


def test_summary_needs_a_name_for_every_class():
  with pytest.raises(ValueError, match='zip'):
    metrics.summarise(np.eye(3), ('road', 'car'))


def test_without_pixels_nothing_is_known():
  counts = np.zeros((2, 2), np.int64)
  for metric in (
    metrics.mean_iou,
    metrics.pixel_accuracy,
    metrics.class_accuracy,
    metrics.frequency_weighted_iou,
  ):
    assert np.isnan(metric(counts)), metric.__name__
