# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 in its devkit, with the masks of SBD where asked for."""

import io
import pathlib

import numpy as np

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import DataError, InputError


def read_list(path, problems):
  """Ids of a list, one a line, without repetition; problems are appended."""
  if not path.is_file():
    others = ', '.join(sorted(p.name for p in path.parent.glob('*.txt'))[:3])
    what = (
      f'no such list, there is {others}; it names the images of this split, '
      'one a line, without their ending'
    )
    problems.append(
      files.fault(path, 'split', what) if others else pairs.absent(path)
    )
    return []
  ids = [key for key in dict.fromkeys(files.read_lines(path)) if key]
  if not ids:
    problems.append(pairs.empty(path, 'names'))
  return ids


def pair_listed(ids, where, endings, problems):
  """[Pair, ...] in the order of a list of names without their ending.

  `where` and `endings` are of images and masks; what is missing becomes a
  problem.
  """
  images, labels = (
    files.without_ending(files.list_tree(folder, given))
    for folder, given in zip(where, endings, strict=True)
  )
  found = []
  for key in ids:
    if key in images and key in labels:
      found.append(pairs.Pair(key, images[key], labels[key]))
      continue
    folder = where[1] if key in images else where[0]
    what = f'{folder}: no partner for {key}, which the list of the split names.'
    problems.append(DataError(what, 'partner', folder / key))
  return found


class _VocLabels(masks.IndexLabels):
  """PNGs of VOC and .mat files of SBD to train ids."""

  def __call__(self, file):
    read = read_sbd if file.suffix == '.mat' else masks.read_mask
    return self.from_ids(file, read(file))


def read_sbd(file):
  """Class ids 0 to 20 of a file of SBD's folder cls, uint8 [h, w]."""
  import scipy.io  # Only for SBD.

  data = file.read()
  try:
    ids = scipy.io.loadmat(io.BytesIO(data))['GTcls'][0]['Segmentation'][0]
    ids = np.ascontiguousarray(ids, np.uint8)  # It comes by columns.
    if ids.ndim != 2:
      raise ValueError(f'of shape {ids.shape}')
    return ids
  except Exception as error:  # Of many types; all say that it is damaged.
    what = f'not a readable SBD mask ({error})'
    raise files.fault(file, 'unreadable', what) from error


def _sbd_pairs(root, taken, problems):
  """Pairs of SBD's train and val, sorted, but for the ids in `taken`."""
  try:
    import scipy.io  # noqa: F401
  except ImportError as error:
    raise InputError(
      "config.data.sbd_root needs scipy: pip install 'attnfd_jax[data]'."
    ) from error
  root = pathlib.Path(root)
  if (root / 'dataset').is_dir():  # As unpacked: benchmark_RELEASE/dataset.
    root = root / 'dataset'
  if not (root / 'cls').is_dir():
    what = (
      'no such folder; config.data.sbd_root is the folder benchmark_RELEASE'
    )
    problems.append(files.fault(root / 'cls', 'split', what))
    return []
  ids = {
    key
    for name in ('train.txt', 'val.txt')
    for key in read_list(root / name, problems)
  }
  where = (root / 'img', root / 'cls')
  return pair_listed(sorted(ids - taken), where, ('.jpg', '.mat'), problems)


def pascal_voc(config):
  """VOCdevkit/VOC2012, with SBD's images or the ready-made list trainaug."""
  root, problems = pairs.check_root(config), []
  for inner in ('VOC2012', 'VOCdevkit/VOC2012'):
    if not (root / 'JPEGImages').is_dir() and (root / inner).is_dir():
      root = root / inner
  images = root / 'JPEGImages'
  if not images.is_dir():
    raise pairs.absent(images)
  train_list, sbd_root = config['train_list'], config['sbd_root']
  if sbd_root and train_list != 'train':
    raise InputError(
      f'config.data.train_list={train_list!r} does not go with '
      "config.data.sbd_root, which adds to the list 'train'."
    )
  ids, found = {}, {}
  for split, name in (('train', train_list), ('val', 'val')):
    path = root / 'ImageSets' / 'Segmentation' / f'{name}.txt'
    ids[split] = read_list(path, problems)
    aug = 'Aug' if name == 'trainaug' else ''
    where = (images, root / f'SegmentationClass{aug}')
    found[split] = pair_listed(ids[split], where, ('.jpg', '.png'), problems)
  if sbd_root:
    taken = {*ids['train'], *ids['val']}
    found['train'] += _sbd_pairs(sbd_root, taken, problems)
  read_label = _VocLabels(tuple(range(len(classes.VOC))))
  # Annotated as stored.
  return pairs.make_dataset(
    config, classes.VOC, found, read_label, problems, upright=False
  )
