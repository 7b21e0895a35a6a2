# SPDX-License-Identifier: Apache-2.0
"""Data sets in ArrayRecord shards, written and read by tensorflow-datasets.

One schema for all: images as they were stored, labels as PNGs of train ids, in
the order of the files. So training from shards gives the batches that training
from the files gives. TensorFlow is needed on neither side.
"""

from concurrent import futures
import functools
import hashlib
import json
import os
import pathlib
import threading

import cv2
import numpy as np

from attnfd_jax.data import cache, classes, files, masks, pairs
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

VERSION = '1.0.0'
SHARD_SIZE = 128  # Examples; small enough to lose little by an interruption.
# Where the stock builder of TFDS keeps what ours calls image and label.
_STOCK_CITYSCAPES = 'cityscapes/semantic_segmentation'
_STOCK_SPLITS = {'train': 'train', 'val': 'validation'}


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


def _write_shard(source, records, path, advance):
  """Writes a range of records of a PairSource, unless `path` has them already.

  A note of what the shard holds lies beside it, and is returned; `advance` is
  called with the number of records done. After an error nothing is left of it.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  note = path.with_name(f'{path.name}.json')
  bounds = records.start, records.stop
  content = [VERSION, source.fingerprint(*bounds), *bounds]
  if note.exists() and path.exists():
    found = json.loads(note.read_text())
    if found['content'] == content and found['sha256'] == _sha256(path):
      advance(len(records))
      return found
  features = _features()
  serializer = _tfds().core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  temporary = path.with_name(f'{path.name}.part')
  # group_size 1 is what random access is fast with.
  writer = ArrayRecordWriter(str(temporary), 'group_size:1')
  try:
    for i in records:
      example = {'id': source.key(i), **source.encoded(i)}
      example['label'] = cv2.imencode('.png', example['label'])[1].tobytes()
      example = features.encode_example(example)
      writer.write(serializer.serialize_example(example))
      advance(1)
    writer.close()
  except BaseException:
    writer.close()
    temporary.unlink(missing_ok=True)
    raise
  os.replace(temporary, path)
  found = {
    'content': content,
    'shard': path.name,
    'count': len(records),
    'bytes': path.stat().st_size,
    'sha256': _sha256(path),
  }
  note.write_text(json.dumps(found))
  return found


def _write_shards(dataset, folder, workers):
  """{split: [note of a shard, ...]}; names are those of TFDS."""
  total = sum(len(source) for source in dataset.splits.values())
  lock, pending = threading.Lock(), {}
  with (
    progress(total, dataset.name) as bar,
    futures.ThreadPoolExecutor(workers) as pool,
  ):

    def advance(count):
      with lock:
        bar.update(count)

    for split, source in dataset.splits.items():
      records = range(len(source))
      parts = [records[i:][:SHARD_SIZE] for i in records[::SHARD_SIZE]]
      for i, part in enumerate(parts):
        name = (
          f'{dataset.name}-{split}.array_record-{i:05d}-of-{len(parts):05d}'
        )
        job = pool.submit(_write_shard, source, part, folder / name, advance)
        pending.setdefault(split, []).append(job)
    try:
      return {
        split: [future.result() for future in parts]
        for split, parts in pending.items()
      }
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


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
  splits, core = _write_shards(dataset, staged, workers), _tfds().core
  shards = {note['shard'] for notes in splits.values() for note in notes}
  for path in staged.iterdir():
    if path.name not in shards:  # A note, or of an attempt with other data.
      path.unlink()
  metadata = {
    'class_names': list(dataset.class_names),
    'palette': dataset.palette.tolist(),
    'ignore_label': IGNORE_LABEL,
    'sha256': {
      split: [note['sha256'] for note in notes]
      for split, notes in splits.items()
    },
  }
  infos = [
    core.SplitInfo(
      name=split,
      shard_lengths=[note['count'] for note in notes],
      num_bytes=sum(note['bytes'] for note in notes),
    )
    for split, notes in splits.items()
  ]
  _tfds().folder_dataset.write_metadata(
    data_dir=staged,
    features=_features(),
    split_infos=infos,
    version=VERSION,
    check_data=False,
    metadata=core.MetadataDict(metadata),
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
  folder = pathlib.Path(folder)
  found = sorted(folder.glob('dataset_info.json'))
  found += sorted(folder.glob('*/*/dataset_info.json'))
  found += sorted(folder.glob('*/dataset_info.json'))
  if len(found) != 1:
    what = 'no' if not found else 'more than one'
    raise InputError(
      f'config.data.prepared={folder}: {what} data set of prepare_data in it; '
      'name the folder that holds dataset_info.json.'
    )
  return found[0].parent


def load(config):
  """The Dataset at config['prepared'].

  Raises:
    InputError: if there is none, or of another name, or not in ArrayRecord.
  """
  tfds, folder = _tfds(), _find(config['prepared'])
  builder = tfds.builder_from_directory(folder)
  stock = f'{_STOCK_CITYSCAPES}/' in f'{builder.info.full_name}/'
  if builder.info.name != config['name']:
    raise InputError(
      f'{folder} holds {builder.info.name}, config.data.name is '
      f'{config["name"]}.'
    )
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise InputError(
      f'{folder}: stored as {builder.info.file_format.value}, which needs '
      "TensorFlow; prepare it with file_format='array_record'."
    )
  if stock:
    names, palette = classes.names_and_palette(classes.CITYSCAPES)
    keys = ('image_id', 'image_left', 'segmentation_label')
    ids, splits = classes.CITYSCAPES_IDS, _STOCK_SPLITS
  else:
    metadata = builder.info.metadata
    if not metadata or 'class_names' not in metadata:
      raise InputError(f'{folder}: not written by prepare_data.')
    names = tuple(metadata['class_names'])
    palette = np.array(metadata['palette'], np.uint8)
    keys = ('id', 'image', 'label')
    ids, splits = range(len(names)), {x: x for x in builder.info.splits}
  ignored = {*range(256)} - {*ids} if stock else ()
  read_label = masks.IndexLabels(tuple(ids), tuple(sorted(ignored)))
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
