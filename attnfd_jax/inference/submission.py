# SPDX-License-Identifier: Apache-2.0
"""What the evaluation server of Cityscapes takes: label ids at full size."""

import pathlib

import numpy as np
from PIL import Image

from attnfd_jax.data import cityscapes, classes, masks
from attnfd_jax.data.pairs import Pair, PairSource
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL


def _all_ignored(file):
  return np.full(masks.read_size(file), IGNORE_LABEL, np.uint8)


def test_images(root):
  """A source of the test split, whose labels are not public: all ignored."""
  places = cityscapes.IMAGES
  _, found = cityscapes.list_split(pathlib.Path(root), places, 'test')
  pairs = [Pair(file.inner.stem, file, file) for file in found]
  return PairSource(pairs, _all_ignored, upright=False)


def make_writer(directory, *, dataset, protocol):
  """A function that writes one file, from (name of the image, train ids)."""
  if dataset != 'cityscapes':
    what = f'--submission is for the data set cityscapes, this one is {dataset}'
    remedy = 'python -m attnfd_jax.predict writes the class ids of any image'
    raise InputError(f'{what}; {remedy}.')
  if protocol != 'native':
    raise InputError('--submission needs full sizes; add --protocol=native.')
  directory = pathlib.Path(directory)
  if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    what = 'exists and is not an empty folder'
    raise InputError(f'--submission={directory} {what}.')
  directory.mkdir(parents=True, exist_ok=True)
  label_ids = np.array(classes.CITYSCAPES_IDS, np.uint8)

  def write(name, ids):
    # It starts with city, sequence and frame, by which the server finds it.
    stem = pathlib.PurePath(name).stem
    Image.fromarray(label_ids[ids]).save(directory / f'{stem}.png')

  return write
