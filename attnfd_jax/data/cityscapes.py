# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes
from attnfd_jax.data import files
from attnfd_jax.data.masks import IndexLabels
from attnfd_jax.data.pairs import absent
from attnfd_jax.data.pairs import check_root
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.data.pairs import empty
from attnfd_jax.data.pairs import make_source
from attnfd_jax.data.pairs import match

# Folders or archives that may hold each kind of file, the first one wins;
# `images` is where the authors' code looks.
_IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')


def _find(root, split, places, ending):
  """Folder of a split and {city_sequence_frame: File} of its files.

  Returns:
    The folder and None, if there is no such folder.
  """
  place = next((p for p in places if (root / p).exists()), places[0])
  if place.endswith('.zip'):
    prefix = f'{place.split("_")[0]}/{split}/'
    found = files.list_zip(root / place, prefix, ('.png',))
    folder = files.File(str(root / place), prefix)
  else:
    folder = root / place / split
    if not folder.is_dir():
      return folder, None
    found = files.list_tree(folder, ('.png',)).values()
  found = {f.stem: f for f in found}
  # Beside the label ids lie instance ids and colours.
  return folder, {
    stem.removesuffix(ending): file
    for stem, file in sorted(found.items())
    if stem.endswith(ending)
  }


def cityscapes(config):
  """Splits train and val; the classes of test are not public."""
  root, problems, splits = check_root(config), [], {}
  read_label = IndexLabels(
    classes.CITYSCAPES_IDS,
    ignored=tuple(
      i
      for i in range(classes.CITYSCAPES_NUM_IDS)
      if i not in classes.CITYSCAPES_IDS
    ),
  )
  for split in ('train', 'val'):
    left, images = _find(root, split, _IMAGES, '_leftImg8bit')
    right, masks = _find(root, split, _MASKS, '_gtFine_labelIds')
    for folder, found in ((left, images), (right, masks)):
      if found is None:
        problems.append(absent(folder))
    if images is None or masks is None:
      continue
    if not images:
      problems.append(empty(left, '*_leftImg8bit.png files'))
      continue
    pairs = match(images, masks, (left, right), problems)
    if pairs:
      splits[split] = make_source(config, pairs, read_label, upright=False)
  names, palette = classes.names_and_palette(classes.CITYSCAPES)
  return Dataset('cityscapes', names, palette, splits, tuple(problems))
