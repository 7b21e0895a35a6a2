# SPDX-License-Identifier: Apache-2.0
"""Builds batches with Grain.

Batches are a pure function of seed and step, whatever the number of threads and
workers, so a run resumes from its step alone, without iterator state.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import sys
from typing import Any

from absl import flags
import grain
import jax
import numpy as np

from attnfd_jax.data import frequencies, masks, subsets, transforms
from attnfd_jax.data.pairs import Dataset, UNLABELED
from attnfd_jax.data.records import Record, Size, Source
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.types import Config


def _iterate(
  dataset: grain.MapDataset, threads: int, workers: int = 0
) -> grain.IterDataset:
  """Reads ahead, in threads of this process or of several workers."""
  # Grain's default keeps 500 batches in memory.
  ahead = max(2, threads)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  batches = dataset.to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain reads a flag; grain issue 1355.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    batches = batches.mp_prefetch(options, masks.tune_process)
  return batches


def _share(batch_size: int) -> tuple[slice, int]:
  """Which local batches this process reads, and how many records each has."""
  process, count = jax.process_index(), jax.process_count()
  if batch_size % count:
    raise ValueError(f'{batch_size=} must be a multiple of {count} processes.')
  return slice(process, None, count), batch_size // count


class _Rows(grain.transforms.DatasetSelectionMap):
  """Selects which rows of each batch are unlabeled; the same in all batches.

  All parts of a batch, contiguous or every n-th row, have the same number of
  unlabeled rows, up to one.
  """

  def __init__(self, batch_size: int, unlabeled: int):
    # Multiples of the golden ratio modulo 1 are spread evenly in any such part.
    order = np.argsort(np.arange(batch_size) * ((5**0.5 - 1) / 2) % 1)
    kinds = np.zeros(batch_size, int)  # 0 is labeled, 1 unlabeled.
    kinds[order[:unlabeled]] = 1
    self._counts = batch_size - unlabeled, unlabeled
    ranks = [np.cumsum(kinds == i) - 1 for i in (0, 1)]
    self._rows = [(int(k), int(ranks[k][i])) for i, k in enumerate(kinds)]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    batch, row = divmod(index, len(self._rows))
    kind, rank = self._rows[row]
    return kind, batch * self._counts[kind] + rank


def train_batches(
  source: Source | Sequence[Any],
  augment: grain.transforms.RandomMap | Callable[..., Any],
  *,
  batch_size: int,
  seed: int,
  step: int = 0,
  balance: grain.transforms.RandomMap | None = None,
  unlabeled: Source | Sequence[Any] | None = None,
  unlabeled_rows: int = 0,
  threads: int = 4,
  workers: int = 0,
) -> grain.IterDataset:
  """Creates an endless grain.IterDataset of batches for training.

  Args:
    source: labeled records.
    augment: random map of a record, to records of one size.
    batch_size: over all processes, each of which gets an equal share.
    seed: of the order and of the augmentation.
    step: global step of the first batch.
    balance: random map of an index of the source, see frequencies.Balance.
    unlabeled: records without labels.
    unlabeled_rows: how many rows of a batch are from `unlabeled`.
    threads: number of threads, of this process or of each worker.
    workers: number of worker processes, for transforms that hold Python's
      global interpreter lock; 0 for none.
  """
  share, size = _share(batch_size)
  if balance is None:
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
  else:
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    dataset = dataset.random_map(balance).map(source.__getitem__)
  # Processes take their share after the random maps: else all would draw the
  # same numbers. Consecutive shares go to consecutive processes: so row i of a
  # batch does not depend on the number of processes.
  dataset = dataset.random_map(augment).repeat()
  if unlabeled_rows:
    assert unlabeled is not None
    # Another seed for their order and their augmentation.
    others = grain.MapDataset.source(unlabeled).seed(seed + 2**31).shuffle()
    dataset = grain.MapDataset.select_from_datasets(
      [dataset, others.random_map(augment).repeat()],
      _Rows(batch_size, unlabeled_rows),
    )
  dataset = dataset.batch(size, drop_remainder=True)[share]
  return _iterate(dataset[step:], threads, workers)


def make_augment(config: Config) -> transforms.Augment:
  """Creates the Augment of a resolved config."""
  data = config.data
  keys = ('base_size', 'flip', 'blur', 'photometric', 'rotation')
  options = {key: data[key] for key in keys}
  options |= {key: tuple(data[key]) for key in ('crop_size', 'scale_range')}
  fill = 0 if data.label_pad == 'background' else IGNORE_LABEL
  return transforms.Augment(label_fill=fill, **options)


def make_balance(
  config: Config, dataset: Dataset
) -> frequencies.Balance | None:
  """Creates the Balance of a resolved config for the split train, if any."""
  if not config.data.balanced:
    return None
  presence = frequencies.class_presence(
    dataset.splits['train'], dataset.num_classes, threads=config.data.threads
  )
  return frequencies.Balance(config.data.balanced, presence)


def count_unlabeled_rows(config: Config, dataset: Dataset) -> int:
  """Number of unlabeled images in a batch of a resolved config."""
  labeled, unlabeled = (
    len(dataset.splits.get(x, ())) for x in ('train', UNLABELED)
  )
  return subsets.unlabeled_rows(
    config.batch_size,
    labeled=labeled,
    unlabeled=unlabeled,
    share=config.data.unlabeled_share,
  )


def _order(config: Config, dataset: Dataset, step: int) -> dict[str, Any]:
  """Options of train_batches that decide the order of the images."""
  return {
    'batch_size': config.batch_size,
    'seed': config.seed,
    'step': step,
    'balance': make_balance(config, dataset),
    'unlabeled_rows': count_unlabeled_rows(config, dataset),
  }


def configured_batches(
  config: Config, dataset: Dataset, *, step: int = 0
) -> grain.IterDataset:
  """Calls `train_batches` with a resolved config and its data set."""
  return train_batches(
    dataset.splits['train'],
    make_augment(config),
    unlabeled=dataset.splits.get(UNLABELED),
    threads=config.data.threads,
    workers=config.data.workers,
    **_order(config, dataset, step),
  )


def batch_names(
  config: Config, dataset: Dataset, *, step: int = 0
) -> list[str]:
  """Names of the images that this process reads for the batch of a step.

  They are computed again, since their order is a function of seed and step.
  """
  source = dataset.splits['train']
  others: Any = dataset.splits.get(UNLABELED, ())
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
  source: Source,
  *,
  batch_size: int,
  short_side: int = 0,
  resize_labels: bool = False,
  size_multiple: int = 1,
  threads: int = 4,
) -> Iterator[Record]:
  """Iterates once over whole images; every pixel counts exactly once.

  A batch has images of one size, so there is one compilation for each size. The
  last batch of a size is filled up with images whose labels are all ignored.

  Args:
    source: records to evaluate.
    batch_size: over all processes, each of which gets an equal share.
    short_side: see transforms.fit_record.
    resize_labels: see transforms.fit_record.
    size_multiple: pads images and labels on the right and at the bottom to
      multiples of this, to have fewer sizes. Images repeat their edges; the
      padding of labels is ignored.
    threads: number of threads that read.
  """
  share, share_size = _share(batch_size)
  pixel = np.zeros((1, 1, 3), np.uint8)
  blank = {'image': pixel, 'label': pixel[..., 0] + IGNORE_LABEL}
  fit_record = functools.partial(
    transforms.fit_record, short_side=short_side, resize_labels=resize_labels
  )

  def read(entry: tuple[int | None, Size, Size]) -> Record:
    index, image_size, label_size = entry
    record = blank if index is None else fit_record(source[index])
    return {
      'image': transforms.pad_edges(record['image'], image_size),
      'label': transforms.pad_edges(record['label'], label_size, IGNORE_LABEL),
    }

  groups = collections.defaultdict(list)
  for index in range(len(source)):
    size = source.size(index)
    image_size = transforms.fit_short_side(size, short_side)
    sizes = (image_size, image_size if resize_labels else size)
    padded = (transforms.next_multiple(size, size_multiple) for size in sizes)
    groups[*padded].append(index)
  batches = []
  for sizes, indices in sorted(groups.items()):
    indices += [None] * (-len(indices) % batch_size)
    entries = [(index, *sizes) for index in indices[share]]
    dataset = grain.MapDataset.source(entries).map(read).batch(share_size)
    batches.append(_iterate(dataset, threads))
  return itertools.chain.from_iterable(batches)


def to_device(
  dataset: grain.IterDataset, sharding: jax.sharding.Sharding
) -> grain.IterDataset:
  """Puts batches on the devices ahead of their use."""
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  placed = dataset.map(functools.partial(jax.tree.map, put))
  prefetch = grain.experimental.ThreadPrefetchIterDataset
  return prefetch(placed, prefetch_buffer_size=2)
