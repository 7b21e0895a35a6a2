# SPDX-License-Identifier: Apache-2.0
"""Reads Cityscapes with fine annotations, from folders or its zip files."""

from collections.abc import Iterable, Iterator, Sequence
import pathlib
from typing import TypeAlias

from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import DataError

_Listing: TypeAlias = tuple[pairs.Folder, list[files.File]]

# Where images and masks may be; the first one that has the split is used. The
# authors' code reads `images`.
IMAGES = ('leftImg8bit', 'images', 'leftImg8bit_trainvaltest.zip')
_EXTRA = 'leftImg8bit_trainextra.zip'
_MASKS = ('gtFine', 'gtFine_trainvaltest.zip')
_LABEL_IDS, _TRAIN_IDS = '_gtFine_labelIds', '_gtFine_labelTrainIds'


def list_split(
  root: pathlib.Path, places: Sequence[str], split: str
) -> _Listing:
  """Returns the folder or zip of a split and the PNGs in it.

  Args:
    root: of the data set.
    places: folders and zip files in `root`, tried in order.
    split: name of the split.

  Raises:
    DataError: if none of the places has the split.
  """
  for place in places:
    folder: pairs.Folder = root / place / split
    images = list(files.walk(folder, ('.png',)).files.values())
    if place.endswith('.zip') and (root / place).is_file():
      folder = files.File(str(root / place), f'{place.split("_")[0]}/{split}/')
      images = files.list_zip(folder.path, folder.member, ('.png',))
    if images:
      return folder, images
  what = f'not found or empty, and not in {places[-1]}'
  raise pairs.absent(root / places[0] / split, what)


def _list_both(root: pathlib.Path, split: str) -> list[_Listing | DataError]:
  """Lists images and masks; ends with a DataError if one is missing."""
  both = (list_split(root, places, split) for places in (IMAGES, _MASKS))
  return [*pairs.with_error(both)]


def _choose_suffix(listings: Iterable[list[_Listing | DataError]]) -> str:
  """Returns the suffix of train ids if there are no masks of label ids."""
  listed = [x for both in listings for x in both[1:] if isinstance(x, tuple)]
  stems = [file.inner.stem for _, group in listed for file in group]
  for suffix in (_LABEL_IDS, _TRAIN_IDS):
    if any(stem.endswith(suffix) for stem in stems):
      return suffix
  return _LABEL_IDS


def _find_pairs(
  both: list[_Listing | DataError], suffix: str
) -> Iterator[pairs.Entry]:
  if isinstance(both[-1], DataError):
    raise both[-1]
  listings = [x for x in both if not isinstance(x, DataError)]
  folders = [folder for folder, _ in listings]
  trees = [{x.inner.name: x for x in group} for _, group in listings]
  if suffix == _TRAIN_IDS:
    what = f'no *{_LABEL_IDS}.png; train ids are read from *{suffix}.png'
    yield pairs.Note(f'{folders[1]}: {what}')
  # The folder also has instance ids and colors.
  yield from pairs.match(folders, trees, ('_leftImg8bit', suffix))


def unlabeled(config: DataConfig) -> dict[str, files.File]:
  """Finds the images of train_extra, which has coarse masks only, by name."""
  root = pairs.check_root(config)
  _, images = list_split(root, (*IMAGES[:2], _EXTRA), 'train_extra')
  return {f'{x.inner.parent.name}/{x.inner.name}': x for x in images}


def cityscapes(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Reads the splits train and val; the labels of test are not public."""
  root, table = pairs.check_root(config), classes.CITYSCAPES
  listed = {x: _list_both(root, x) for x in splits if x != 'test'}
  suffix = _choose_suffix(listed.values())
  ids, ignored = classes.CITYSCAPES_IDS, classes.CITYSCAPES_IGNORED
  if suffix == _TRAIN_IDS:
    ids, ignored = tuple(range(len(table))), ()
  entries = {split: _find_pairs(both, suffix) for split, both in listed.items()}
  read_label = masks.IndexLabels(ids, ignored)
  return pairs.make_dataset(config, table, entries, read_label, upright=False)
