# SPDX-License-Identifier: Apache-2.0
"""Confusion matrix and what is computed from it, against loops in NumPy."""

import functools
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


def test_pixels_beyond_int32_are_refused():
  count = functools.partial(metrics.confusion_matrix, num_classes=2)
  almost, many = (
    jax.ShapeDtypeStruct((n, 2**10, 2**10), np.uint8) for n in (2047, 2048)
  )
  # One cell can get all of them. Shapes alone: nothing is computed.
  assert jax.eval_shape(count, almost, almost).dtype == np.int32
  with pytest.raises(ValueError, match=r'\(2048, 1024, 1024\).*smaller batch'):
    jax.eval_shape(count, many, many)


@pytest.mark.parametrize('dtype', [np.uint8, np.int32])
@pytest.mark.parametrize('ignored', [255, 3], ids=['outside', 'a_class'])
def test_the_host_counts_the_same(dtype, ignored):
  predictions, labels = make(dtype=dtype)
  labels[0, :3] = 255 if dtype == np.uint8 else -1
  host, device = (
    count(predictions, labels, num_classes=19, ignore_label=ignored)
    for count in (metrics.host_confusion_matrix, metrics.confusion_matrix)
  )
  assert host.dtype == np.int64
  np.testing.assert_array_equal(host, device)


@pytest.mark.parametrize('dtype', [np.uint8, np.int32])
def test_the_host_needs_equal_shapes(no_type_checks, dtype):
  predictions, labels = make(dtype=dtype)
  with pytest.raises(ValueError, match='must equal'):
    metrics.host_confusion_matrix(predictions[1:], labels, num_classes=19)


def test_mean_iou_equals_that_of_sets():
  """Each class by its own masks over images of several sizes."""
  generator = np.random.default_rng(7)
  hits, unions, total = np.zeros(6), np.zeros(6), 0
  for size in ((11, 17), (30, 8), (1, 1)):
    # Class 4 is only predicted, 5 is absent.
    labels = generator.choice([0, 1, 2, 3, 255], size).astype(np.uint8)
    predictions = generator.integers(0, 5, size, np.uint8)
    total = total + metrics.confusion_matrix(predictions, labels, num_classes=6)
    for c in range(6):
      ours, theirs = predictions == c, labels == c
      ours &= labels != 255
      hits[c] += (ours & theirs).sum()
      unions[c] += (ours | theirs).sum()
  expected = np.mean(hits[:5] / unions[:5])
  np.testing.assert_allclose(metrics.mean_iou(total), expected, rtol=1e-9)
  assert metrics.iou_per_class(total)[4] == 0


@pytest.mark.torch
def test_mean_iou_equals_torchmetrics():
  torch = pytest.importorskip('torch')
  torchmetrics = pytest.importorskip('torchmetrics')
  predictions, labels = make(num_classes=19)
  labels[0, :3] = 255
  oracle = torchmetrics.JaccardIndex(
    task='multiclass', num_classes=19, ignore_index=255
  )
  theirs = oracle(
    *(torch.from_numpy(x.astype(np.int64)) for x in (predictions, labels))
  )
  counts = metrics.confusion_matrix(predictions, labels, num_classes=19)
  # Theirs is float32.
  np.testing.assert_allclose(metrics.mean_iou(counts), float(theirs), rtol=1e-6)


def band_by_hand(mask, reach):
  """Pixels of a mask within `reach` (largest of dy, dx) of a pixel outside of
  it; the outside of the image is one."""
  h, w = mask.shape
  found = np.zeros_like(mask)
  for y, x in zip(*np.nonzero(mask), strict=True):
    for dy in range(-reach, reach + 1):
      for dx in range(-reach, reach + 1):
        i, j = y + dy, x + dx
        inside = 0 <= i < h and 0 <= j < w
        if not inside or not mask[i, j]:
          found[y, x] = True
  return found


def blobs(seed, size, num_classes=4):
  """Rectangles of ids, uint8 [h, w]."""
  generator = np.random.default_rng(seed)
  ids = np.zeros(size, np.uint8)
  for _ in range(6):
    y, x = (generator.integers(0, n) for n in size)
    ids[y : y + 11, x : x + 9] = generator.integers(0, num_classes)
  return ids


@pytest.mark.parametrize('ratio', [0.001, 0.05, 0.1], ids=str)
def test_boundary_iou_equals_masks_minus_erosion(ratio):
  hits, unions, total = np.zeros(5), np.zeros(5), 0
  for seed, size in enumerate([(20, 31), (33, 14)]):
    labels, predictions = blobs(seed, size), blobs(seed + 9, size)
    predictions[: size[0] // 2] = labels[: size[0] // 2]
    labels[5:8, 3:9] = 255
    reach = max(1, int(round(ratio * (size[0] ** 2 + size[1] ** 2) ** 0.5)))
    total = total + metrics.boundary_matrix(
      predictions, labels, num_classes=5, ratio=ratio
    )
    for c in range(5):
      ours = band_by_hand((predictions == c) & (labels != 255), reach)
      theirs = band_by_hand(labels == c, reach)
      hits[c] += (ours & theirs).sum()
      unions[c] += (ours | theirs).sum()
  assert total.dtype == np.int64
  iou = metrics.boundary_iou_per_class(total)
  np.testing.assert_allclose(iou[:4], hits[:4] / unions[:4], **EXACT)
  assert np.all(unions[:4]) and np.isnan(iou[4])
  summary = metrics.summarize_boundary(total, tuple('abcde'))
  np.testing.assert_allclose(summary['boundary_miou'], iou[:4].mean(), **EXACT)
  assert summary['boundary_iou_per_class']['e'] is None


def test_a_wide_band_gives_plain_iou():
  predictions, labels = blobs(0, (20, 31)), blobs(1, (20, 31))
  labels[3:5] = 255
  wide = metrics.boundary_matrix(predictions, labels, num_classes=4, ratio=2.0)
  plain = metrics.host_confusion_matrix(predictions, labels, num_classes=4)
  np.testing.assert_array_equal(wide[:4, :4], plain)
  assert not wide[4].any() and not wide[:, 4].any()


def test_boundary_iou_sees_contours():
  """A square that is one pixel too large on every side."""
  labels, predictions = np.zeros((2, 64, 64), np.uint8)
  labels[16:48, 16:48] = 1
  predictions[15:49, 15:49] = 1
  counts = metrics.host_confusion_matrix(predictions, labels, num_classes=2)
  bands = metrics.boundary_matrix(predictions, labels, num_classes=2)
  # 2 % of 90.5 pixels: bands of 2; that of 34 x 34 covers one row of the other.
  ring = [34**2 - 30**2, 32**2 - 28**2]
  both = 32**2 - 30**2
  np.testing.assert_allclose(
    metrics.boundary_iou_per_class(bands)[1], both / (sum(ring) - both), **EXACT
  )
  assert metrics.iou_per_class(counts)[1] > 0.88


def test_classes_of_a_band_leave_room_for_one_more():
  with pytest.raises(ValueError, match='num_classes=255 must be below 255'):
    metrics.boundary_matrix(
      np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), num_classes=255
    )


def test_shapes_must_be_equal(no_type_checks):
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
  summary = metrics.summarize(counts, ('road', 'car', 'sky'))
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
  assert summary['accuracy_per_class'] == {
    'road': 3 / 4,
    'car': 4 / 6,
    'sky': None,
  }
  np.testing.assert_allclose(
    summary['fw_iou'], 0.4 * 3 / 6 + 0.6 * 4 / 7, **EXACT
  )


def test_summary_needs_a_name_for_every_class():
  with pytest.raises(ValueError, match='zip'):
    metrics.summarize(np.eye(3), ('road', 'car'))


def test_without_pixels_nothing_is_known():
  counts = np.zeros((2, 2), np.int64)
  for metric in (
    metrics.mean_iou,
    metrics.pixel_accuracy,
    metrics.class_accuracy,
    metrics.frequency_weighted_iou,
  ):
    assert np.isnan(metric(counts)), metric.__name__
