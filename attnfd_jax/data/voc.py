# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 in its devkit, with the masks of SBD where asked for."""

import io
import itertools
import os
import pathlib
import re

import numpy as np

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import InputError

# Folders of `root` beside SegmentationClass.
_IMAGES, _AUGMENTED = 'JPEGImages', 'SegmentationClassAug'


def read_list(path):
  """Yields the lines of a list, without repetition."""
  if not path.is_file():
    others = ', '.join(sorted(p.name for p in path.parent.glob('*.txt'))[:3])
    if not others:
      raise pairs.absent(path)
    what = f'no such list, there is {others}; it names images without endings'
    raise files.fault(path, 'split', what)
  lines = [line for line in dict.fromkeys(files.read_lines(path)) if line]
  if not lines:
    raise files.fault(path, 'split', 'no names in it')
  yield from lines


def _stems(folder, endings=files.IMAGE_ENDINGS):
  """{path in the folder without its ending: File}."""
  found = files.walk(folder, endings).files
  return {os.path.splitext(name)[0]: file for name, file in found.items()}


def pair_listed(ids, where, both):
  """Yields the Pair, DataError or Note of ids in two folders, see `_stems`."""
  found = [pairs.renamed(side, ids, all_items=False) for side in both]
  for _, notes in found:
    yield from notes
  why = ', which the list of the split names'
  yield from pairs.join(ids, where, *(side for side, _ in found), why)


class _VocLabels(masks.IndexLabels):
  """PNGs of VOC and .mat files of SBD to train ids."""

  def __call__(self, file):
    read = read_sbd if file.inner.suffix == '.mat' else masks.read_mask
    return self.from_ids(file, read(file))


def read_sbd(file):
  """Class ids 0 to 20 of a file of SBD's folder cls, uint8 [h, w]."""
  import scipy.io  # Only for SBD.

  data = io.BytesIO(file.read())
  with masks.decoding(file, 'SBD mask'):
    ids = scipy.io.loadmat(data)['GTcls'][0]['Segmentation'][0]
    ids = np.ascontiguousarray(ids, np.uint8)  # It comes by columns.
    if ids.ndim != 2:
      raise ValueError(f'of shape {ids.shape}')
    return ids


def _sbd_folder(root):
  """The folder of SBD's lists: as unpacked, benchmark_RELEASE/dataset."""
  inner = pathlib.Path(root) / 'dataset'
  return inner if inner.is_dir() else inner.parent


def _sbd_pairs(root, taken):
  """Those of SBD's train and val, sorted, but for the ids in `taken`."""
  files.need('scipy.io', 'config.data.sbd_root')
  root = _sbd_folder(root)
  if not (root / 'cls').is_dir():
    what = 'no such folder; config.data.sbd_root is that of benchmark_RELEASE'
    raise files.fault(root / 'cls', 'split', what)
  ids = {*read_list(root / 'train.txt'), *read_list(root / 'val.txt')} - taken
  where = root / 'img', root / 'cls'
  both = _stems(where[0]), _stems(where[1], ('.mat',))
  yield from pair_listed(sorted(ids), where, both)


def _letters(name):
  return re.sub('[^a-z0-9]', '', name.lower())


def list_path(root, name):
  """The list of a split, or the only one that differs by case and signs."""
  folder = root / 'ImageSets' / 'Segmentation'
  path = folder / f'{name}.txt'
  if not path.exists():
    stems = ((x, _letters(x.stem)) for x in folder.glob('*.txt'))
    alike = [x for x, letters in stems if letters == _letters(name)]
    path = alike[0] if len(alike) == 1 else path
  return path


def _parse(line):
  """(id, folder of masks or '') of a line of names with endings or of paths.

  '/JPEGImages/X.jpg /Masks/X.png' is ('X', 'Masks'); what has no ending is an
  id as it stands.
  """
  paths = [pathlib.PurePosixPath(part.lstrip('/')) for part in line.split()]
  known = [path.suffix.lower() in files.IMAGE_ENDINGS for path in paths]
  if not 1 <= len(paths) <= 2 or not all(known):
    return line, ''
  image, *labels = paths
  parts = image.with_suffix('').parts
  folder = labels[0].parts[0] if labels and labels[0].parts[1:] else ''
  return '/'.join(parts[parts[0] == _IMAGES :]), folder


def _ids(lines):
  """All that lines of lists can mean: they themselves, and as `_parse` reads
  them.
  """
  lines = {*lines}
  return lines | {_parse(line)[0] for line in lines}


def read_split(root, name, labels='SegmentationClass'):
  """Yields what a list in VOC's layout names; `labels` is a folder of `root`.

  Lines may also be paths, see `_parse`. SegmentationClassAug is taken where it
  has all masks and `labels` has not.
  """
  path, images = list_path(root, name), root / _IMAGES
  lines, stems = [*read_list(path)], _stems(images)
  if path.stem != name:
    yield pairs.Note(f'{path.name} is read; there is no {name}.txt')
  # What is a name is one, even if it looks like a path.
  rows = [(x, '') if x in stems else _parse(x) for x in lines]
  ids, folders = [x for x, _ in rows], {x for _, x in rows if x}
  if ids != lines:
    yield pairs.Note(
      f'{path}: {lines[0]!r} and the like are read as {ids[0]!r}'
    )
  if len(folders) > 1:
    what = f'masks in {len(folders)} folders ({", ".join(sorted(folders)[:3])})'
    raise files.fault(path, 'split', f'{what}; needs one')
  where = root / (folders or {labels}).pop()
  found = _stems(where)
  if not found.keys() >= {*ids}:
    other = root / _AUGMENTED
    more = _stems(other)
    if more.keys() >= {*ids}:
      yield pairs.Note(f'masks are read from {other}, for {where} lacks some')
      where, found = other, more
  yield from pair_listed(ids, (images, where), (stems, found))


def _find_root(config):
  """The folder that has JPEGImages."""
  root = pairs.check_root(config)
  for inner in ('VOC2012', 'VOCdevkit/VOC2012'):
    if not (root / _IMAGES).is_dir() and (root / inner).is_dir():
      root = root / inner
  if not (root / _IMAGES).is_dir():
    raise pairs.absent(root / _IMAGES)
  return root


def unlabeled(config):
  """{name: File} of JPEGImages that no list of the segmentation task names, and
  SBD neither, where it is used.
  """
  root = _find_root(config)
  lists = [*list_path(root, 'train').parent.glob('*.txt')]
  if sbd_root := config['sbd_root']:
    folder = _sbd_folder(sbd_root)
    lists += [folder / 'train.txt', folder / 'val.txt']
  named = _ids(line for path in lists for line in read_list(path))
  found = files.walk(root / _IMAGES).files
  rest = {k: x for k, x in found.items() if os.path.splitext(k)[0] not in named}
  if not rest:
    raise pairs.absent(root / _IMAGES, 'the lists name all images in it')
  return rest


def pascal_voc(config, splits):
  """VOCdevkit/VOC2012, with SBD's images or the ready-made list trainaug."""
  root = _find_root(config)
  train_list, sbd_root = config['train_list'], config['sbd_root']
  if sbd_root and train_list != 'train':
    what = f'config.data.train_list={train_list!r} does not go with'
    raise InputError(f"{what} config.data.sbd_root, which adds to 'train'.")
  labels = ()
  if _letters(train_list) == 'trainaug' and (root / _AUGMENTED).is_dir():
    labels = (_AUGMENTED,)
  train = read_split(root, train_list, *labels)
  found = {'train': train, 'val': read_split(root, 'val')}
  if sbd_root:
    lists = (read_list(list_path(root, split)) for split in found)
    lines = [line for x in lists for line in pairs.with_error(x)]
    # As read_split reads them: no image of val may come in by SBD.
    taken = _ids(line for line in lines if isinstance(line, str))
    extra = _sbd_pairs(sbd_root, taken)
    found['train'] = itertools.chain(pairs.with_error(train), extra)
  splits = {split: found[split] for split in splits if split in found}
  ids = _VocLabels(tuple(range(len(classes.VOC))))
  # Annotated as stored.
  return pairs.make_dataset(config, classes.VOC, splits, ids, upright=False)
