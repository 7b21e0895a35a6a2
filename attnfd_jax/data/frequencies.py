# SPDX-License-Identifier: Apache-2.0
"""How often classes occur in a source; weights and draws against imbalance."""

import collections
from concurrent import futures
import os

import grain
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress, write


def map_records(function, indices, threads):
  """Yields function(index) for all indices, in order, by some threads."""
  pool, pending = futures.ThreadPoolExecutor(threads), collections.deque()
  try:
    # Few at a time: an error or Ctrl-C leaves little behind, and Executor.map
    # would make an object for each record of the data set first.
    for index in indices:
      if len(pending) == 4 * threads:
        yield pending.popleft().result()
      pending.append(pool.submit(function, index))
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def count_label(label, num_classes):
  """Pixels of each class and, last, of all others in [h, w], int64 [k + 1]."""
  counts = np.bincount(label.ravel(), minlength=num_classes)
  rest = counts[num_classes:].sum()
  return np.append(counts[:num_classes], rest).astype(np.int64)


def _iterate_rows(source, num_classes, threads, text, **options):
  # Without their images where the source can: several times as fast.
  read = getattr(source, 'label', None) or (lambda i: source[i]['label'])
  rows = map_records(
    lambda index: count_label(read(index), num_classes),
    range(len(source)),
    threads,
  )
  return progress(len(source), text, iterable=rows, **options)


def count_labels(source, num_classes, threads, text=None):
  """`count_label` of all records, int64 [n, k + 1]; each label is read once."""
  rows = [*_iterate_rows(source, num_classes, threads, text)]
  return np.array(rows, np.int64).reshape(-1, num_classes + 1)


def first_classes(source, num_classes, threads, *, enough=2):
  """Train ids that occur in the labels, which are read until there are enough;
  all of them only if there are fewer.
  """
  found = set()
  text = 'looking for labels'
  for row in _iterate_rows(source, num_classes, threads, text, delay=1):
    found |= {*np.flatnonzero(row[:-1]).tolist()}
    if len(found) >= enough:
      break
  return found


def median_frequency_weights(rows):
  """Weights median(f) / f of the classes, float64 [k]; see `count_labels`.

  f is the share of a class in the images in which it occurs (Eigen and Fergus
  2015, arXiv 1411.4734), with ignored pixels in the whole. Absent classes take
  no part in the median and get weight 1.
  """
  counts, sizes = rows[:, :-1], rows.sum(1)
  present = counts.any(0)
  weights = np.ones(len(present))
  if present.any():
    share = counts.sum(0)[present] / (sizes @ (counts > 0))[present]
    weights[present] = np.median(share) / share
  return weights


class Balance(grain.transforms.RandomMap):
  """Replaces a share of the indices by draws that balance classes.

  A draw picks a class that occurs, then a record by its `class_presence`.
  """

  def __init__(self, share, presence):
    self._share = share
    self._members = [np.flatnonzero(x) for x in presence.T if x.any()]

  def random_map(self, index, rng):
    if not self._members or rng.random() >= self._share:
      return index
    records = self._members[rng.integers(len(self._members))]
    return int(records[rng.integers(records.size)])


def class_presence(source, num_classes, *, threads=4):
  """Whether record n shows class k, bool [n, k]; of files kept in a cache."""
  path = None
  if hasattr(source, 'fingerprint'):
    try:
      folder = user_cache.made('presence')
      path = folder / f'{source.fingerprint()}-{num_classes}.npy'
      if path.exists():
        return np.load(path)
    except InputError as error:  # A cache that cannot be written.
      write(f'{error} Each start counts the classes again.')
  rows = count_labels(source, num_classes, threads, 'counting classes')
  presence = rows[:, :-1] > 0
  if path:
    temporary = path.with_name(f'.{os.getpid()}-{path.name}')
    np.save(temporary, presence)
    temporary.replace(path)
  return presence
