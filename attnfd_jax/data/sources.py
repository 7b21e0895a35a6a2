# SPDX-License-Identifier: Apache-2.0
"""Random-access sources of {'image', 'label'} and the table of data sets.

A source has `len`, `source[i]` -> {'image': uint8 [h, w, 3], 'label': uint8
[h, w] of train ids, 255 = ignored}, `size(i)` -> (h, w) without decoding and
`name(i)` for messages. To add a data set: a function, and a row in DATASETS.
"""

import dataclasses
import difflib
import os
import pathlib

import cv2
import numpy as np
from PIL import Image

from attnfd_jax.data import classes
from attnfd_jax.data import synthetic
from attnfd_jax.errors import InputError

IGNORE_LABEL = 255
IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits with the names and colours of their classes."""

  name: str
  class_names: tuple[str, ...]
  palette: np.ndarray  # uint8 [k, 3]
  splits: dict  # Name -> source.

  @property
  def num_classes(self):
    return len(self.class_names)


def read_image(path):
  """Pixels of a file as they are stored, uint8 [h, w, 3] RGB."""
  # EXIF rotation would turn the image and not its mask.
  how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  data = np.fromfile(path, np.uint8)
  image = cv2.imdecode(data, how) if data.size else None
  if image is None:
    raise InputError(f'{path}: not a readable image; replace or remove it.')
  return image


def read_mask(path):
  """Class ids of an index or palette PNG, uint8 [h, w]."""
  try:
    with Image.open(path) as file:
      # Pillow keeps the indices of a palette; OpenCV would give colours.
      mode, ids = file.mode, np.asarray(file)
  except (OSError, SyntaxError, ValueError) as error:
    raise InputError(f'{path}: not a readable mask ({error}).') from error
  if mode not in ('L', 'P'):
    raise InputError(
      f'{path}: mask has mode {mode}; expected an 8-bit PNG of class ids (L or '
      'P). Convert colours to ids first.'
    )
  return ids


def id_table(ids):
  """Table [256] from file ids to train ids; `ids` are in the order of train
  ids, all others become 255.
  """
  table = np.full(256, IGNORE_LABEL, np.uint8)
  table[list(ids)] = np.arange(len(ids))
  return table


class PairSource:
  """Image and mask files, decoded and checked when they are read.

  Args:
    pairs: [(image path, mask path), ...].
    table: uint8 [256], file id -> train id.
    forbidden: bool [256], file ids that must not occur.
    cache: keep decoded pairs in memory.
  """

  def __init__(self, pairs, *, table, forbidden, cache=False):
    self._pairs, self._table, self._forbidden = pairs, table, forbidden
    self._cache = {} if cache else None

  def __len__(self):
    return len(self._pairs)

  def __getitem__(self, index):
    if self._cache is None:
      return self._read(index)
    if index not in self._cache:
      self._cache[index] = self._read(index)
    return dict(self._cache[index])

  def __getstate__(self):
    # Worker processes fill a cache of their own.
    return self.__dict__ | {'_cache': None if self._cache is None else {}}

  def name(self, index):
    return str(self._pairs[index][0])

  def size(self, index):
    with Image.open(self._pairs[index][0]) as file:
      width, height = file.size
    return height, width

  def _read(self, index):
    image_path, mask_path = self._pairs[index]
    image, ids = read_image(image_path), read_mask(mask_path)
    if image.shape[:2] != ids.shape:
      raise InputError(
        f'{mask_path}: mask is {ids.shape[1]}x{ids.shape[0]}, its image '
        f'{image.shape[1]}x{image.shape[0]} (width x height).'
      )
    bad = self._forbidden[ids]
    if bad.any():
      values, counts = np.unique(ids[bad], return_counts=True)
      found = ', '.join(
        f'{v} ({n} pixels)' for v, n in zip(values, counts, strict=True)
      )
      raise InputError(
        f'{mask_path}: values {found} are no class; classes are 0 to '
        f'{self._table[self._table != IGNORE_LABEL].max()}, ignored is 255.'
      )
    return {'image': image, 'label': self._table[ids]}


class SceneSource(synthetic.StreetScenes):
  """Drawn street scenes; drawn once and kept, they are small."""

  def __init__(self, num_scenes, *, height, width, seed):
    super().__init__(num_scenes, height=height, width=width, seed=seed)
    self._size, self._drawn = (height, width), {}

  def __getitem__(self, index):
    if index not in self._drawn:
      self._drawn[index] = super().__getitem__(index)
    return dict(self._drawn[index])

  def __getstate__(self):
    return self.__dict__ | {'_drawn': {}}

  def size(self, index):
    del index
    return self._size

  def name(self, index):
    return f'scene {index}'


def _files(folder, endings):
  """Stem -> path of the files in `folder` with one of the endings."""
  if not folder.is_dir():
    raise InputError(
      f'{folder}: no such folder; is config.data.root right? (--config.data.'
      'root=PATH)'
    )
  with os.scandir(folder) as entries:
    names = sorted(e.name for e in entries if e.is_file())
  paths = [folder / name for name in names if not name.startswith('.')]
  paths = [path for path in paths if path.suffix.lower() in endings]
  found = {}
  for path in paths:
    if path.stem in found:
      raise InputError(f'{path}: {found[path.stem].name} has the same stem.')
    found[path.stem] = path
  return found


def pair_files(images, masks):
  """[(image, mask), ...] of two folders, by stem, sorted.

  Raises:
    InputError: names a folder that is absent or empty, or files without a
      partner.
  """
  left, right = _files(images, IMAGE_ENDINGS), _files(masks, ('.png',))
  if not left:
    raise InputError(f'{images}: no {", ".join(IMAGE_ENDINGS)} files in it.')
  for ours, theirs, folder in ((left, right, masks), (right, left, images)):
    alone = [ours[stem].name for stem in sorted(set(ours) - set(theirs))]
    if alone:
      more = f' and {len(alone) - 3} more' if len(alone) > 3 else ''
      raise InputError(
        f'{folder}: no partner for {", ".join(alone[:3])}{more}.'
      )
  return [(left[stem], right[stem]) for stem in left]


def _source(config, pairs, num_classes, *, ignored=()):
  pairs = pairs[: config['limit'] or None]
  allowed = (*range(num_classes), *ignored, IGNORE_LABEL)
  forbidden = np.ones(256, bool)
  forbidden[list(allowed)] = False
  table = id_table(range(num_classes))
  return PairSource(
    pairs, table=table, forbidden=forbidden, cache=config['cache']
  )


def _camvid(config):
  """SegNet's release: <split>/*.png or .jpg with <split>annot/*.png."""
  root = pathlib.Path(config['root'])
  splits = {}
  for split in ('train', 'val', 'test'):
    pairs = pair_files(root / split, root / f'{split}annot')
    splits[split] = _source(config, pairs, len(classes.CAMVID), ignored=(11,))
  return Dataset('camvid', *_classes(classes.CAMVID), splits)


def _folder(config):
  """images/<split>/* with masks/<split>/*.png of the same stems."""
  names = tuple(config['class_names'])
  if not names:
    raise InputError(
      'config.data.class_names is empty; name the classes in the order of '
      "their ids, e.g. --config.data.class_names=\"('background', 'road')\"."
    )
  root = pathlib.Path(config['root'])
  splits = {}
  for split in ('train', 'val', 'test'):
    if split == 'test' and not (root / 'images' / split).is_dir():
      continue
    pairs = pair_files(root / 'images' / split, root / 'masks' / split)
    splits[split] = _source(config, pairs, len(names))
  palette = classes.voc_palette(len(names))
  return Dataset('folder', names, palette, splits)


def _scenes(config):
  """Drawn scenes; val is drawn from another seed than train."""
  height, width = config['image_size']
  splits = {
    split: SceneSource(
      config[f'{split}_scenes'],
      height=height,
      width=width,
      # Far apart, so that no scene of val is one of another run's train.
      seed=2 * config['scenes_seed'] + i,
    )
    for i, split in enumerate(('train', 'val'))
  }
  names, palette = synthetic.CLASS_NAMES, synthetic.PALETTE
  return Dataset('scenes', names, palette, splits)


def _classes(table):
  return tuple(table), np.array(list(table.values()), np.uint8)


DATASETS = {'camvid': _camvid, 'folder': _folder, 'scenes': _scenes}


def load_dataset(config):
  """The Dataset that the group `data` of a config names.

  Raises:
    InputError: unknown name, missing folder, files without partner.
  """
  name = config['name']
  if name not in DATASETS:
    near = difflib.get_close_matches(name, DATASETS, 1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise InputError(
      f'Unknown data set {name!r}.{hint} Have: {", ".join(DATASETS)}.'
    )
  return DATASETS[name](config)
