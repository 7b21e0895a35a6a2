# SPDX-License-Identifier: Apache-2.0
"""How often the classes occur in a source, and weights against imbalance."""

import collections
from concurrent import futures
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClassCounts:
  """What some labels hold; arrays are int64 [k]."""

  pixels: np.ndarray  # Of each class.
  present_images: np.ndarray  # In which the class occurs.
  present_pixels: np.ndarray  # Of those images, ignored ones included.
  num_images: int
  num_pixels: int  # Ignored ones included.


def count_label(label, num_classes):
  """Pixels of each class and, last, of all others in [h, w], int64 [k + 1]."""
  counts = np.bincount(label.ravel(), minlength=num_classes)
  rest = counts[num_classes:].sum()
  return np.append(counts[:num_classes], rest).astype(np.int64)


def sum_counts(rows, num_classes):
  """ClassCounts of the rows [n, k + 1] of `count_label`; n may be 0."""
  rows = np.asarray(rows, np.int64).reshape(-1, num_classes + 1)
  present, sizes = rows[:, :-1] > 0, rows.sum(1)
  return ClassCounts(
    pixels=rows[:, :-1].sum(0),
    present_images=present.sum(0),
    present_pixels=sizes @ present,
    num_images=len(rows),
    num_pixels=int(sizes.sum()),
  )


def map_records(function, indices, threads, *, on_record=None):
  """[function(index), ...] by some threads and in order.

  All results are kept, so they should be small. `on_record` is called without
  arguments after each, in the caller's thread.
  """
  results, pending = [], collections.deque()

  def take():
    results.append(pending.popleft().result())
    if on_record:
      on_record()

  pool = futures.ThreadPoolExecutor(threads)
  try:
    # Few at a time: an error or Ctrl-C leaves little behind, and Executor.map
    # would make an object for each record of the data set first.
    for index in indices:
      if len(pending) == 4 * threads:
        take()
      pending.append(pool.submit(function, index))
    while pending:
      take()
  finally:
    pool.shutdown(cancel_futures=True)
  return results


def count_labels(source, num_classes, threads, *, on_record=None):
  """`count_label` of all records, int64 [n, k + 1]; each label is read once."""
  # Without their images where the source can: several times as fast.
  read = getattr(source, 'label', None) or (lambda i: source[i]['label'])
  rows = map_records(
    lambda index: count_label(read(index), num_classes),
    range(len(source)),
    threads,
    on_record=on_record,
  )
  return np.reshape(rows, (-1, num_classes + 1))


def count_classes(source, num_classes, threads, *, on_record=None):
  """ClassCounts of all labels of a source; see `count_labels`."""
  rows = count_labels(source, num_classes, threads, on_record=on_record)
  return sum_counts(rows, num_classes)


def median_frequency_weights(pixels, present_pixels):
  """Weights median(f) / f of the classes, float64 [k], of [k] of ClassCounts.

  f is the share of a class in the images in which it occurs (Eigen and Fergus
  2015, arXiv 1411.4734), with ignored pixels in the whole. Absent classes take
  no part in the median and get weight 1.
  """
  pixels = np.asarray(pixels, np.float64)
  present_pixels = np.asarray(present_pixels, np.float64)
  present = pixels > 0
  weights = np.ones(len(pixels))
  if present.any():
    share = pixels[present] / present_pixels[present]
    weights[present] = np.median(share) / share
  return weights
