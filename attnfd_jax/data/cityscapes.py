# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs

# Folders or archives that may hold each kind of file, the first one wins;
# `images` is where the authors' code looks.
_IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')


def _find(root, split, places, ending):
  """Folder of a split and its [(city_sequence_frame, File), ...]."""
  place = next((p for p in places if (root / p).exists()), places[0])
  if place.endswith('.zip'):
    prefix = f'{place.split("_")[0]}/{split}/'
    folder = files.File(str(root / place), prefix)
    found = files.list_zip(root / place, prefix, ('.png',))
  else:
    folder = root / place / split
    if not folder.is_dir():
      raise pairs.absent(folder)
    found = files.list_tree(folder, ('.png',)).values()
  # Beside the label ids lie instance ids and colours.
  found = [file for file in found if file.stem.endswith(ending)]
  return folder, [(file.stem.removesuffix(ending), file) for file in found]


def _find_pairs(root, split):
  left, images = _find(root, split, _IMAGES, '_leftImg8bit')
  right, labels = _find(root, split, _MASKS, '_gtFine_labelIds')
  if not images:
    raise pairs.empty(left, '*_leftImg8bit.png files')
  yield from pairs.match(images, labels, (left, right))


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
