# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs

# Where images and masks may lie, the first place with a split wins; `images` is
# where the authors' code looks.
IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')


def list_split(root, places, split):
  """The folder, or zip, of a split and the PNGs in it."""
  for place in places:
    folder = root / place / split
    found = files.list_tree(folder, ('.png',)).values()
    if place.endswith('.zip') and (root / place).is_file():
      folder = files.File(str(root / place), f'{place.split("_")[0]}/{split}/')
      found = files.list_zip(folder.path, folder.member, ('.png',))
    if found:
      return folder, found
  where = f'{places[0]}/{split}'
  raise pairs.absent(root / where, f'not found or empty, nor in {places[-1]}')


def _find_pairs(root, split):
  images, labels = (list_split(root, x, split) for x in (IMAGES, _MASKS))
  # Beside the label ids lie instance ids and colours.
  suffixes = ('_leftImg8bit', '_gtFine_labelIds')
  yield from pairs.match(*zip(images, labels, strict=True), suffixes)


def cityscapes(config):
  """Splits train and val; the classes of test are not public."""
  root = pairs.check_root(config)
  splits = {split: _find_pairs(root, split) for split in ('train', 'val')}
  table, ids = classes.CITYSCAPES, classes.CITYSCAPES_IDS
  read_label = masks.IndexLabels(ids, classes.CITYSCAPES_IGNORED)
  return pairs.make_dataset(config, table, splits, read_label, upright=False)
