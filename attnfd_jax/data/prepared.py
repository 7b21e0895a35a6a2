# SPDX-License-Identifier: Apache-2.0
"""Writes and reads data sets as ArrayRecord shards of tensorflow-datasets.

All have the same features: images as encoded in their files, and labels as PNGs
of train ids. They are in the order of the files, so training from shards gives
the same batches as training from files. TensorFlow is not needed.
"""

from collections.abc import Iterable, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import cv2
import grain
import numpy as np

from attnfd_jax import paths
from attnfd_jax.data import classes, files, frequencies, masks, pairs
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

VERSION = '1.0.0'
SHARD_SIZE = 128  # Examples; an interruption loses at most one shard.


@functools.cache
def _tfds() -> Any:
  """The module tensorflow_datasets, which is slow to import."""
  import tensorflow_datasets

  tensorflow_datasets.disable_progress_bar()
  return tensorflow_datasets


def _features() -> Any:
  """Features of an example."""
  features = _tfds().features
  image = features.Image(shape=(None, None, 3))
  label = features.Image(shape=(None, None, 1), encoding_format='png')
  columns = {'id': features.Text(), 'image': image, 'label': label}
  return features.FeaturesDict(columns)


def _write_shard(
  source: pairs.PairSource,
  indices: Iterable[int],
  path: pathlib.Path,
  workers: int,
  bar: Any,
) -> None:
  """Writes records to `path`, which exists only once it is complete."""
  from array_record.python.array_record_module import ArrayRecordWriter

  features = _features()
  info = features.get_serialized_info()
  serializer = _tfds().core.example_serializer.ExampleSerializer(info)

  def serialize(i: int) -> bytes:
    example = {'id': source.key(i), **source.encoded(i)}
    example['label'] = cv2.imencode('.png', example['label'])[1].tobytes()
    return serializer.serialize_example(features.encode_example(example))

  with paths.replacing(path) as file:
    # Random access is fast only with group_size 1.
    writer = ArrayRecordWriter(file.name, 'group_size:1')
    with contextlib.closing(writer):
      for example in frequencies.map_records(serialize, indices, workers):
        writer.write(example)
        bar.update()


def _write_shards(
  dataset: pairs.Dataset, folder: pathlib.Path, workers: int
) -> dict[str, dict[pathlib.Path, int]]:
  """Writes the shards that `folder` does not contain yet.

  Returns:
    The number of records of each shard, by split and path. The path changes if
    the content does.
  """
  shards: dict[str, dict[pathlib.Path, int]] = {
    split: {} for split in dataset.splits
  }
  with progress(sum(map(len, dataset.splits.values())), dataset.name) as bar:
    for split in shards:
      source: Any = dataset.splits[split]  # A PairSource, see `prepare`.
      for start in range(0, len(source), SHARD_SIZE):
        indices = range(len(source))[start : start + SHARD_SIZE]
        content = source.fingerprint(start, indices.stop)
        path = folder / f'{split}-{VERSION}-{start}-{content}'
        shards[split][path] = len(indices)
        if path.exists():
          bar.update(len(indices))
        else:
          _write_shard(source, indices, path, workers, bar)
  return shards


def prepare(
  dataset: pairs.Dataset, target: pathlib.Path, *, workers: int
) -> tuple[pathlib.Path, dict[str, int]]:
  """Writes a data set to shards in <target>/<name>/<version>.

  A call that is interrupted, or that fails with a DataError, leaves its
  complete shards for the next call.

  Args:
    dataset: a data set of files.
    target: folder of prepared data sets.
    workers: number of threads.

  Returns:
    The folder of the shards, and the number of records of each split.

  Raises:
    DataError: if a file cannot be used.
    InputError: if the data set is not made of files, or is prepared already.
  """
  if not all(hasattr(x, 'encoded') for x in dataset.splits.values()):
    raise InputError(
      f'{dataset.name} is not a data set of files; it needs no prepare_data.'
    )
  folder = target / dataset.name / VERSION
  if folder.exists():
    raise InputError(
      f'{folder} already exists; remove it or choose another --target.'
    )
  staged = target / f'.{dataset.name}.shards'
  staged.mkdir(parents=True, exist_ok=True)
  shards, core = _write_shards(dataset, staged, workers), _tfds().core
  for path in {*staged.iterdir()}.difference(*shards.values()):
    path.unlink()  # Left by a call with other data.
  infos, hashes = [], {}
  for split, lengths in shards.items():
    hashes[split] = []
    size = sum(path.stat().st_size for path in lengths)
    counts = {'shard_lengths': [*lengths.values()], 'num_bytes': size}
    infos.append(core.SplitInfo(name=split, **counts))
    for i, path in enumerate(lengths):
      with path.open('rb') as file:
        hashes[split].append(hashlib.file_digest(file, 'sha256').hexdigest())
      end = f'array_record-{i:05d}-of-{len(lengths):05d}'
      path.rename(staged / f'{dataset.name}-{split}.{end}')
  _tfds().folder_dataset.write_metadata(
    data_dir=staged,
    features=_features(),
    split_infos=infos,
    version=VERSION,
    check_data=False,
    metadata=core.MetadataDict(
      class_names=list(dataset.class_names),
      palette=dataset.palette.tolist(),
      ignore_label=IGNORE_LABEL,
      sha256=hashes,
    ),
  )
  folder.parent.mkdir(exist_ok=True)
  staged.rename(folder)
  return folder, {split: len(x) for split, x in dataset.splits.items()}


def _find(folder: pathlib.Path) -> pathlib.Path:
  """Finds the folder with dataset_info.json in or below `folder`."""
  depths = ('', '*/', '*/*/')
  infos = [x for y in depths for x in folder.glob(f'{y}dataset_info.json')]
  if len(infos) != 1:
    number = 'more than one' if infos else 'no'
    what = f'{number} data set of prepare_data in it'
    remedy = 'name the folder with dataset_info.json'
    raise InputError(f'config.data.prepared={folder}: {what}; {remedy}.')
  return infos[0].parent


def load(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Opens the prepared data set that config['prepared'] names.

  Raises:
    InputError: if there is none, or none that can be read.
  """
  del splits  # No record is read before it is used.
  tfds, folder = _tfds(), _find(pathlib.Path(config['prepared']))
  builder = tfds.builder_from_directory(folder)
  info, metadata = builder.info, builder.info.metadata or {}
  if info.name != config['name']:
    raise InputError(
      f'{folder} contains {info.name}, but config.data.name={config["name"]}.'
    )
  if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    what = f'stored as {info.file_format.value}, which needs TensorFlow'
    remedy = "prepare it with file_format='array_record'"
    raise InputError(f'{folder}: {what}; {remedy}.')
  # The builder in TFDS itself has other names of splits and features.
  if f'{info.full_name}/'.startswith('cityscapes/semantic_segmentation/'):
    names, palette = zip(*classes.CITYSCAPES.items(), strict=True)
    keys = ('image_id', 'image_left', 'segmentation_label')
    stored = {'train': 'train', 'val': 'validation'}
    ids = classes.CITYSCAPES_IDS
    read_label = masks.IndexLabels(ids, tuple(sorted({*range(256)} - {*ids})))
  elif 'class_names' in metadata:
    names, palette = metadata['class_names'], metadata['palette']
    keys, stored = ('id', 'image', 'label'), {x: x for x in info.splits}
    read_label = masks.IndexLabels(tuple(range(len(names))))
  else:
    raise InputError(f'{folder}: was not written by prepare_data.')

  def make_pair(record: dict[str, Any]) -> pairs.Pair:
    key, image, label = (record[key] for key in keys)
    key = key.decode() if isinstance(key, bytes) else str(key)
    make_file = functools.partial(files.File, f'{folder}, record {key}')
    return pairs.Pair(key, make_file(data=image), make_file(data=label))

  def make_unlabeled(record: dict[str, Any]) -> pairs.Pair:
    return dataclasses.replace(make_pair(record), mask=None)

  skip = dict.fromkeys(keys[1:], tfds.decode.SkipDecoding())
  content, sources = (folder / 'dataset_info.json').read_bytes(), {}
  options = {key: config[key] for key in ('limit', 'cache')}
  for split, name in stored.items():
    records = builder.as_data_source(name, decoders=skip)
    make = make_unlabeled if split == pairs.UNLABELED else make_pair
    records = grain.MapDataset.source(records).map(make)
    options['mark'] = f'{split} {config["limit"]} '.encode() + content
    source = pairs.PairSource(records, read_label, upright=False, **options)
    sources[split] = source
  palette = np.array(palette, np.uint8)
  return pairs.Dataset(config['name'], tuple(names), palette, sources)
