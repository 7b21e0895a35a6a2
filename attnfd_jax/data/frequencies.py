# SPDX-License-Identifier: Apache-2.0
"""How often the classes occur in a source, and weights against imbalance."""

import collections
from concurrent import futures
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClassCounts:
  """What some labels hold, all int64 [k], or int.

  Attributes:
    pixels: of each class.
    present_images: images in which the class occurs.
    present_pixels: of those images, ignored ones included.
    num_images, num_pixels: of all images; pixels include ignored ones.
  """

  pixels: np.ndarray
  present_images: np.ndarray
  present_pixels: np.ndarray
  num_images: int
  num_pixels: int


def count_label(label, num_classes):
  """Pixels of each class and, last, of everything else, int64 [k + 1].

  Args:
    label: uint8 [h, w] of train ids, 255 = ignored.
    num_classes: k.
  """
  counts = np.bincount(label.ravel(), minlength=num_classes)
  rest = counts[num_classes:].sum()
  return np.append(counts[:num_classes], rest).astype(np.int64)


def read_label(source, index):
  """uint8 [h, w] of a record; without its image where the source can."""
  if hasattr(source, 'label'):  # Several times as fast.
    return source.label(index)
  return source[index]['label']


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


def map_records(function, source, threads, *, on_record=None):
  """[function(0), ...] for each index of a source, in parallel and in order.

  Args:
    function: of an index; its results are all kept, so they should be small.
    source: anything with a length.
    threads: number of them; decoders release the GIL.
    on_record: called without arguments after each, in the caller's thread.
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
    for index in range(len(source)):
      if len(pending) == 4 * threads:
        take()
      pending.append(pool.submit(function, index))
    while pending:
      take()
  finally:
    pool.shutdown(cancel_futures=True)
  return results


def count_classes(source, num_classes, threads, *, on_record=None):
  """ClassCounts of all labels of a source; each is read once.

  Args:
    source: see `read_label`; 255 is ignored.
    num_classes: k.
    threads, on_record: see `map_records`.
  """

  def count(index):
    return count_label(read_label(source, index), num_classes)

  rows = map_records(count, source, threads, on_record=on_record)
  return sum_counts(rows, num_classes)


def median_frequency_weights(pixels, present_pixels):
  """Weights median(f) / f of the classes, float64 [k].

  f is the share of a class in the images in which it occurs (Eigen and Fergus
  2015, arXiv 1411.4734), with ignored pixels in the whole. Absent classes take
  no part in the median and get weight 1.

  Args:
    pixels: [k], of each class.
    present_pixels: [k], of the images with the class, as in ClassCounts.
  """
  pixels = np.asarray(pixels, np.float64)
  present_pixels = np.asarray(present_pixels, np.float64)
  present = pixels > 0
  weights = np.ones(len(pixels))
  if present.any():
    share = pixels[present] / present_pixels[present]
    weights[present] = np.median(share) / share
  return weights
