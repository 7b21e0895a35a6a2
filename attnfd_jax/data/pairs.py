# SPDX-License-Identifier: Apache-2.0
"""Pairs of image and mask, matched by name, decoded and checked when read."""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

from attnfd_jax.data import cache, files, masks
from attnfd_jax.errors import DataError

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits with the names and colours of their classes."""

  name: str
  class_names: tuple[str, ...]
  palette: np.ndarray  # uint8 [k, 3]
  splits: dict  # Name -> source.
  problems: tuple[DataError, ...] = ()  # Of the layout; pixels were not read.

  @property
  def num_classes(self):
    return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Pair:
  """One example."""

  key: str
  image: files.File
  mask: files.File
  mask_name: str = ''  # In messages, where it is not the name of its file.


class Note(NamedTuple):
  """Something that was read in another way; commands print it once."""

  text: str


class Decoded:
  """Records by `_read(index)`, kept in memory if `cache`."""

  def __init__(self, length, *, cache):
    self._length, self._cache = length, {} if cache else None

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

  def label(self, index):
    return self.read_label(self.pairs[index].mask)

  def fingerprint(self, start=0, stop=None):
    """Hex digest that changes with the files and with what is read of them."""
    pairs = () if self._mark else self.pairs[: len(self)][start:stop]
    read = [file for pair in pairs for file in (pair.image, pair.mask)]
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


def make_dataset(config, table, splits, read_label, *, upright=True):
  """The Dataset of some pairs as the group `data` of a config asks for.

  `table` is {class: (r, g, b)} by train id, `splits` {split: iterable of Pairs
  and DataErrors, which may also raise one}; one without Pairs is left out.
  """
  options = {k: config[k] for k in ('limit', 'cache')} | {'upright': upright}
  sources, problems = {}, []
  for split, entries in splits.items():
    entries = list(with_error(entries))
    problems += [x for x in entries if isinstance(x, DataError)]
    if pairs := [x for x in entries if isinstance(x, Pair)]:
      sources[split] = PairSource(pairs, read_label, **options)
  palette = np.array(list(table.values()), np.uint8)
  return Dataset(config['name'], tuple(table), palette, sources, (*problems,))


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


def no_images(folder, suffix=''):
  """The DataError of a folder without images whose stems end with `suffix`."""
  what = f'no files *{suffix}{", ".join(IMAGE_ENDINGS)} in it'
  return files.fault(folder, 'split', what)


def no_partner(folder, name, why='', file=None):
  """The DataError of a `name`, or its file, whose partner `folder` lacks."""
  what = f'{folder}: no partner for {name}{why}.'
  return DataError(what, 'partner', file or folder / name)


def join(keys, folders, images, labels, why=''):
  """Yields the Pair, or the DataError, of each key of {key: File}."""
  for key in keys:
    if key in images and key in labels:
      yield Pair(key, images[key], labels[key])
    else:
      file = images.get(key) or labels.get(key)
      name = file.inner.name if file else key
      yield no_partner(folders[key in images], name, why, file)


def match(folders, groups, suffixes=('', '')):
  """Yields Pairs, and a DataError for each File without partner.

  Partners have one stem but for its suffix; Files without a suffix are skipped.
  """
  both = {}, {}
  sides = zip(both, folders, groups, suffixes, strict=True)
  for by_key, folder, group, suffix in sides:
    for file in group:
      if file.inner.stem.endswith(suffix):
        key = file.inner.stem.removesuffix(suffix)
        if (first := by_key.setdefault(key, file)) != file:
          names = f'{first.inner.name}, {file.inner.name}'
          what = f'{folder}: {names} have the same stem; keep one of them.'
          yield DataError(what, 'partner', file)
  if not both[0]:
    raise no_images(folders[0], suffixes[0])
  yield from join(sorted(both[0].keys() | both[1].keys()), folders, *both)


def match_folders(*folders):
  """`match` of the files in two folders; raises if one of them is absent."""
  for folder in folders:
    if not folder.is_dir():
      raise absent(folder)
  # A JPEG mask is matched here and refused when it is read, with the reason.
  groups = (files.list_folder(folder, IMAGE_ENDINGS) for folder in folders)
  yield from match(folders, groups)
