# SPDX-License-Identifier: Apache-2.0
"""Pairs of image and mask, matched by name, decoded and checked when read."""

import collections
import dataclasses
import os
import pathlib

import numpy as np

from attnfd_jax.data import cache, classes, files, masks
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


class Decoded:
  """Records by `_read(index)`; those that were read stay if `cache`."""

  def __init__(self, *, cache):
    self._cache = {} if cache else None

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

  Args:
    pairs: sequence of Pair; keys differ.
    read_label: mask -> uint8 [h, w] of train ids; it must pickle.
    limit: the first so many, 0 for all.
    cache: keep decoded pairs in memory.
    upright: refuse images with an EXIF rotation. Where annotations are known
      to belong to the stored pixels there is nothing to refuse.
  """

  def __init__(self, pairs, read_label, *, limit=0, cache=False, upright=True):
    super().__init__(cache=cache)
    self._pairs, self.read_label, self._upright = pairs, read_label, upright
    self._length = min(limit or len(pairs), len(pairs))

  def __len__(self):
    return self._length

  def encoded(self, index):
    """{'image': bytes as stored, 'label': as in [index]}; checked as well."""
    data = self.image_bytes(index)
    return {'image': data, 'label': self._read(index, data)['label']}

  def image_bytes(self, index):
    """As stored."""
    return self._pairs[index].image.read()

  def mask(self, index):
    """Its File."""
    return self._pairs[index].mask

  def label(self, index):
    """As in [index], without its image."""
    return self.read_label(self._pairs[index].mask)

  def fingerprint(self, start=0, stop=None):
    """Hex digest that changes with the files and with what is read of them."""
    pairs = self._pairs[: len(self)][start:stop]
    found = [file for pair in pairs for file in (pair.image, pair.mask)]
    return cache.digest(found, repr(self.read_label).encode())

  def key(self, index):
    """Unique in the split."""
    return self._pairs[index].key

  def name(self, index):
    return str(self._pairs[index].image)

  def size(self, index):
    """(height, width) without decoding."""
    return masks.read_size(self._pairs[index].image)

  def _read(self, index, data=None):
    pair = self._pairs[index]
    data = self.image_bytes(index) if data is None else data
    image = masks.decode_image(pair.image, data)
    if self._upright:
      masks.check_upright(pair.image, data)
    label = self.read_label(pair.mask)
    (h, w), (rows, columns) = image.shape[:2], label.shape
    if (h, w) != (rows, columns):
      raise files.fault(
        pair.mask_name or pair.mask,
        'size',
        f'mask is {columns}x{rows}, its image {w}x{h} (width x height)',
      )
    return {'image': image, 'label': label}


def make_dataset(config, table, pairs, read_label, problems, *, upright=True):
  """The Dataset of some pairs as the group `data` of a config asks for.

  Args:
    config: with name, limit and cache.
    table: {class: (r, g, b)} in the order of train ids.
    pairs: {split: [Pair, ...]}; a split without any is left out.
    read_label, upright: see PairSource.
    problems: of the layout.
  """
  options = {k: config[k] for k in ('limit', 'cache')} | {'upright': upright}
  splits = {
    split: PairSource(found, read_label, **options)
    for split, found in pairs.items()
    if found
  }
  names, palette = classes.names_and_palette(table)
  return Dataset(config['name'], names, palette, splits, tuple(problems))


def check_root(config):
  """config.data.root as a path; DataError if there is no such folder."""
  root = pathlib.Path(config['root'])
  if not config['root'] or not root.is_dir():
    raise DataError(
      f'{config["root"] or "config.data.root"}: no such folder; is '
      'config.data.root right? (--config.data.root=PATH)',
      'split',
      root,
    )
  return root


def absent(path):
  """The DataError of a folder or list that a split needs."""
  what = 'not found; is config.data.root right? (--config.data.root=PATH)'
  return DataError(f'{path}: {what}', 'split', path)


def empty(path, what):
  return files.fault(path, 'split', f'no {what} in it')


def by_stem(found, problems):
  """{stem: File}; of files with the same stem the first, and a problem."""
  groups = collections.defaultdict(list)
  for file in found:
    groups[file.stem].append(file)
  for group in groups.values():
    if len(group) > 1:
      names = ', '.join(file.name for file in group)
      folder = os.path.dirname(str(group[0]))
      what = f'{folder}: {names} have the same stem; keep one of them.'
      problems.append(DataError(what, 'partner', group[1]))
  return {stem: group[0] for stem, group in groups.items()}


def match(images, labels, where, problems):
  """[Pair, ...] of two {key: File}, sorted; the rest become problems.

  `where` has the folders of both, for messages.
  """
  for ours, theirs, folder in (
    (images, labels, where[1]),
    (labels, images, where[0]),
  ):
    for key in sorted(ours.keys() - theirs.keys()):
      what = f'{folder}: no partner for {ours[key].name}.'
      problems.append(DataError(what, 'partner', ours[key]))
  both = sorted(images.keys() & labels.keys())
  return [Pair(key, images[key], labels[key]) for key in both]


def match_folders(images, labels, problems):
  """[Pair, ...] of two folders by stem; absent and empty ones are problems."""
  gone = [folder for folder in (images, labels) if not folder.is_dir()]
  if gone:
    problems.append(absent(gone[0]))
    return []
  left = by_stem(files.list_folder(images, IMAGE_ENDINGS), problems)
  if not left:
    problems.append(empty(images, f'{", ".join(IMAGE_ENDINGS)} files'))
    return []
  # A JPEG mask is found here and refused when it is read: its reason is told.
  right = by_stem(files.list_folder(labels, IMAGE_ENDINGS), problems)
  return match(left, right, (images, labels), problems)
