# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 in its devkit, with the masks of SBD where asked for."""

import dataclasses
import io
import pathlib

import numpy as np

from attnfd_jax.data import classes
from attnfd_jax.data import files
from attnfd_jax.data.masks import IndexLabels
from attnfd_jax.data.masks import read_mask
from attnfd_jax.data.pairs import absent
from attnfd_jax.data.pairs import check_root
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.data.pairs import empty
from attnfd_jax.data.pairs import make_source
from attnfd_jax.data.pairs import Pair
from attnfd_jax.errors import DataError
from attnfd_jax.errors import InputError


def read_list(path, problems):
  """Ids of a list, one a line, without repetition; problems are appended."""
  if not path.is_file():
    others = sorted(p.name for p in path.parent.glob('*.txt'))[:3]
    error = absent(path)
    if others:
      error = DataError(
        f'{path}: no such list, there is {", ".join(others)}; it names the '
        'images of this split, one a line, without their ending.',
        'split',
        path,
      )
    problems.append(error)
    return []
  ids = [key for key in dict.fromkeys(files.read_lines(path)) if key]
  if not ids:
    problems.append(empty(path, 'names'))
  return ids


def pair_listed(ids, images, masks, where, problems):
  """[Pair, ...] in the order of a list.

  Args:
    ids: of the list.
    images, masks: {id: File}.
    where: folders of both, for messages.
    problems: what is missing is appended.
  """
  pairs = []
  for key in ids:
    gone = [where[i] for i, d in enumerate((images, masks)) if key not in d]
    if gone:
      problems.append(
        DataError(
          f'{gone[0]}: no partner for {key}, which the list of the split '
          'names.',
          'partner',
          pathlib.Path(gone[0]) / key,
        )
      )
    else:
      pairs.append(Pair(key, images[key], masks[key]))
  return pairs


@dataclasses.dataclass(frozen=True)
class _VocLabels:
  """PNGs of VOC and .mat files of SBD to train ids."""

  index: IndexLabels

  def __call__(self, file):
    ids = read_sbd(file) if file.suffix == '.mat' else read_mask(file)
    return self.index.from_ids(file, ids)


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
    raise DataError(
      f'{file}: not a readable SBD mask ({error}).', 'unreadable', file
    ) from error


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
    problems.append(
      DataError(
        f'{root / "cls"}: no such folder; config.data.sbd_root is the folder '
        'benchmark_RELEASE.',
        'split',
        root / 'cls',
      )
    )
    return []
  ids = set(read_list(root / 'train.txt', problems))
  ids.update(read_list(root / 'val.txt', problems))
  where = (root / 'img', root / 'cls')
  return pair_listed(
    sorted(ids - taken),
    files.without_ending(files.list_tree(where[0], ('.jpg',))),
    files.without_ending(files.list_tree(where[1], ('.mat',))),
    where,
    problems,
  )


def pascal_voc(config):
  """VOCdevkit/VOC2012, with SBD's images or the ready-made list trainaug."""
  root, problems = check_root(config), []
  for inner in ('VOC2012', 'VOCdevkit/VOC2012'):
    if not (root / 'JPEGImages').is_dir() and (root / inner).is_dir():
      root = root / inner
  lists = root / 'ImageSets' / 'Segmentation'
  if not (root / 'JPEGImages').is_dir():
    raise absent(root / 'JPEGImages')
  train_list, sbd_root = config['train_list'], config['sbd_root']
  if sbd_root and train_list != 'train':
    raise InputError(
      f'config.data.train_list={train_list!r} does not go with '
      "config.data.sbd_root, which adds to the list 'train'."
    )
  images = files.list_tree(root / 'JPEGImages', ('.jpg',))
  images = files.without_ending(images)
  ids = {
    'train': read_list(lists / f'{train_list}.txt', problems),
    'val': read_list(lists / 'val.txt', problems),
  }
  read_label = _VocLabels(IndexLabels(tuple(range(len(classes.VOC)))))
  splits = {}
  for split in ids:
    masks = root / 'SegmentationClass'
    if split == 'train' and train_list == 'trainaug':
      masks = root / 'SegmentationClassAug'
    pairs = pair_listed(
      ids[split],
      images,
      files.without_ending(files.list_tree(masks, ('.png',))),
      (root / 'JPEGImages', masks),
      problems,
    )
    if split == 'train' and sbd_root:
      taken = {*ids['train'], *ids['val']}
      pairs += _sbd_pairs(sbd_root, taken, problems)
    if pairs:
      # Annotated as stored.
      splits[split] = make_source(config, pairs, read_label, upright=False)
  names, palette = classes.names_and_palette(classes.VOC)
  return Dataset('pascal_voc', names, palette, splits, tuple(problems))
