# SPDX-License-Identifier: Apache-2.0
"""Images that nobody labeled: the split 'unlabeled', from which only the
distilled student learns.
"""

import dataclasses
import glob
import os
import pathlib

from attnfd_jax.data import cityscapes, coco, files, pairs, synthetic, voc
from attnfd_jax.data.pairs import Note, Pair, UNLABELED
from attnfd_jax.errors import DataError, InputError

# Of config.data.unlabeled: the pairs beyond student.labeled_limit, and what a
# data set has without masks.
REST, OFFICIAL = 'rest', 'official'
_OFFICIAL = {
  'cityscapes': cityscapes.unlabeled,
  'coco': coco.unlabeled,
  'pascal_voc': voc.unlabeled,
}


def with_unlabeled(dataset, config):
  """`dataset` with the split that the group `data` of a config names.

  What is wrong with the images is in `problems`; the value 'rest' is of stages,
  see subsets.py.

  Raises:
    InputError: 'official' for a data set without such images.
  """
  chosen, splits = config['unlabeled'], dict(dataset.splits)
  problems, notes = [], []
  if chosen in ('', REST):
    splits.pop(UNLABELED, None)  # Of shards that hold one.
  elif chosen == OFFICIAL and config['name'] == 'scenes':
    splits[UNLABELED] = synthetic.unlabeled(config)
  elif UNLABELED not in splits:
    entries = _official(config) if chosen == OFFICIAL else _named(chosen)
    found, problems, notes = pairs.sorted_out(UNLABELED, entries)
    if found:
      options = {key: config[key] for key in ('limit', 'cache')}
      # As stored: there is no mask that a rotation by EXIF could leave behind.
      splits[UNLABELED] = pairs.PairSource(found, None, **options)
  return dataclasses.replace(
    dataset,
    splits=splits,
    problems=(*dataset.problems, *problems),
    notes=(*dataset.notes, *notes),
  )


def _official(config):
  if prepared := config['prepared']:
    raise InputError(
      f'{prepared} has no unlabeled images; run prepare_data with '
      f'--config.data.unlabeled={OFFICIAL}.'
    )
  if config['name'] not in _OFFICIAL:
    others = ', '.join((*_OFFICIAL, 'scenes'))
    raise InputError(
      f'config.data.unlabeled={OFFICIAL}: {config["name"]} has no images '
      f'without masks of its own ({others} have); name a folder, a glob or a '
      f'text file of paths, or {REST!r} for what student.labeled_limit leaves.'
    )
  for name, file in _OFFICIAL[config['name']](config).items():
    yield _pair(name, file)


def _pair(name, file, named_by=None):
  if file.target:
    return file.broken()
  if named_by and not os.path.isfile(file.path):
    return files.fault(
      file, 'unreadable', f'not there, but {named_by} names it'
    )
  return Pair(os.path.splitext(name)[0], file)


def _named(place):
  """Entries of a folder, a zip, a text file of paths or a glob."""
  path, others, named_by = pathlib.Path(place), [], None
  if path.is_dir():
    found, others = files.walk(path)
  elif path.is_file() and path.suffix.lower() == '.zip':
    listed = files.list_zip(path, '', files.IMAGE_ENDINGS)
    found = {file.member: file for file in listed}
  elif path.is_file() and path.suffix.lower() in files.IMAGE_ENDINGS:
    found = {path.name: files.File(str(path))}
  elif path.is_file():
    named_by = path
    lines = dict.fromkeys(line for line in files.read_lines(path) if line)
    found = {line: files.File(str(path.parent / line)) for line in lines}
  else:
    names = sorted(glob.glob(place, recursive=True))
    names = [name for name in names if os.path.isfile(name)]
    images = [x for x in names if x.lower().endswith(files.IMAGE_ENDINGS)]
    others = [*{*names} - {*images}]
    found = {name: files.File(name) for name in images}
  for name, file in found.items():
    yield _pair(name, file, named_by)
  if not found:
    what = 'no images there' if path.exists() else 'not found'
    if others:
      what += f', but {pairs.count_endings(others)}'
    what += '; config.data.unlabeled is a folder, a zip, a glob or a text file'
    what += f" of paths, '{REST}' or '{OFFICIAL}'"
    raise DataError(f'{place}: {what}.', 'split', place)
  if others:
    yield Note(f'{place}: left out {pairs.count_endings(others)}')
