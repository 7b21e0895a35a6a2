# SPDX-License-Identifier: Apache-2.0
"""Batches by Grain: a pure function of seed and step, whatever the workers.

So a run resumes by its step alone, without iterator state.
"""

import collections
import functools
import itertools
import sys

from absl import flags
import grain
import jax
import numpy as np

from attnfd_jax.data import frequencies, masks, subsets, transforms
from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.losses import IGNORE_LABEL


def _iterate(dataset, threads, workers=0):
  # Grain's default keeps 500 batches in memory.
  ahead = max(2, threads)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  dataset = dataset.to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain reads a flag; grain issue 1355.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options, masks.tune_process)
  return dataset


def _share(batch_size):
  """What this process reads: (slice of all shares, records of a batch)."""
  process, count = jax.process_index(), jax.process_count()
  if batch_size % count:
    raise ValueError(f'{batch_size=} must be a multiple of {count} processes.')
  return slice(process, None, count), batch_size // count


class _Rows(grain.transforms.DatasetSelectionMap):
  """Which rows of the batches are unlabeled: always the same ones, as many in
  each part of a batch, be it contiguous or every n-th row, up to one.
  """

  def __init__(self, batch_size, unlabeled):
    # Multiples of the golden ratio modulo 1 are spread evenly in any such part.
    order = np.argsort(np.arange(batch_size) * ((5**0.5 - 1) / 2) % 1)
    kind = np.zeros(batch_size, int)
    kind[order[:unlabeled]] = 1
    self._counts = batch_size - unlabeled, unlabeled
    before = [np.cumsum(kind == i) - 1 for i in (0, 1)]
    self._rows = [(int(k), int(before[k][i])) for i, k in enumerate(kind)]

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index):
    batch, row = divmod(index, len(self._rows))
    kind, place = self._rows[row]
    return kind, batch * self._counts[kind] + place


def train_batches(
  source,
  augment,
  *,
  batch_size,
  seed,
  step=0,
  balance=None,
  unlabeled=None,
  unlabeled_rows=0,
  threads=4,
  workers=0,
):
  """An endless grain.IterDataset of batches, from global step `step` on.

  `augment` is a grain RandomMap whose results have one size, `balance` one of
  indices, as frequencies.Balance. `batch_size` is over all processes, each of
  which gets its equal share; `threads` are of this process, or of each of the
  `workers`, processes for transforms that hold the interpreter lock. Of a
  batch, `unlabeled_rows` rows are of the source `unlabeled`.
  """
  share, size = _share(batch_size)
  if balance is None:
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
  else:
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    dataset = dataset.random_map(balance).map(source.__getitem__)
  # Shares are cut after the random maps, else all hosts draw the same numbers,
  # and one after the other: row i of a batch is the same on any number.
  dataset = dataset.random_map(augment).repeat()
  if unlabeled_rows:
    # Another order, and other numbers for the augmentation.
    others = grain.MapDataset.source(unlabeled).seed(seed + 2**31).shuffle()
    dataset = grain.MapDataset.select_from_datasets(
      [dataset, others.random_map(augment).repeat()],
      _Rows(batch_size, unlabeled_rows),
    )
  dataset = dataset.batch(size, drop_remainder=True)[share]
  return _iterate(dataset[step:], threads, workers)


def make_augment(config):
  """The Augment of a resolved config."""
  data = config.data
  same = ('base_size', 'flip', 'blur', 'photometric', 'rotation')
  options = {key: data[key] for key in same}
  options |= {key: tuple(data[key]) for key in ('crop_size', 'scale_range')}
  fill = 0 if data.label_pad == 'background' else IGNORE_LABEL
  return transforms.Augment(label_fill=fill, **options)


def make_balance(config, dataset):
  """The Balance of a resolved config for the split train, or None."""
  if not config.data.balanced:
    return None
  presence = frequencies.class_presence(
    dataset.splits['train'], dataset.num_classes, threads=config.data.threads
  )
  return frequencies.Balance(config.data.balanced, presence)


def count_unlabeled_rows(config, dataset):
  """Of a batch, as a resolved config and the splits have it."""
  labeled, unlabeled = (
    len(dataset.splits.get(x, ())) for x in ('train', UNLABELED)
  )
  return subsets.unlabeled_rows(
    config.batch_size,
    labeled=labeled,
    unlabeled=unlabeled,
    share=config.data.unlabeled_share,
  )


def _order(config, dataset, step):
  """The options of train_batches on which the order of the images depends."""
  return {
    'batch_size': config.batch_size,
    'seed': config.seed,
    'step': step,
    'balance': make_balance(config, dataset),
    'unlabeled_rows': count_unlabeled_rows(config, dataset),
  }


def configured_batches(config, dataset, *, step=0):
  """train_batches of what there is to train with, as a resolved config wants
  them.
  """
  return train_batches(
    dataset.splits['train'],
    make_augment(config),
    unlabeled=dataset.splits.get(UNLABELED),
    threads=config.data.threads,
    workers=config.data.workers,
    **_order(config, dataset, step),
  )


def batch_names(config, dataset, *, step=0):
  """Names of the images that this process reads after `step` batches."""
  # Their order is a function of seed and step: nothing needs to be kept.
  source, others = dataset.splits['train'], dataset.splits.get(UNLABELED, ())
  batches = train_batches(
    range(len(source)),
    lambda index, rng: index,
    unlabeled=range(len(source), len(source) + len(others)),
    threads=1,
    **_order(config, dataset, step),
  )
  return [
    source.name(i) if i < len(source) else others.name(i - len(source))
    for i in next(iter(batches)).tolist()
  ]


def eval_batches(
  source,
  *,
  batch_size,
  short_side=0,
  resize_labels=False,
  size_multiple=1,
  threads=4,
):
  """Iterates once over whole images; every pixel counts exactly once.

  Images of one size share batches, so there are as many compilations as sizes;
  the last batch of a size is filled with images whose labels are all ignored.
  `batch_size` is over all processes. Records are as transforms.fit_record makes
  them, padded right and bottom to multiples, to have fewer sizes: images repeat
  their edges, labels are ignored there.
  """
  share, share_size = _share(batch_size)
  pixel = np.zeros((1, 1, 3), np.uint8)
  blank = {'image': pixel, 'label': pixel[..., 0] + IGNORE_LABEL}
  options = {'short_side': short_side, 'resize_labels': resize_labels}

  def read(entry):
    index, image_size, label_size = entry
    record = blank
    if index is not None:
      record = transforms.fit_record(source[index], **options)
    return {
      'image': transforms.pad_edges(record['image'], image_size),
      'label': transforms.pad_edges(record['label'], label_size, IGNORE_LABEL),
    }

  groups = collections.defaultdict(list)
  for index in range(len(source)):
    size = source.size(index)
    seen = transforms.fit_short_side(size, short_side)
    sizes = (seen, seen if resize_labels else size)
    padded = (transforms.next_multiple(size, size_multiple) for size in sizes)
    groups[*padded].append(index)
  batches = []
  for sizes, indices in sorted(groups.items()):
    indices += [None] * (-len(indices) % batch_size)
    entries = [(index, *sizes) for index in indices[share]]
    dataset = grain.MapDataset.source(entries).map(read).batch(share_size)
    batches.append(_iterate(dataset, threads))
  return itertools.chain.from_iterable(batches)


def to_device(dataset, sharding):
  """Puts the batches of a grain.IterDataset on devices ahead of their use."""
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  placed = dataset.map(functools.partial(jax.tree.map, put))
  prefetch = grain.experimental.ThreadPrefetchIterDataset
  return prefetch(placed, prefetch_buffer_size=2)
