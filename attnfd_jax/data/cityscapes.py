# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs

# Folders or archives that may hold images and masks, the first one wins;
# `images` is where the authors' code looks.
_PLACES = (
  ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip'),
  ('gtFine', 'gtFine_trainvaltest.zip'),
)


def _find_pairs(root, split):
  groups, folders = [], []
  for places in _PLACES:
    place = next((p for p in places if (root / p).exists()), places[0])
    folder = root / place / split
    if place.endswith('.zip'):
      prefix = f'{place.split("_")[0]}/{split}/'
      folder = files.File(str(root / place), prefix)
      groups.append(files.list_zip(root / place, prefix, ('.png',)))
    elif folder.is_dir():
      groups.append(files.list_tree(folder, ('.png',)).values())
    else:
      raise pairs.absent(folder)
    folders.append(folder)
  # Beside the label ids lie instance ids and colours.
  suffixes = ('_leftImg8bit', '_gtFine_labelIds')
  yield from pairs.match(*groups, folders, suffixes)


def cityscapes(config):
  """Splits train and val; the classes of test are not public."""
  root = pairs.check_root(config)
  splits = {split: _find_pairs(root, split) for split in ('train', 'val')}
  read_label = masks.IndexLabels(
    classes.CITYSCAPES_IDS, classes.CITYSCAPES_IGNORED
  )
  return pairs.make_dataset(
    config, classes.CITYSCAPES, splits, read_label, upright=False
  )
