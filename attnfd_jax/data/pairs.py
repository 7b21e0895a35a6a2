# SPDX-License-Identifier: Apache-2.0
"""Pairs images and masks by name, and decodes and checks them when read."""

import abc
import collections
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
import dataclasses
import os
import pathlib
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from attnfd_jax.data import cache, files, masks, matching
from attnfd_jax.data.classes import Color
from attnfd_jax.data.records import DataConfig, Record, Size, Source
from attnfd_jax.errors import DataError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.types import StrPath

SPLITS = ('train', 'val', 'test')
# An additional split of images without masks, see unlabeled.py.
UNLABELED = 'unlabeled'

_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The splits of a data set, and the names and colors of its classes."""

  name: str
  class_names: tuple[str, ...]
  palette: np.ndarray  # uint8 [k, 3]
  splits: dict[str, Source]
  # Found in file names and annotations; pixels have not been read yet.
  problems: tuple[DataError, ...] = ()
  notes: tuple[str, ...] = ()  # What was skipped or reinterpreted.
  # Keys of the config whose values were inferred from the files.
  detected: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Pair:
  """An image and its mask."""

  key: str  # Unique in its split.
  image: files.File
  mask: files.File | None = None  # None for an unlabeled image.
  mask_name: str = ''  # In messages, if the file name is not suitable.


class Note(NamedTuple):
  """Information for the user that is printed and logged once; not an error."""

  text: str


Entry: TypeAlias = Pair | Note | DataError
# Reads a mask as train ids, uint8 [h, w].
ReadLabel: TypeAlias = Callable[[files.File], np.ndarray]
# A folder, or a zip file with a prefix of member names.
Folder: TypeAlias = pathlib.Path | files.File


def no_label(size: Size) -> np.ndarray:
  """Returns a label, uint8 [h, w], that all losses and metrics ignore."""
  return np.full(size, IGNORE_LABEL, np.uint8)


class Decoded(abc.ABC):
  """Base class of sources that can keep their decoded records in memory."""

  def __init__(self, length: int, *, cache: bool):
    self._length = length
    self._cache: dict[int, Record] | None = {} if cache else None

  @property
  def cached(self) -> bool:
    """Whether records are kept in memory."""
    return self._cache is not None

  @abc.abstractmethod
  def _read(self, index: int) -> Record:
    """Reads and decodes a record."""

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    """Returns a record, from memory if it is kept there."""
    if self._cache is None:
      return self._read(index)
    if index not in self._cache:
      self._cache[index] = self._read(index)
    return dict(self._cache[index])

  def __getstate__(self) -> dict[str, Any]:
    # Each worker process fills its own cache.
    return self.__dict__ | {'_cache': None if self._cache is None else {}}


class PairSource(Decoded):
  """Random access to pairs; invalid files raise a DataError when read."""

  def __init__(
    self,
    pairs: Sequence[Pair] | Any,
    read_label: ReadLabel | None,
    *,
    limit: int = 0,
    cache: bool = False,
    upright: bool = True,
    mark: bytes = b'',
  ):
    """Creates a source.

    Args:
      pairs: images and masks; with `mark`, anything with len and index.
      read_label: picklable; None if no pair has a mask.
      limit: number of pairs to use, 0 for all.
      cache: whether to keep decoded records in memory.
      upright: whether to reject images with an EXIF rotation. False if masks
        are known to match the pixels as stored.
      mark: identifies the content of pairs that are not separate files.
    """
    super().__init__(min(limit or len(pairs), len(pairs)), cache=cache)
    self.pairs, self._upright, self._mark = pairs, upright, mark
    self.read_label: Any = read_label

  def encoded(self, index: int) -> dict[str, Any]:
    """Like source[index], also checked, but the image as encoded bytes."""
    data = self.pairs[index].image.read()
    return {**self._read(index, data), 'image': data}

  def image(self, index: int) -> np.ndarray:
    """Decodes the image, uint8 [h, w, 3] RGB, without opening the mask."""
    file = self.pairs[index].image
    return masks.decode_image(file, file.read())

  def label(self, index: int) -> np.ndarray:
    """Reads the train ids, uint8 [h, w], without decoding the image."""
    mask = self.pairs[index].mask
    return self.read_label(mask) if mask else no_label(self.size(index))

  def fingerprint(self, start: int = 0, stop: int | None = None) -> str:
    """Hex digest that changes with the files and how masks are interpreted."""
    pairs = () if self._mark else self.pairs[: len(self)][start:stop]
    both = (file for pair in pairs for file in (pair.image, pair.mask))
    read = [file for file in both if file]
    return cache.digest(read, repr(self.read_label).encode() + self._mark)

  def key(self, index: int) -> str:
    """Unique name of a pair in its split."""
    return self.pairs[index].key

  def name(self, index: int) -> str:
    """Name of the image in messages."""
    return str(self.pairs[index].image)

  def size(self, index: int) -> Size:
    """Height and width, without decoding."""
    return masks.read_size(self.pairs[index].image)

  def _read(self, index: int, data: bytes | None = None) -> Record:
    pair: Pair = self.pairs[index]
    data = pair.image.read() if data is None else data
    image = masks.decode_image(pair.image, data)
    if not pair.mask:
      return {'image': image, 'label': no_label(image.shape[:2])}
    if self._upright:
      masks.check_upright(pair.image, data)
    label = self.read_label(pair.mask)
    if image.shape[:2] != label.shape:
      (h, w, _), (rows, columns) = image.shape, label.shape
      what = f'mask is {columns}x{rows}, its image {w}x{h} (width x height)'
      raise files.data_error(pair.mask_name or pair.mask, 'size', what)
    return {'image': image, 'label': label}


def with_error(entries: Iterable[_T]) -> Iterator[_T | DataError]:
  """Yields the entries, then the DataError that iterating raises, if any."""
  try:
    yield from entries
  except DataError as error:
    yield error


def sorted_out(
  split: str, entries: Iterable[Entry]
) -> tuple[list[Pair], list[DataError], list[str]]:
  """Sorts the entries of a split into pairs, errors and the texts of notes."""
  groups: dict[type, list[Any]] = collections.defaultdict(list)
  for entry in with_error(entries):
    groups[type(entry)].append(entry)
  notes = [f'{split}: {note.text}' for note in groups[Note]]
  return groups[Pair], groups[DataError], notes


def make_dataset(
  config: DataConfig,
  table: Mapping[str, Color],
  splits: Mapping[str, Iterable[Entry]],
  read_label: ReadLabel,
  *,
  upright: bool = True,
  notes: Iterable[str] = (),
  detected: Mapping[str, Any] | None = None,
) -> Dataset:
  """Makes a Dataset of pairs.

  Args:
    config: the group `data`.
    table: color of each class, in the order of train ids.
    splits: entries of each split; iterating may raise a DataError. A split
      without pairs is left out.
    read_label: see PairSource.
    upright: see PairSource.
    notes: additional notes.
    detected: see Dataset.
  """
  sources, problems, texts = {}, [], [*notes]
  for split, entries in splits.items():
    valid, errors, more = sorted_out(split, entries)
    problems, texts = problems + errors, texts + more
    if valid:
      sources[split] = PairSource(
        valid,
        read_label,
        limit=config['limit'],
        cache=config['cache'],
        upright=upright,
      )
  return Dataset(
    name=config['name'],
    class_names=tuple(table),
    palette=np.array(list(table.values()), np.uint8),
    splits=sources,
    problems=tuple(problems),
    notes=tuple(texts),
    detected=dict(detected or {}),
  )


def absent(path: files.File | StrPath, what: str = 'not found') -> DataError:
  """Returns the DataError of a missing folder or list."""
  hint = 'is config.data.root right? (--config.data.root=PATH)'
  return files.data_error(path, 'split', f'{what}; {hint}')


def check_root(config: DataConfig) -> pathlib.Path:
  """Returns config.data.root as a path.

  Raises:
    DataError: if there is no such folder.
  """
  root = config['root']
  if not root or not pathlib.Path(root).is_dir():
    raise absent(root or 'config.data.root', 'no such folder')
  return pathlib.Path(root)


def no_images(
  folder: Folder, suffix: str = '', others: Collection[str] = ()
) -> DataError:
  """Returns the DataError of a folder that has no images.

  Args:
    folder: where images were expected.
    suffix: required end of their names, before the extension.
    others: names of other files in the folder.
  """
  what = f'no files *{suffix}{", ".join(files.IMAGE_ENDINGS)} in it'
  if others:
    what += f', but {count_endings(others)}'
  if any(name.endswith('.txt') for name in others):
    what += '; YOLO labels are not supported: masks are images of class ids'
  return files.data_error(folder, 'split', what)


def count_endings(names: Iterable[str]) -> str:
  """Summarizes names by extension: '3 *.txt (a.txt), 1 *.db (Thumbs.db)'."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[os.path.splitext(name)[1].lower()].append(name)
  ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
  return ', '.join(f'{len(x)} *{end} ({x[0]})' for end, x in ordered[:5])


def no_partner(
  folder: Folder, name: str, why: str = '', file: files.File | None = None
) -> DataError:
  """Returns the DataError of an image or mask without its counterpart.

  Args:
    folder: where the counterpart was expected.
    name: name of the image or mask.
    why: appended to the name in the message.
    file: the image or mask, if it exists.
  """
  what = f'{folder}: no partner for {name}{why}.'
  return DataError(what, 'partner', file or pathlib.Path(str(folder), name))


def _some(names: Iterable[str]) -> str:
  names = sorted(names)
  return ', '.join(names[:2]) + ', ...' * (len(names) > 2)


def join(
  keys: Iterable[str],
  folders: Sequence[Folder],
  images: Mapping[str, files.File],
  labels: Mapping[str, files.File],
  why: str = '',
) -> Iterator[Pair | DataError]:
  """Yields the pair of each key, or errors if it is incomplete.

  Args:
    keys: names of the pairs.
    folders: of the images and of the masks, for messages.
    images: by key.
    labels: masks by key.
    why: see no_partner.
  """
  for key in keys:
    if key in images and key in labels:
      both = images[key], labels[key]
      broken = [file.broken() for file in both if file.target]
      yield from broken or [Pair(key, *both)]
    else:
      file = images.get(key) or labels.get(key)
      name = file.inner.name if file else key
      yield no_partner(folders[key in images], name, why, file)


def renamed(
  items: Mapping[str, files.File],
  keys: Collection[str],
  *,
  all_items: bool = True,
) -> tuple[dict[str, files.File], list[Note]]:
  """Renames items to the keys that `matching.agree` finds for them.

  Args:
    items: files by name.
    keys: expected names.
    all_items: see matching.agree.

  Returns:
    The items, unmatched ones under their own names, and at most one note.
  """
  matches, difference = matching.agree(keys, items, all_items=all_items)
  others = items.keys() - {*matches.values()}
  result = {x: items[x] for x in others} | {
    x: items[y] for x, y in matches.items()
  }
  what = f'{len(matches)} names were matched although they differ: {difference}'
  return result, [Note(what)] if difference else []


def match(
  folders: Sequence[Folder],
  trees: Sequence[Mapping[str, files.File]],
  suffixes: Sequence[str] = ('', ''),
) -> Iterator[Entry]:
  """Yields pairs, notes, and an error for each file without a counterpart.

  An image and its mask have the same name except for suffix and extension, or
  match by `matching.agree`.

  Args:
    folders: of the images and of the masks, for messages.
    trees: images and masks by path relative to their folder.
    suffixes: ends of the stems of images and masks; other files are skipped.

  Raises:
    DataError: if a side has no files, or no names match.
  """
  both: tuple[dict[str, files.File], dict[str, files.File]] = {}, {}
  sides = zip(both, folders, trees, suffixes, strict=True)
  for by_key, folder, tree, suffix in sides:
    for name, file in tree.items():
      stem = os.path.splitext(name)[0]
      if stem.endswith(suffix):
        key = stem.removesuffix(suffix)
        if (first := by_key.setdefault(key, file)) != file:
          names = f'{first.inner.name}, {file.inner.name}'
          what = f'{folder}: {names} have the same stem; keep one of them.'
          yield DataError(what, 'partner', file)
  images, labels = both
  for by_key, folder, suffix in zip(both, folders, suffixes, strict=True):
    if not by_key:
      raise no_images(folder, suffix)
  labels, notes = renamed(labels, images)
  yield from notes
  if not images.keys() & labels.keys():
    what = f'no mask has the name of an image; images are {_some(images)}'
    need = 'an image and its mask need the same name, without the extension'
    what = f'{folders[1]}: {what}, masks {_some(labels)}; {need}.'
    raise DataError(what, 'partner', folders[1])
  yield from join(
    sorted(images.keys() | labels.keys()), folders, images, labels
  )


def match_folders(*folders: pathlib.Path) -> Iterator[Entry]:
  """Matches the images in a folder with the masks in another, see `match`.

  Raises:
    DataError: if a folder does not exist or has no images.
  """
  for folder in folders:
    if not folder.is_dir():
      raise absent(folder)
  # JPEG masks are matched here; reading them raises an error with the reason.
  listings = [files.walk(folder) for folder in folders]
  for folder, listing in zip(folders, listings, strict=True):
    if not listing.files:
      raise no_images(folder, others=listing.others)
    if listing.others:
      yield Note(f'{folder}: left out {count_endings(listing.others)}')
  yield from match(folders, [listing.files for listing in listings])
