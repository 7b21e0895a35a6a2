# SPDX-License-Identifier: Apache-2.0
"""Pairs of image and mask, matched by name, decoded and checked when read."""

import collections
import dataclasses
import os
import pathlib
from typing import NamedTuple

import numpy as np

from attnfd_jax.data import cache, files, masks, matching
from attnfd_jax.errors import DataError
from attnfd_jax.losses import IGNORE_LABEL

SPLITS = ('train', 'val', 'test')
# A further split, of images without masks, see unlabeled.py.
UNLABELED = 'unlabeled'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits with the names and colours of their classes."""

  name: str
  class_names: tuple[str, ...]
  palette: np.ndarray  # uint8 [k, 3]
  splits: dict  # Name -> source.
  problems: tuple[DataError, ...] = ()  # Of the layout; pixels were not read.
  notes: tuple[str, ...] = ()  # What was left out, or read as something else.
  settled: dict = dataclasses.field(default_factory=dict)  # Keys of the config
  # and their values, where the files decided on them.

  @property
  def num_classes(self):
    return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Pair:
  """One example."""

  key: str
  image: files.File
  mask: files.File | None = None  # None is an image that nobody labeled.
  mask_name: str = ''  # In messages, where it is not the name of its file.


def no_label(size):
  """uint8 [h, w] that all losses and scores ignore."""
  return np.full(size, IGNORE_LABEL, np.uint8)


class Note(NamedTuple):
  """Said once, on the screen and in the log; the data can be used."""

  text: str


class Decoded:
  """Records by `_read(index)`, kept in memory if `cache`."""

  def __init__(self, length, *, cache):
    self._length, self._cache = length, {} if cache else None

  @property
  def cached(self):
    return self._cache is not None

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    """{'image': uint8 [h, w, 3] RGB, 'label': uint8 [h, w] of train ids}."""
    if self._cache is None:
      return self._read(index)
    if index not in self._cache:
      self._cache[index] = self._read(index)
    return dict(self._cache[index])

  def __getstate__(self):
    # Worker processes fill a cache of their own.
    return self.__dict__ | {'_cache': None if self._cache is None else {}}


class PairSource(Decoded):
  """Random access to pairs; what cannot be used raises DataError when read.

  `read_label` makes uint8 [h, w] of train ids of a mask, and must pickle.
  `upright` refuses images with an EXIF rotation; it is off if annotations are
  known to belong to the stored pixels. A `limit` of 0 is none. The bytes `mark`
  change with the pairs, and are needed if these lie in no files of their own.
  """

  def __init__(
    self, pairs, read_label, *, limit=0, cache=False, upright=True, mark=b''
  ):
    super().__init__(min(limit or len(pairs), len(pairs)), cache=cache)
    self.pairs, self.read_label, self._upright = pairs, read_label, upright
    self._mark = mark

  def encoded(self, index):
    """{'image': bytes as stored, 'label': as in [index]}; checked as well."""
    data = self.pairs[index].image.read()
    return self._read(index, data) | {'image': data}

  def image(self, index):
    """uint8 [h, w, 3] RGB, without opening the mask."""
    file = self.pairs[index].image
    return masks.decode_image(file, file.read())

  def label(self, index):
    """uint8 [h, w] of train ids, without decoding the image."""
    mask = self.pairs[index].mask
    return self.read_label(mask) if mask else no_label(self.size(index))

  def fingerprint(self, start=0, stop=None):
    """Hex digest that changes with the files and with what is read of them."""
    pairs = () if self._mark else self.pairs[: len(self)][start:stop]
    both = (file for pair in pairs for file in (pair.image, pair.mask))
    read = [file for file in both if file]
    return cache.digest(read, repr(self.read_label).encode() + self._mark)

  def key(self, index):
    return self.pairs[index].key

  def name(self, index):
    return str(self.pairs[index].image)

  def size(self, index):
    """(height, width) without decoding."""
    return masks.read_size(self.pairs[index].image)

  def _read(self, index, data=None):
    pair = self.pairs[index]
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
      raise files.fault(pair.mask_name or pair.mask, 'size', what)
    return {'image': image, 'label': label}


def with_error(entries):
  """Yields the entries and, as the last one, a DataError that they raise."""
  try:
    yield from entries
  except DataError as error:
    yield error


def sorted_out(split, entries):
  """Pairs, DataErrors and texts of the Notes among the entries of a split."""
  found = collections.defaultdict(list)
  for entry in with_error(entries):
    found[type(entry)].append(entry)
  notes = [f'{split}: {note.text}' for note in found[Note]]
  return found[Pair], found[DataError], notes


def make_dataset(
  config, table, splits, read_label, *, upright=True, notes=(), settled=()
):
  """The Dataset of some pairs as the group `data` of a config asks for.

  `table` is {class: (r, g, b)} by train id, `splits` {split: iterable of Pairs,
  Notes and DataErrors, which may also raise one}; one without Pairs is left
  out. `settled` is of Dataset, `notes` are further ones.
  """
  options = {k: config[k] for k in ('limit', 'cache')} | {'upright': upright}
  sources, problems, notes = {}, [], [*notes]
  for split, entries in splits.items():
    found, faults, more = sorted_out(split, entries)
    problems, notes = problems + faults, notes + more
    if found:
      sources[split] = PairSource(found, read_label, **options)
  palette, name = np.array(list(table.values()), np.uint8), config['name']
  found = (*problems,), (*notes,), dict(settled)
  return Dataset(name, tuple(table), palette, sources, *found)


def absent(path, what='not found'):
  """The DataError of a folder or list that a split needs."""
  hint = 'is config.data.root right? (--config.data.root=PATH)'
  return files.fault(path, 'split', f'{what}; {hint}')


def check_root(config):
  """config.data.root as a path; DataError if there is no such folder."""
  root = config['root']
  if not root or not pathlib.Path(root).is_dir():
    raise absent(root or 'config.data.root', 'no such folder')
  return pathlib.Path(root)


def no_images(folder, suffix='', others=()):
  """The DataError of a folder without images whose stems end with `suffix`."""
  what = f'no files *{suffix}{", ".join(files.IMAGE_ENDINGS)} in it'
  if others:
    what += f', but {count_endings(others)}'
  if any(name.endswith('.txt') for name in others):
    what += '; labels of YOLO are not read: masks are images of class ids'
  return files.fault(folder, 'split', what)


def count_endings(names):
  """'3 *.txt (a.txt), 1 *.db (Thumbs.db)'."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[os.path.splitext(name)[1].lower()].append(name)
  ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
  return ', '.join(f'{len(x)} *{end} ({x[0]})' for end, x in ordered[:5])


def no_partner(folder, name, why='', file=None):
  """The DataError of a `name`, or its file, whose partner `folder` lacks."""
  what = f'{folder}: no partner for {name}{why}.'
  return DataError(what, 'partner', file or folder / name)


def _some(names):
  names = sorted(names)
  return ', '.join(names[:2]) + ', ...' * (len(names) > 2)


def join(keys, folders, images, labels, why=''):
  """Yields the Pair, or the DataErrors, of each key of {key: File}."""
  for key in keys:
    if key in images and key in labels:
      both = images[key], labels[key]
      broken = [file.broken() for file in both if file.target]
      yield from broken or [Pair(key, *both)]
    else:
      file = images.get(key) or labels.get(key)
      name = file.inner.name if file else key
      yield no_partner(folders[key in images], name, why, file)


def renamed(items, keys, **options):
  """`items` under those of the `keys` that `matching.agree` finds for them, the
  others as they were; and a list of at most one Note.
  """
  found, how = matching.agree(keys, items, **options)
  others = items.keys() - {*found.values()}
  items = {x: items[x] for x in others} | {
    x: items[y] for x, y in found.items()
  }
  what = f'{len(found)} names were matched although they differ: {how}'
  return items, [Note(what)] if how else []


def match(folders, trees, suffixes=('', '')):
  """Yields Pairs, Notes, and a DataError for each File without partner.

  Partners have one name but for suffix and ending, or as `matching.agree` says;
  Files without a suffix are skipped. `trees` are {path in the folder: File}.
  """
  both = {}, {}
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
  for found, folder, suffix in zip(both, folders, suffixes, strict=True):
    if not found:
      raise no_images(folder, suffix)
  labels, notes = renamed(labels, images)
  yield from notes
  if not images.keys() & labels.keys():
    what = f'no mask has the name of an image; images are {_some(images)}'
    need = 'an image and its mask need one name but for the ending'
    what = f'{folders[1]}: {what}, masks {_some(labels)}; {need}.'
    raise DataError(what, 'partner', folders[1])
  yield from join(
    sorted(images.keys() | labels.keys()), folders, images, labels
  )


def match_folders(*folders):
  """`match` of the files in two folders; raises if one of them is absent."""
  for folder in folders:
    if not folder.is_dir():
      raise absent(folder)
  # A JPEG mask is matched here and refused when it is read, with the reason.
  listings = [files.walk(folder) for folder in folders]
  for folder, listing in zip(folders, listings, strict=True):
    if not listing.files:
      raise no_images(folder, others=listing.others)
    if listing.others:
      yield Note(f'{folder}: left out {count_endings(listing.others)}')
  yield from match(folders, [listing.files for listing in listings])
