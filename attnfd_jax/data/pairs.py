# SPDX-License-Identifier: Apache-2.0
"""Pairs of image and mask, matched by name, decoded and checked when read."""

import collections
import dataclasses
import os
import pathlib

import numpy as np

from attnfd_jax.data import cache
from attnfd_jax.data import files
from attnfd_jax.data import masks
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
    pairs: list of Pair; keys differ.
    read_label: mask -> uint8 [h, w] of train ids; it must pickle.
    cache: keep decoded pairs in memory.
    upright: refuse images with an EXIF rotation. Where annotations are known
      to belong to the stored pixels there is nothing to refuse.
    describe: mask -> its name in messages; it must pickle.
  """

  def __init__(
    self, pairs, read_label, *, cache=False, upright=True, describe=str
  ):
    super().__init__(cache=cache)
    self._pairs, self.read_label = pairs, read_label
    self._upright, self._describe = upright, describe

  def __len__(self):
    return len(self._pairs)

  def encoded(self, index):
    """{'image': bytes as stored, 'label': as in [index]}; checked as well."""
    data = self._pairs[index].image.read()
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
    pairs = self._pairs[start:stop]
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
    data = pair.image.read() if data is None else data
    image = masks.decode_image(pair.image, data)
    if self._upright:
      masks.check_upright(pair.image, data)
    label = self.read_label(pair.mask)
    if image.shape[:2] != label.shape:
      mask = self._describe(pair.mask)
      raise DataError(
        f'{mask}: mask is {label.shape[1]}x{label.shape[0]}, its image '
        f'{image.shape[1]}x{image.shape[0]} (width x height).',
        'size',
        mask,
      )
    return {'image': image, 'label': label}


def make_source(config, pairs, read_label, **options):
  """A PairSource as the group `data` of a config asks for."""
  pairs = pairs[: config['limit'] or None]
  return PairSource(pairs, read_label, cache=config['cache'], **options)


def check_root(config):
  """config.data.root as a path.

  Raises:
    DataError: 'split', if there is no such folder.
  """
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
  return DataError(
    f'{path}: not found; is config.data.root right? (--config.data.root=PATH)',
    'split',
    path,
  )


def empty(path, what):
  return DataError(f'{path}: no {what} in it.', 'split', path)


def _no_partner(file, folder):
  return DataError(
    f'{folder}: no partner for {file.name}.', 'partner', str(file)
  )


def by_stem(found, problems):
  """{stem: File}; a PNG is preferred, other equal stems are a problem."""
  groups = collections.defaultdict(list)
  for file in found:
    groups[file.stem].append(file)
  for stem, group in groups.items():
    if len(group) > 1:
      names = ', '.join(file.name for file in group)
      problems.append(
        DataError(
          f'{os.path.dirname(str(group[0]))}: {names} have the same stem; '
          'keep one of them.',
          'partner',
          group[1],
        )
      )
    groups[stem] = group[0]
  return dict(groups)


def match(images, labels, where, problems):
  """[Pair, ...] of two {key: File}, sorted; the rest become problems.

  Args:
    images, labels: {key: File}.
    where: the folders of both, for messages.
    problems: list that is appended to.
  """
  for ours, theirs, folder in (
    (images, labels, where[1]),
    (labels, images, where[0]),
  ):
    alone = sorted(set(ours) - set(theirs))
    problems += [_no_partner(ours[key], folder) for key in alone]
  both = sorted(set(images) & set(labels))
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
