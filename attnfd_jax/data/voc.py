# SPDX-License-Identifier: Apache-2.0
"""Reads PASCAL VOC 2012 from its devkit, optionally with the masks of SBD."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import io
import itertools
import os
import pathlib
import re

import numpy as np

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import InputError
from attnfd_jax.types import StrPath

# Folders of `root` besides SegmentationClass.
_IMAGES, _AUGMENTED = 'JPEGImages', 'SegmentationClassAug'


def read_list(path: pathlib.Path) -> Iterator[str]:
  """Yields the distinct lines of a list file.

  Raises:
    DataError: if the file does not exist or is empty.
  """
  if not path.is_file():
    others = ', '.join(sorted(p.name for p in path.parent.glob('*.txt'))[:3])
    if not others:
      raise pairs.absent(path)
    what = f'no such list, but there is {others}; a list has one image name'
    raise files.data_error(path, 'split', f'{what} without extension per line')
  lines = [line for line in dict.fromkeys(files.read_lines(path)) if line]
  if not lines:
    raise files.data_error(path, 'split', 'no names in it')
  yield from lines


def _stems(
  folder: StrPath, endings: tuple[str, ...] = files.IMAGE_ENDINGS
) -> dict[str, files.File]:
  """Lists a folder by path relative to it, without extension."""
  listed = files.walk(folder, endings).files
  return {os.path.splitext(name)[0]: file for name, file in listed.items()}


def pair_listed(
  ids: Sequence[str],
  where: Sequence[pathlib.Path],
  both: Sequence[Mapping[str, files.File]],
) -> Iterator[pairs.Entry]:
  """Yields the pairs of the listed ids, with notes and errors.

  Args:
    ids: names in the list of the split.
    where: folders of the images and of the masks.
    both: images and masks by path in their folder, without extension.
  """
  sides = [pairs.renamed(side, ids, all_items=False) for side in both]
  for _, notes in sides:
    yield from notes
  (images, _), (labels, _) = sides
  why = ', which the list of the split names'
  yield from pairs.join(ids, where, images, labels, why)


class _VocLabels(masks.IndexLabels):
  """Reads the PNGs of VOC and the .mat files of SBD as train ids."""

  def __call__(self, file: files.File) -> np.ndarray:
    read = read_sbd if file.inner.suffix == '.mat' else masks.read_mask
    return self.from_ids(file, read(file))


def read_sbd(file: files.File) -> np.ndarray:
  """Reads the class ids, uint8 [h, w], 0 to 20, of a file in SBD's cls/."""
  import scipy.io  # Needed only for SBD.

  data = io.BytesIO(file.read())
  with masks.decoding(file, 'SBD mask'):
    ids = scipy.io.loadmat(data)['GTcls'][0]['Segmentation'][0]
    ids = np.ascontiguousarray(ids, np.uint8)  # From column-major order.
    if ids.ndim != 2:
      raise ValueError(f'of shape {ids.shape}')
    return ids


def _sbd_folder(root: StrPath) -> pathlib.Path:
  """Returns benchmark_RELEASE/dataset, where SBD's lists are."""
  inner = pathlib.Path(root) / 'dataset'
  return inner if inner.is_dir() else inner.parent


def _sbd_pairs(root: StrPath, exclude: set[str]) -> Iterator[pairs.Entry]:
  """Yields the pairs of SBD's train and val, sorted, without some ids."""
  files.require_module('scipy.io', 'config.data.sbd_root')
  folder = _sbd_folder(root)
  if not (folder / 'cls').is_dir():
    what = 'no such folder; config.data.sbd_root must be benchmark_RELEASE'
    raise files.data_error(folder / 'cls', 'split', what)
  lists = read_list(folder / 'train.txt'), read_list(folder / 'val.txt')
  ids = {*itertools.chain(*lists)} - exclude
  where = folder / 'img', folder / 'cls'
  both = _stems(where[0]), _stems(where[1], ('.mat',))
  yield from pair_listed(sorted(ids), where, both)


def _letters(name: str) -> str:
  return re.sub('[^a-z0-9]', '', name.lower())


def list_path(root: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of the list of a split.

  If it does not exist, the only list whose name is the same except for case and
  punctuation, if any.
  """
  folder = root / 'ImageSets' / 'Segmentation'
  path = folder / f'{name}.txt'
  if not path.exists():
    stems = ((x, _letters(x.stem)) for x in folder.glob('*.txt'))
    alike = [x for x, letters in stems if letters == _letters(name)]
    path = alike[0] if len(alike) == 1 else path
  return path


def _parse(line: str) -> tuple[str, str]:
  """Parses a line of file names or paths; returns an id and a mask folder.

  '/JPEGImages/X.jpg /Masks/X.png' becomes ('X', 'Masks'). Without a folder of
  masks it is ''; a line without extensions is an id.
  """
  paths = [pathlib.PurePosixPath(part.lstrip('/')) for part in line.split()]
  are_files = [path.suffix.lower() in files.IMAGE_ENDINGS for path in paths]
  if not 1 <= len(paths) <= 2 or not all(are_files):
    return line, ''
  image, *labels = paths
  parts = image.with_suffix('').parts
  folder = labels[0].parts[0] if labels and labels[0].parts[1:] else ''
  return '/'.join(parts[parts[0] == _IMAGES :]), folder


def _ids(lines: Iterable[str]) -> set[str]:
  """Returns all ids that lines can mean: as they are, and parsed."""
  lines = {*lines}
  return lines | {_parse(line)[0] for line in lines}


def read_split(
  root: pathlib.Path, name: str, labels: str = 'SegmentationClass'
) -> Iterator[pairs.Entry]:
  """Yields the entries of a split in VOC's layout.

  The lines of its list are ids, file names or paths. If some masks are missing
  in `labels` and SegmentationClassAug has all of them, it is used instead.

  Args:
    root: folder with JPEGImages.
    name: of the split or of its list.
    labels: folder of the masks in `root`.
  """
  path, images = list_path(root, name), root / _IMAGES
  lines, stems = [*read_list(path)], _stems(images)
  if path.stem != name:
    yield pairs.Note(f'{path.name} is read because there is no {name}.txt')
  # The name of an image is an id, even if it looks like a path.
  rows = [(x, '') if x in stems else _parse(x) for x in lines]
  ids, folders = [x for x, _ in rows], {x for _, x in rows if x}
  if ids != lines:
    what = f'lines such as {lines[0]!r} are read as {ids[0]!r}'
    yield pairs.Note(f'{path}: {what}')
  if len(folders) > 1:
    what = f'masks in {len(folders)} folders ({", ".join(sorted(folders)[:3])})'
    raise files.data_error(path, 'split', f'{what}; use a single one')
  where = root / (folders or {labels}).pop()
  label_files = _stems(where)
  if not label_files.keys() >= {*ids}:
    other = root / _AUGMENTED
    more = _stems(other)
    if more.keys() >= {*ids}:
      what = f'masks are read from {other} because {where} does not have all'
      yield pairs.Note(what)
      where, label_files = other, more
  yield from pair_listed(ids, (images, where), (stems, label_files))


def _find_root(config: DataConfig) -> pathlib.Path:
  """Returns the folder that has JPEGImages."""
  root = pairs.check_root(config)
  for inner in ('VOC2012', 'VOCdevkit/VOC2012'):
    if not (root / _IMAGES).is_dir() and (root / inner).is_dir():
      root = root / inner
  if not (root / _IMAGES).is_dir():
    raise pairs.absent(root / _IMAGES)
  return root


def unlabeled(config: DataConfig) -> dict[str, files.File]:
  """Finds the images that are in no list, by name.

  Those are the lists of the segmentation task, and of SBD if it is used.

  Raises:
    DataError: if there are none.
  """
  root = _find_root(config)
  lists = [*list_path(root, 'train').parent.glob('*.txt')]
  if sbd_root := config['sbd_root']:
    folder = _sbd_folder(sbd_root)
    lists += [folder / 'train.txt', folder / 'val.txt']
  listed = _ids(line for path in lists for line in read_list(path))
  unlisted = {
    name: file
    for name, file in files.walk(root / _IMAGES).files.items()
    if os.path.splitext(name)[0] not in listed
  }
  if not unlisted:
    raise pairs.absent(root / _IMAGES, 'the lists name all images in it')
  return unlisted


def pascal_voc(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Reads VOCdevkit/VOC2012, with SBD's images or the list trainaug."""
  root = _find_root(config)
  train_list, sbd_root = config['train_list'], config['sbd_root']
  if sbd_root and train_list != 'train':
    what = f'config.data.train_list={train_list!r} cannot be combined with'
    raise InputError(f"{what} config.data.sbd_root, which adds to 'train'.")
  labels = ()
  if _letters(train_list) == 'trainaug' and (root / _AUGMENTED).is_dir():
    labels = (_AUGMENTED,)
  train = read_split(root, train_list, *labels)
  entries: dict[str, Iterable[pairs.Entry]] = {
    'train': train,
    'val': read_split(root, 'val'),
  }
  if sbd_root:
    lists = (read_list(list_path(root, split)) for split in entries)
    lines = [line for x in lists for line in pairs.with_error(x)]
    # Parsed as by read_split: SBD must not add images of val.
    exclude = _ids(line for line in lines if isinstance(line, str))
    extra = _sbd_pairs(sbd_root, exclude)
    entries['train'] = itertools.chain(pairs.with_error(train), extra)
  entries = {split: entries[split] for split in splits if split in entries}
  ids = _VocLabels(tuple(range(len(classes.VOC))))
  # VOC's masks match the pixels as stored.
  return pairs.make_dataset(config, classes.VOC, entries, ids, upright=False)
