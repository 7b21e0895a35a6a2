# SPDX-License-Identifier: Apache-2.0
"""Writes files for the Cityscapes server: label ids at full size."""

from collections.abc import Callable
import pathlib

import numpy as np
from PIL import Image

from attnfd_jax.data import cityscapes, classes, masks
from attnfd_jax.data.pairs import Pair, PairSource
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.types import StrPath


def _all_ignored(file):
  return np.full(masks.read_size(file), IGNORE_LABEL, np.uint8)


def test_images(root: StrPath) -> PairSource:
  """The test split as a source; its labels, not public, are all ignored."""
  folders = cityscapes.IMAGES
  _, images = cityscapes.list_split(pathlib.Path(root), folders, 'test')
  pairs = [Pair(file.inner.stem, file, file) for file in images]
  return PairSource(pairs, _all_ignored, upright=False)


def make_writer(
  directory: StrPath, *, dataset: str, protocol: str
) -> Callable[[str, np.ndarray], None]:
  """A function (name of an image, its train ids) that writes one file.

  Raises:
    InputError: if the server would not accept the files, or the folder is not
      new or empty.
  """
  if dataset != 'cityscapes':
    problem = f'is for the data set cityscapes, this one is {dataset}'
    remedy = 'python -m attnfd_jax.predict writes the class ids of any image'
    raise InputError(f'--submission {problem}; {remedy}.')
  if protocol != 'native':
    raise InputError('--submission needs the full size; add --protocol=native.')
  directory = pathlib.Path(directory)
  if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    problem = 'exists and is not an empty folder; name another'
    raise InputError(f'--submission={directory} {problem}.')
  directory.mkdir(parents=True, exist_ok=True)
  label_ids = np.array(classes.CITYSCAPES_IDS, np.uint8)

  def write(name, ids):
    # The server finds city, sequence and frame at the start of the name.
    stem = pathlib.PurePath(name).stem
    Image.fromarray(label_ids[ids]).save(directory / f'{stem}.png')

  return write
