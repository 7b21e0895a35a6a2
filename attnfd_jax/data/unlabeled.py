# SPDX-License-Identifier: Apache-2.0
"""Finds the images of the split 'unlabeled', which has no masks.

Only the distilled student is trained with them.
"""

from collections.abc import Iterator
import dataclasses
import glob
import os
import pathlib

from attnfd_jax.data import cityscapes, coco, files, pairs, synthetic, voc
from attnfd_jax.data.pairs import Dataset, Entry, Note, Pair, UNLABELED
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import DataError, InputError

# Values of config.data.unlabeled besides paths: the pairs that
# student.labeled_limit leaves out, and the data set's own images without masks.
REST, OFFICIAL = 'rest', 'official'
_OFFICIAL = {
  'cityscapes': cityscapes.unlabeled,
  'coco': coco.unlabeled,
  'pascal_voc': voc.unlabeled,
}


def with_unlabeled(dataset: Dataset, config: DataConfig) -> Dataset:
  """Adds the split that config['unlabeled'] names to a data set.

  Images that cannot be used are in `problems` of the result. The value 'rest'
  adds nothing here: it depends on the stage, see subsets.py.

  Raises:
    InputError: if 'official' is given for a data set without such images.
  """
  chosen, splits = config['unlabeled'], dict(dataset.splits)
  problems, notes = [], []
  if chosen in ('', REST):
    splits.pop(UNLABELED, None)  # Prepared shards may have one.
  elif chosen == OFFICIAL and config['name'] == 'scenes':
    splits[UNLABELED] = synthetic.unlabeled(config)
  elif UNLABELED not in splits:
    entries = _official(config) if chosen == OFFICIAL else _named(chosen)
    images, problems, notes = pairs.sorted_out(UNLABELED, entries)
    if images:
      options = {key: config[key] for key in ('limit', 'cache')}
      # An EXIF rotation is ignored, since there is no mask to disagree with.
      splits[UNLABELED] = pairs.PairSource(images, None, **options)
  return dataclasses.replace(
    dataset,
    splits=splits,
    problems=(*dataset.problems, *problems),
    notes=(*dataset.notes, *notes),
  )


def _official(config: DataConfig) -> Iterator[Entry]:
  """Yields the data set's own images without masks."""
  if prepared := config['prepared']:
    raise InputError(
      f'{prepared} has no unlabeled images; run prepare_data with '
      f'--config.data.unlabeled={OFFICIAL}.'
    )
  if config['name'] not in _OFFICIAL:
    others = ', '.join((*_OFFICIAL, 'scenes'))
    raise InputError(
      f'config.data.unlabeled={OFFICIAL}: {config["name"]} has no images '
      f'without masks of its own ({others} do); use a folder, a glob, a text '
      f'file of paths, or {REST!r} for the pairs that student.labeled_limit '
      'leaves out.'
    )
  for name, file in _OFFICIAL[config['name']](config).items():
    yield _pair(name, file)


def _pair(
  name: str, file: files.File, listed_in: pathlib.Path | None = None
) -> Pair | DataError:
  """Pair of an image that may be listed in a text file."""
  if file.target:
    return file.broken()
  if listed_in and not os.path.isfile(file.path):
    return files.data_error(
      file, 'unreadable', f'not found, but listed in {listed_in}'
    )
  return Pair(os.path.splitext(name)[0], file)


def _named(source: str) -> Iterator[Entry]:
  """Yields the images of a folder, a zip, a text file of paths or a glob."""
  path, others, listed_in = pathlib.Path(source), [], None
  if path.is_dir():
    images, others = files.walk(path)
  elif path.is_file() and path.suffix.lower() == '.zip':
    members = files.list_zip(path, '', files.IMAGE_ENDINGS)
    images = {file.member: file for file in members}
  elif path.is_file() and path.suffix.lower() in files.IMAGE_ENDINGS:
    images = {path.name: files.File(str(path))}
  elif path.is_file():
    listed_in = path
    lines = dict.fromkeys(line for line in files.read_lines(path) if line)
    images = {line: files.File(str(path.parent / line)) for line in lines}
  else:
    names = sorted(glob.glob(source, recursive=True))
    names = [name for name in names if os.path.isfile(name)]
    endings = files.IMAGE_ENDINGS
    images = {x: files.File(x) for x in names if x.lower().endswith(endings)}
    others = [*{*names} - {*images}]
  for name, file in images.items():
    yield _pair(name, file, listed_in)
  if not images:
    what = 'no images found' if path.exists() else 'not found'
    if others:
      what += f', but {pairs.count_endings(others)}'
    what += '; config.data.unlabeled is a folder, a zip, a glob or a text file'
    what += f" of paths, '{REST}' or '{OFFICIAL}'"
    raise DataError(f'{source}: {what}.', 'split', source)
  if others:
    yield Note(f'{source}: left out {pairs.count_endings(others)}')
