# SPDX-License-Identifier: Apache-2.0
"""Data sets in ArrayRecord shards, written and read by tensorflow-datasets.

One schema for all: images as they were stored, labels as PNGs of train ids, in
the order of the files. So training from shards gives the batches that training
from the files gives. TensorFlow is needed on neither side.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib

import cv2
import grain
import numpy as np

from attnfd_jax import paths
from attnfd_jax.data import classes, files, frequencies, masks, pairs
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
  image = features.Image(shape=(None, None, 3))
  label = features.Image(shape=(None, None, 1), encoding_format='png')
  columns = {'id': features.Text(), 'image': image, 'label': label}
  return features.FeaturesDict(columns)


def _write_shard(source, records, path, workers, bar):
  """Writes some records of a PairSource to `path`, whole or not at all."""
  from array_record.python.array_record_module import ArrayRecordWriter

  features = _features()
  info = features.get_serialized_info()
  serializer = _tfds().core.example_serializer.ExampleSerializer(info)

  def serialized(i):
    example = {'id': source.key(i), **source.encoded(i)}
    example['label'] = cv2.imencode('.png', example['label'])[1].tobytes()
    return serializer.serialize_example(features.encode_example(example))

  with paths.replacing(path) as file:
    # group_size 1 is what random access is fast with.
    writer = ArrayRecordWriter(file.name, 'group_size:1')
    with contextlib.closing(writer):
      for example in frequencies.map_records(serialized, records, workers):
        writer.write(example)
        bar.update()


def _write_shards(dataset, folder, workers):
  """{split: {path of a shard, which changes with its files: records}}."""
  shards = {split: {} for split in dataset.splits}
  with progress(sum(map(len, dataset.splits.values())), dataset.name) as bar:
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
  """Writes a TFDS data set below the folder `target`, by some threads.

  Returns its folder and {split: number of records}. A file that cannot be used
  is a DataError, after which finished shards stay; a data set that cannot be
  prepared, or is there already, an InputError.
  """
  if not all(hasattr(x, 'encoded') for x in dataset.splits.values()):
    raise InputError(f'{dataset.name} is not a data set of files to prepare.')
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


def _find(folder):
  """The folder with dataset_info.json in or below `folder`."""
  depths = ('', '*/', '*/*/')
  found = [x for y in depths for x in folder.glob(f'{y}dataset_info.json')]
  if len(found) != 1:
    number = 'more than one' if found else 'no'
    what = f'{number} data set of prepare_data in it'
    remedy = 'name the folder that holds dataset_info.json'
    raise InputError(f'config.data.prepared={folder}: {what}; {remedy}.')
  return found[0].parent


def load(config, splits):
  """The Dataset at config['prepared']; an InputError says what it lacks."""
  del splits  # Records are read where they are asked for.
  tfds, folder = _tfds(), _find(pathlib.Path(config['prepared']))
  builder = tfds.builder_from_directory(folder)
  info, metadata = builder.info, builder.info.metadata or {}
  if info.name != config['name']:
    what = f'holds {info.name}, config.data.name is {config["name"]}'
    raise InputError(f'{folder} {what}.')
  if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    what = f'stored as {info.file_format.value}, which needs TensorFlow'
    remedy = "prepare it with file_format='array_record'"
    raise InputError(f'{folder}: {what}; {remedy}.')
  # The stock builder of TFDS has other names for splits and keys.
  if f'{info.full_name}/'.startswith('cityscapes/semantic_segmentation/'):
    names, palette = zip(*classes.CITYSCAPES.items(), strict=True)
    keys = ('image_id', 'image_left', 'segmentation_label')
    splits = {'train': 'train', 'val': 'validation'}
    ids = classes.CITYSCAPES_IDS
    read_label = masks.IndexLabels(ids, tuple(sorted({*range(256)} - {*ids})))
  elif 'class_names' in metadata:
    names, palette = metadata['class_names'], metadata['palette']
    keys, splits = ('id', 'image', 'label'), {x: x for x in info.splits}
    read_label = masks.IndexLabels(tuple(range(len(names))))
  else:
    raise InputError(f'{folder}: not written by prepare_data.')

  def make_pair(record):
    key, image, label = (record[name] for name in keys)
    key = key.decode() if isinstance(key, bytes) else str(key)
    in_shard = functools.partial(files.File, f'{folder}, record {key}')
    return pairs.Pair(key, in_shard(data=image), in_shard(data=label))

  def make_unlabeled(record):
    return dataclasses.replace(make_pair(record), mask=None)

  skip = dict.fromkeys(keys[1:], tfds.decode.SkipDecoding())
  content, sources = (folder / 'dataset_info.json').read_bytes(), {}
  options = {key: config[key] for key in ('limit', 'cache')}
  for split, stored in splits.items():
    records = builder.as_data_source(stored, decoders=skip)
    make = make_unlabeled if split == pairs.UNLABELED else make_pair
    records = grain.MapDataset.source(records).map(make)
    options['mark'] = f'{split} {config["limit"]} '.encode() + content
    source = pairs.PairSource(records, read_label, upright=False, **options)
    sources[split] = source
  palette = np.array(palette, np.uint8)
  return pairs.Dataset(config['name'], tuple(names), palette, sources)
