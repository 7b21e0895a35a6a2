# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs

# Folders or archives that may hold each kind of file, the first one wins;
# `images` is where the authors' code looks.
_IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')


def _find(root, split, places):
  """Files of a split, and their folder."""
  place = next((p for p in places if (root / p).exists()), places[0])
  if place.endswith('.zip'):
    prefix = f'{place.split("_")[0]}/{split}/'
    found = files.list_zip(root / place, prefix, ('.png',))
    return found, files.File(str(root / place), prefix)
  folder = root / place / split
  if not folder.is_dir():
    raise pairs.absent(folder)
  return files.list_tree(folder, ('.png',)).values(), folder


def _find_pairs(root, split):
  images, left = _find(root, split, _IMAGES)
  labels, right = _find(root, split, _MASKS)
  # Beside the label ids lie instance ids and colours.
  endings = ('_leftImg8bit', '_gtFine_labelIds')
  yield from pairs.match(images, labels, (left, right), endings)


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
