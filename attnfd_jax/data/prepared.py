# SPDX-License-Identifier: Apache-2.0
"""Data sets in ArrayRecord shards, written and read by tensorflow-datasets.

One schema for all: images as they were stored, labels as PNGs of train ids, in
the order of the files. So training from shards gives the batches that training
from the files gives. TensorFlow is needed on neither side.
"""

import contextlib
import functools
import hashlib
import os
import pathlib

import cv2
import numpy as np

from attnfd_jax.data import cache, classes, files, frequencies, masks, pairs
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

VERSION = '1.0.0'
SHARD_SIZE = 128  # Examples; small enough to lose little by an interruption.


@functools.cache
def _tfds():
  """The module; it is slow to import and seldom needed."""
  import tensorflow_datasets

  tensorflow_datasets.disable_progress_bar()
  return tensorflow_datasets


def _features():
  features = _tfds().features
  return features.FeaturesDict(
    {
      'id': features.Text(),
      'image': features.Image(shape=(None, None, 3)),
      'label': features.Image(shape=(None, None, 1), encoding_format='png'),
    }
  )


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _write_shard(source, records, path, workers, bar):
  """Writes some records of a PairSource to `path`, whole or not at all."""
  from array_record.python.array_record_module import ArrayRecordWriter

  features = _features()
  serializer = _tfds().core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )

  def serialized(i):
    example = {'id': source.key(i), **source.encoded(i)}
    example['label'] = cv2.imencode('.png', example['label'])[1].tobytes()
    return serializer.serialize_example(features.encode_example(example))

  temporary = path.with_name(f'{path.name}.part')
  try:
    # group_size 1 is what random access is fast with.
    writer = ArrayRecordWriter(str(temporary), 'group_size:1')
    with contextlib.closing(writer):
      for example in frequencies.map_records(serialized, records, workers):
        writer.write(example)
        bar.update()
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  with open(temporary, 'rb') as file:
    os.fsync(file)  # The name means that all of it is there.
  temporary.rename(path)


def _write_shards(dataset, folder, workers):
  """{split: {path of a shard: number of records}}.

  A path changes with what is in the shard: what is there is not written again.
  """
  shards = {split: {} for split in dataset.splits}
  total = sum(len(source) for source in dataset.splits.values())
  with progress(total, dataset.name) as bar:
    for split, source in dataset.splits.items():
      for start in range(0, len(source), SHARD_SIZE):
        records = range(len(source))[start : start + SHARD_SIZE]
        content = source.fingerprint(start, records.stop)
        path = folder / f'{split}-{VERSION}-{start}-{content}'
        shards[split][path] = len(records)
        if path.exists():
          bar.update(len(records))
        else:
          _write_shard(source, records, path, workers, bar)
  return shards


def prepare(dataset, target, *, workers):
  """Writes a TFDS data set of files below the folder `target`.

  Args:
    workers: threads; decoding and encoding release the interpreter lock.

  Returns:
    Its folder, and {split: number of records}.

  Raises:
    DataError: names the first file that cannot be used. Finished shards stay.
    InputError: if the data set cannot be prepared or is there already.
  """
  if not all(hasattr(x, 'encoded') for x in dataset.splits.values()):
    raise InputError(
      f'{dataset.name} is not a data set of files: nothing to prepare.'
    )
  folder = target / dataset.name / VERSION
  if folder.exists():
    raise InputError(f'{folder} exists; remove it, or give another --target.')
  staged = target / f'.{dataset.name}.shards'
  staged.mkdir(parents=True, exist_ok=True)
  shards, core = _write_shards(dataset, staged, workers), _tfds().core
  for path in {*staged.iterdir()}.difference(*shards.values()):
    path.unlink()  # Of an attempt with other data.
  infos, hashes = [], {}
  for split, lengths in shards.items():
    hashes[split] = [_sha256(path) for path in lengths]
    size = sum(path.stat().st_size for path in lengths)
    infos.append(
      core.SplitInfo(
        name=split, shard_lengths=[*lengths.values()], num_bytes=size
      )
    )
    for i, path in enumerate(lengths):
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
  return folder, {info.name: sum(info.shard_lengths) for info in infos}


class _Pairs:
  """The pairs of a TFDS data source; keys name id, image, label in a record."""

  def __init__(self, records, folder, keys):
    self._records, self.folder, self._keys = records, folder, keys

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    key, image, label = (record[name] for name in self._keys)
    key = key.decode() if isinstance(key, bytes) else str(key)
    name = f'{self.folder}, record {key}'
    return pairs.Pair(
      key, files.File(name, data=image), files.File(name, data=label)
    )


class PreparedSource(pairs.PairSource):
  """A PairSource of shards."""

  def fingerprint(self):
    """Hex digest that changes with the shards and with what is read of them."""
    info = self.pairs.folder / 'dataset_info.json'
    return cache.digest([], info.read_bytes() + repr(self.read_label).encode())


def _find(folder):
  """The folder with dataset_info.json in or below `folder`."""
  depths = ('', '*/', '*/*/')
  found = [x for y in depths for x in folder.glob(f'{y}dataset_info.json')]
  if len(found) != 1:
    what = 'no' if not found else 'more than one'
    raise InputError(
      f'config.data.prepared={folder}: {what} data set of prepare_data in it; '
      'name the folder that holds dataset_info.json.'
    )
  return found[0].parent


def load(config):
  """The Dataset at config['prepared']; an InputError says what it lacks."""
  tfds, folder = _tfds(), _find(pathlib.Path(config['prepared']))
  builder = tfds.builder_from_directory(folder)
  info, metadata = builder.info, builder.info.metadata or {}
  if info.name != config['name']:
    raise InputError(
      f'{folder} holds {info.name}, config.data.name is {config["name"]}.'
    )
  if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise InputError(
      f'{folder}: stored as {info.file_format.value}, which needs TensorFlow; '
      "prepare it with file_format='array_record'."
    )
  # The stock builder of TFDS has other names for splits and keys.
  if f'{info.full_name}/'.startswith('cityscapes/semantic_segmentation/'):
    names, palette = classes.names_and_palette(classes.CITYSCAPES)
    keys = ('image_id', 'image_left', 'segmentation_label')
    splits = {'train': 'train', 'val': 'validation'}
    ids = tuple(classes.CITYSCAPES_IDS)
    read_label = masks.IndexLabels(ids, tuple(sorted({*range(256)} - {*ids})))
  elif 'class_names' in metadata:
    names = tuple(metadata['class_names'])
    palette = np.array(metadata['palette'], np.uint8)
    keys, splits = ('id', 'image', 'label'), {x: x for x in info.splits}
    read_label = masks.IndexLabels(tuple(range(len(names))))
  else:
    raise InputError(f'{folder}: not written by prepare_data.')
  skip = dict.fromkeys(keys[1:], tfds.decode.SkipDecoding())
  sources = {
    split: PreparedSource(
      _Pairs(builder.as_data_source(stored, decoders=skip), folder, keys),
      read_label,
      limit=config['limit'],
      cache=config['cache'],
      upright=False,
    )
    for split, stored in splits.items()
  }
  return pairs.Dataset(config['name'], names, palette, sources)
