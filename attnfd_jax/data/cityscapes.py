# SPDX-License-Identifier: Apache-2.0
"""Cityscapes with fine annotations, from its folders or its zip files."""

from attnfd_jax.data import classes, files, masks, pairs

# Folders or archives that may hold each kind of file, the first one wins;
# `images` is where the authors' code looks.
_IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')


def _find(root, split, places, ending, problems):
  """Folder of a split and {city_sequence_frame: File} of its files.

  A folder that is absent is a problem.
  """
  place = next((p for p in places if (root / p).exists()), places[0])
  if place.endswith('.zip'):
    prefix = f'{place.split("_")[0]}/{split}/'
    found = files.list_zip(root / place, prefix, ('.png',))
    folder = files.File(str(root / place), prefix)
  else:
    folder = root / place / split
    if not folder.is_dir():
      problems.append(pairs.absent(folder))
    found = files.list_tree(folder, ('.png',)).values()
  found = {f.stem: f for f in found}
  # Beside the label ids lie instance ids and colours.
  return folder, {
    stem.removesuffix(ending): file
    for stem, file in sorted(found.items())
    if stem.endswith(ending)
  }


def _find_pairs(root, split, problems):
  known = len(problems)
  left, images = _find(root, split, _IMAGES, '_leftImg8bit', problems)
  right, labels = _find(root, split, _MASKS, '_gtFine_labelIds', problems)
  if len(problems) > known:
    return []
  if not images:
    problems.append(pairs.empty(left, '*_leftImg8bit.png files'))
    return []
  return pairs.match(images, labels, (left, right), problems)


def cityscapes(config):
  """Splits train and val; the classes of test are not public."""
  root, problems = pairs.check_root(config), []
  found = {s: _find_pairs(root, s, problems) for s in ('train', 'val')}
  ids = classes.CITYSCAPES_IDS
  ignored = {*range(classes.CITYSCAPES_NUM_IDS)} - {*ids}
  read_label = masks.IndexLabels(ids, tuple(sorted(ignored)))
  return pairs.make_dataset(
    config, classes.CITYSCAPES, found, read_label, problems, upright=False
  )
