# SPDX-License-Identifier: Apache-2.0
"""Data sets in ArrayRecord shards, written and read by tensorflow-datasets.

One schema for all: images as they were stored, labels as PNGs of train ids, in
the order of the files. So training from shards gives the batches that training
from the files gives. TensorFlow is needed on neither side.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil

import cv2
import numpy as np

from attnfd_jax.data import cache
from attnfd_jax.data import classes
from attnfd_jax.data import masks
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.data.pairs import Decoded
from attnfd_jax.errors import DataError
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL

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


def shards(source):
  """[(first, last + 1), ...] of the records of a source."""
  return [
    (start, min(start + SHARD_SIZE, len(source)))
    for start in range(0, len(source), SHARD_SIZE)
  ]


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def write_shard(source, bounds, path, advance):
  """Writes records [first, last) to `path`, unless they are there already.

  Args:
    source: a PairSource.
    bounds: (first, last + 1).
    path: of the shard; a note of what it holds lies beside it.
    advance: called after each record.

  Returns:
    {'count', 'sha256'}.

  Raises:
    DataError: names the file that cannot be used; nothing is left of the shard.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  note = path.with_suffix('.json')
  content = [VERSION, source.fingerprint(*bounds), *bounds]
  if note.exists() and path.exists():
    found = json.loads(note.read_text())
    if found['content'] == content and found['sha256'] == _sha256(path):
      advance(bounds[1] - bounds[0])
      return found
  tfds, features = _tfds(), _features()
  serializer = tfds.core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  temporary = path.with_suffix('.part')
  # group_size 1 is what random access is fast with.
  writer = ArrayRecordWriter(str(temporary), 'group_size:1')
  try:
    for i in range(*bounds):
      record = source.encoded(i)
      label = cv2.imencode('.png', record['label'])[1].tobytes()
      example = {
        'id': source.key(i),
        'image': record['image'],
        'label': label,
      }
      example = features.encode_example(example)
      writer.write(serializer.serialize_example(example))
      advance(1)
  except BaseException:
    writer.close()
    temporary.unlink(missing_ok=True)
    raise
  writer.close()
  os.replace(temporary, path)
  found = {
    'content': content,
    'count': bounds[1] - bounds[0],
    'sha256': _sha256(path),
  }
  note.write_text(json.dumps(found))
  return found


def _place(staged, path):
  """The same file under another name; a copy where links cannot be."""
  try:
    os.link(staged, path)
  except OSError:
    shutil.copyfile(staged, path)


def finish(dataset, splits, staged, target):
  """Makes a TFDS data set of finished shards.

  Args:
    dataset: Dataset.
    splits: {name: [(path of the shard, its note), ...]} in order.
    staged: folder of the shards; TFDS wants one for downloads.
    target: folder; the data set is <target>/<name>/<version>.

  Returns:
    The folder of the data set.
  """
  tfds = _tfds()

  class Writer(tfds.core.writer.ExampleWriter):
    def __init__(self, file_format, order):
      super().__init__(file_format)
      self._order = iter(order)

    def write(self, path, examples):
      del examples  # Written already, in parallel.
      _place(next(self._order), os.fspath(path))

  class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
    name = dataset.name
    VERSION = tfds.core.Version(VERSION)

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=_features(),
        metadata=tfds.core.MetadataDict(
          {
            'class_names': list(dataset.class_names),
            'palette': dataset.palette.tolist(),
            'ignore_label': IGNORE_LABEL,
            'sha256': {
              split: [note['sha256'] for _, note in parts]
              for split, parts in splits.items()
            },
          }
        ),
      )

    def _shard_iterators_per_split(self, dl_manager):
      del dl_manager

      def counted(note):
        # TFDS counts them and nothing else.
        return lambda: ((i, None) for i in range(note['count']))

      return {
        split: [counted(note) for _, note in parts]
        for split, parts in splits.items()
      }

    def _example_writer(self):
      order = [path for parts in splits.values() for path, _ in parts]
      return Writer(self.info.file_format, order)

  builder = Builder(data_dir=str(target), file_format='array_record')
  with contextlib.redirect_stdout(None):  # It speaks of downloads.
    builder.download_and_prepare(download_dir=str(staged))
  return pathlib.Path(builder.data_dir)


class PreparedSource(Decoded):
  """Records of a TFDS data source, decoded as PairSource decodes files.

  Args:
    records: of `as_data_source`, not decoded.
    folder: of the data set, for messages.
    keys: names of id, image and label in a record.
    table: uint8 [256] from stored labels to train ids, or None.
    limit: only so many, 0 for all.
    cache: keep decoded records in memory.
  """

  def __init__(
    self,
    records,
    folder,
    *,
    keys=('id', 'image', 'label'),
    table=None,
    limit=0,
    cache=False,
  ):
    super().__init__(cache=cache)
    self._records, self._folder, self._keys = records, folder, keys
    self._table = table
    self._length = min(limit or len(records), len(records))

  def __len__(self):
    return self._length

  def key(self, index):
    """Unique in the split."""
    return _text(self._records[index][self._keys[0]])

  def name(self, index):
    return self._where(self._records[index])

  def size(self, index):
    """(height, width) from the header of the image."""
    data = self._records[index][self._keys[1]]
    width, height = masks.open_image(data).size
    return height, width

  def fingerprint(self):
    """Hex digest that changes with the shards."""
    info = pathlib.Path(self._folder) / 'dataset_info.json'
    table = b'' if self._table is None else self._table.tobytes()
    return cache.digest([], info.read_bytes() + table)

  def label(self, index):
    """As in [index], without its image."""
    return self._label(self._records[index])

  def _label(self, record):
    data = np.frombuffer(record[self._keys[2]], np.uint8)
    label = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if label is None:
      where = self._where(record)
      raise DataError(
        f'{where}: its label cannot be read; prepare the data set again.',
        'unreadable',
        where,
      )
    return label if self._table is None else cv2.LUT(label, self._table)

  def _where(self, record):
    return f'{self._folder}, record {_text(record[self._keys[0]])}'

  def _read(self, index):
    record = self._records[index]
    image = masks.decode_image(self._where(record), record[self._keys[1]])
    return {'image': image, 'label': self._label(record)}


def _text(value):
  return value.decode() if isinstance(value, bytes) else str(value)


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
  options = {'limit': config['limit'], 'cache': config['cache']}
  if stock:
    names, palette = classes.names_and_palette(classes.CITYSCAPES)
    options['keys'] = ('image_id', 'image_left', 'segmentation_label')
    options['table'] = masks.id_table(classes.CITYSCAPES_IDS)
    splits = _STOCK_SPLITS
  else:
    metadata = builder.info.metadata
    if not metadata or 'class_names' not in metadata:
      raise InputError(f'{folder}: not written by prepare_data.')
    names = tuple(metadata['class_names'])
    palette = np.array(metadata['palette'], np.uint8)
    splits = {split: split for split in builder.info.splits}
  _, image, label = options.get('keys', (None, 'image', 'label'))
  skip = {key: tfds.decode.SkipDecoding() for key in (image, label)}
  sources = {
    split: PreparedSource(
      builder.as_data_source(stored, decoders=skip), str(folder), **options
    )
    for split, stored in splits.items()
  }
  return Dataset(config['name'], names, palette, sources)
