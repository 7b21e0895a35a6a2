# SPDX-License-Identifier: Apache-2.0
"""Counts the classes of a source, to weight or to sample rare ones more."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import os
from typing import Any, TypeVar

import grain
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.data.records import Source
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress, write

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


def map_records(
  function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Iterator[_Result]:
  """Yields function(item) for each item, in order, computed in threads."""
  pool, pending = futures.ThreadPoolExecutor(threads), collections.deque()
  try:
    # Few calls are pending at a time, so that an error or Ctrl-C stops soon;
    # Executor.map would submit a call for every record first.
    for item in items:
      if len(pending) == 4 * threads:
        yield pending.popleft().result()
      pending.append(pool.submit(function, item))
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def count_label(label: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts the pixels of each class in a label.

  Returns:
    int64 [k + 1]; the last element counts all other pixels.
  """
  counts = np.bincount(label.ravel(), minlength=num_classes)
  others = counts[num_classes:].sum()
  return np.append(counts[:num_classes], others).astype(np.int64)


def _iterate_rows(
  source: Source,
  num_classes: int,
  threads: int,
  text: str | None,
  **options: Any,
) -> Iterable[np.ndarray]:
  """Yields `count_label` of each record, with a progress bar."""
  # Not decoding the images is several times faster.
  read = getattr(source, 'label', None) or (lambda i: source[i]['label'])
  rows = map_records(
    lambda index: count_label(read(index), num_classes),
    range(len(source)),
    threads,
  )
  return progress(len(source), text, iterable=rows, **options)


def count_labels(
  source: Source, num_classes: int, threads: int, text: str | None = None
) -> np.ndarray:
  """Counts the pixels of each class in each record.

  Args:
    source: each label is read once.
    num_classes: number of classes, k.
    threads: number of threads that read.
    text: what the progress bar says.

  Returns:
    int64 [n, k + 1], with a row from `count_label` for each record.
  """
  rows = [*_iterate_rows(source, num_classes, threads, text)]
  return np.array(rows, np.int64).reshape(-1, num_classes + 1)


def first_classes(
  source: Source, num_classes: int, threads: int, *, enough: int = 2
) -> set[int]:
  """Reads labels until they show `enough` different classes.

  Returns:
    Train ids of the classes seen. If there are fewer than `enough`, all labels
    were read.
  """
  classes = set()
  text = 'looking for labels'
  for row in _iterate_rows(source, num_classes, threads, text, delay=1):
    classes |= {*np.flatnonzero(row[:-1]).tolist()}
    if len(classes) >= enough:
      break
  return classes


def median_frequency_weights(rows: np.ndarray) -> np.ndarray:
  """Weight of each class, median(f) / f, from the result of `count_labels`.

  f is the number of pixels of a class over the number of all pixels in images
  that show it, ignored pixels included (Eigen and Fergus 2015, arXiv
  1411.4734). Absent classes are left out of the median and get weight 1.

  Returns:
    float64 [k].
  """
  counts, sizes = rows[:, :-1], rows.sum(1)
  present = counts.any(0)
  weights = np.ones(counts.shape[1])
  if present.any():
    frequency = counts.sum(0)[present] / (sizes @ (counts > 0))[present]
    weights[present] = np.median(frequency) / frequency
  return weights


class Balance(grain.transforms.RandomMap):
  """Replaces some indices by records drawn uniformly over the classes.

  A draw picks one of the classes that occur, then a record that shows it.

  Args:
    share: fraction of the indices to replace.
    presence: result of `class_presence`.
  """

  def __init__(self, share: float, presence: np.ndarray):
    self._share = share
    self._members = [np.flatnonzero(x) for x in presence.T if x.any()]

  # Grain calls it by position; its annotations lack the result.
  def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, index: int, rng: np.random.Generator
  ) -> int:
    """Returns the index itself or a drawn one; called by Grain."""
    if not self._members or rng.random() >= self._share:
      return index
    records = self._members[rng.integers(len(self._members))]
    return int(records[rng.integers(records.size)])


def class_presence(
  source: Source, num_classes: int, *, threads: int = 4
) -> np.ndarray:
  """Finds which classes each record shows; cached for data sets of files.

  Returns:
    bool [n, k].
  """
  path = None
  if fingerprint := getattr(source, 'fingerprint', None):
    try:
      folder = user_cache.made('presence')
      path = folder / f'{fingerprint()}-{num_classes}.npy'
      if path.exists():
        return np.load(path)
    except InputError as error:  # The cache is not writable.
      write(f'{error} Every run will count the classes again.')
  rows = count_labels(source, num_classes, threads, 'counting classes')
  presence = rows[:, :-1] > 0
  if path:
    temporary = path.with_name(f'.{os.getpid()}-{path.name}')
    np.save(temporary, presence)
    temporary.replace(path)
  return presence
