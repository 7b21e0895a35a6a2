# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

import contextlib

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import DataError

# Where images and masks may lie, the first place with a split wins; `images` is
# where the authors' code looks.
IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')
_LABEL_IDS, _TRAIN_IDS = '_gtFine_labelIds', '_gtFine_labelTrainIds'


def list_split(root, places, split):
  """The folder, or zip, of a split and the PNGs in it."""
  for place in places:
    folder = root / place / split
    found = files.walk(folder, ('.png',)).files.values()
    if place.endswith('.zip') and (root / place).is_file():
      folder = files.File(str(root / place), f'{place.split("_")[0]}/{split}/')
      found = files.list_zip(folder.path, folder.member, ('.png',))
    if found:
      return folder, found
  where = f'{places[0]}/{split}'
  raise pairs.absent(root / where, f'not found or empty, nor in {places[-1]}')


def _only_train_ids(root, splits):
  """Whether masks are those that createTrainIdLabelImgs.py writes, and no
  others.
  """
  stems = {_LABEL_IDS: 0, _TRAIN_IDS: 0}
  for split in splits:
    with contextlib.suppress(DataError):  # Raised where the split is read.
      for file in list_split(root, _MASKS, split)[1]:
        for suffix in stems:
          stems[suffix] += file.inner.stem.endswith(suffix)
  return stems[_TRAIN_IDS] and not stems[_LABEL_IDS]


def _find_pairs(root, split, suffix):
  found = [list_split(root, places, split) for places in (IMAGES, _MASKS)]
  folders, groups = zip(*found, strict=True)
  trees = [{file.inner.name: file for file in group} for group in groups]
  if suffix == _TRAIN_IDS:
    what = f'no *{_LABEL_IDS}.png; train ids are read from *{suffix}.png'
    yield pairs.Note(f'{folders[1]}: {what}')
  # Beside the label ids lie instance ids and colours.
  yield from pairs.match(folders, trees, ('_leftImg8bit', suffix))


def cityscapes(config, splits):
  """Splits train and val; the classes of test are not public."""
  root = pairs.check_root(config)
  splits = [split for split in splits if split != 'test']
  suffix, table = _LABEL_IDS, classes.CITYSCAPES
  ids, ignored = classes.CITYSCAPES_IDS, classes.CITYSCAPES_IGNORED
  if _only_train_ids(root, splits):
    suffix, ids, ignored = _TRAIN_IDS, tuple(range(len(table))), ()
  splits = {split: _find_pairs(root, split, suffix) for split in splits}
  read_label = masks.IndexLabels(ids, ignored)
  return pairs.make_dataset(config, table, splits, read_label, upright=False)
