# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 in its devkit, with the masks of SBD where asked for."""

import io
import itertools
import os
import pathlib

import numpy as np

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import InputError


def read_list(path):
  """Yields the ids of a list, one a line, without repetition."""
  if not path.is_file():
    others = ', '.join(sorted(p.name for p in path.parent.glob('*.txt'))[:3])
    if not others:
      raise pairs.absent(path)
    what = f'no such list, there is {others}; it names images without endings'
    raise files.fault(path, 'split', what)
  ids = [key for key in dict.fromkeys(files.read_lines(path)) if key]
  if not ids:
    raise files.fault(path, 'split', 'no names in it')
  yield from ids


def pair_listed(ids, where, label_endings=pairs.IMAGE_ENDINGS):
  """Yields the Pair, or the DataError, of each id in and below two folders."""
  both = (
    {os.path.splitext(k)[0]: x for k, x in files.list_tree(*given).items()}
    for given in zip(where, (pairs.IMAGE_ENDINGS, label_endings), strict=True)
  )
  why = ', which the list of the split names'
  yield from pairs.join(ids, where, *both, why)


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


def _sbd_pairs(root, taken):
  """Those of SBD's train and val, sorted, but for the ids in `taken`."""
  files.need('scipy.io', 'config.data.sbd_root')
  if (root / 'dataset').is_dir():  # As unpacked: benchmark_RELEASE/dataset.
    root = root / 'dataset'
  if not (root / 'cls').is_dir():
    what = 'no such folder; config.data.sbd_root is that of benchmark_RELEASE'
    raise files.fault(root / 'cls', 'split', what)
  ids = {*read_list(root / 'train.txt'), *read_list(root / 'val.txt')} - taken
  yield from pair_listed(sorted(ids), (root / 'img', root / 'cls'), ('.mat',))


def list_path(root, name):
  return root / 'ImageSets' / 'Segmentation' / f'{name}.txt'


def read_split(root, name, labels='SegmentationClass'):
  """`pair_listed` of a list in VOC's layout; `labels` is a folder of it."""
  ids = read_list(list_path(root, name))
  return pair_listed(ids, (root / 'JPEGImages', root / labels))


def pascal_voc(config):
  """VOCdevkit/VOC2012, with SBD's images or the ready-made list trainaug."""
  root = pairs.check_root(config)
  for inner in ('VOC2012', 'VOCdevkit/VOC2012'):
    if not (root / 'JPEGImages').is_dir() and (root / inner).is_dir():
      root = root / inner
  if not (root / 'JPEGImages').is_dir():
    raise pairs.absent(root / 'JPEGImages')
  train_list, sbd_root = config['train_list'], config['sbd_root']
  if sbd_root and train_list != 'train':
    what = f'config.data.train_list={train_list!r} does not go with'
    raise InputError(f"{what} config.data.sbd_root, which adds to 'train'.")
  aug = 'Aug' if train_list == 'trainaug' else ''
  train = read_split(root, train_list, f'SegmentationClass{aug}')
  splits = {'train': train, 'val': read_split(root, 'val')}
  if sbd_root:
    lists = (read_list(list_path(root, split)) for split in splits)
    taken = {key for ids in lists for key in pairs.with_error(ids)}
    extra = _sbd_pairs(pathlib.Path(sbd_root), taken)
    splits['train'] = itertools.chain(pairs.with_error(train), extra)
  ids = _VocLabels(tuple(range(len(classes.VOC))))
  # Annotated as stored.
  return pairs.make_dataset(config, classes.VOC, splits, ids, upright=False)
