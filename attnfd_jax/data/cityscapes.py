# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import DataError

# Where images and masks may lie, the first place with a split wins; `images` is
# where the authors' code looks.
IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_EXTRA = 'leftImg8bit_trainextra.zip'
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


def _list_both(root, split):
  """[(folder, Files), ...] of images and masks; a DataError where one lacks."""
  both = (list_split(root, places, split) for places in (IMAGES, _MASKS))
  return [*pairs.with_error(both)]


def _choose_suffix(listings):
  """That of train ids if createTrainIdLabelImgs.py made the only masks."""
  found = [x for _, *labels in listings for x in labels if type(x) is tuple]
  stems = [file.inner.stem for _, group in found for file in group]
  for suffix in (_LABEL_IDS, _TRAIN_IDS):
    if any(stem.endswith(suffix) for stem in stems):
      return suffix
  return _LABEL_IDS


def _find_pairs(both, suffix):
  if isinstance(both[-1], DataError):
    raise both[-1]
  folders, groups = zip(*both, strict=True)
  trees = [{file.inner.name: file for file in group} for group in groups]
  if suffix == _TRAIN_IDS:
    what = f'no *{_LABEL_IDS}.png; train ids are read from *{suffix}.png'
    yield pairs.Note(f'{folders[1]}: {what}')
  # Beside the label ids lie instance ids and colours.
  yield from pairs.match(folders, trees, ('_leftImg8bit', suffix))


def unlabeled(config):
  """{name: File} of train_extra, of which only coarse masks exist."""
  root = pairs.check_root(config)
  _, found = list_split(root, (*IMAGES[:2], _EXTRA), 'train_extra')
  return {f'{x.inner.parent.name}/{x.inner.name}': x for x in found}


def cityscapes(config, splits):
  """Splits train and val; the classes of test are not public."""
  root, table = pairs.check_root(config), classes.CITYSCAPES
  listed = {x: _list_both(root, x) for x in splits if x != 'test'}
  suffix = _choose_suffix(listed.values())
  ids, ignored = classes.CITYSCAPES_IDS, classes.CITYSCAPES_IGNORED
  if suffix == _TRAIN_IDS:
    ids, ignored = tuple(range(len(table))), ()
  splits = {split: _find_pairs(both, suffix) for split, both in listed.items()}
  read_label = masks.IndexLabels(ids, ignored)
  return pairs.make_dataset(config, table, splits, read_label, upright=False)
