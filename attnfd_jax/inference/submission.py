# SPDX-License-Identifier: Apache-2.0
"""What the evaluation server of Cityscapes takes: label ids at full size."""

import pathlib

import numpy as np
from PIL import Image

from attnfd_jax.data import classes
from attnfd_jax.data import files
from attnfd_jax.data import masks
from attnfd_jax.data.pairs import Pair
from attnfd_jax.data.pairs import PairSource
from attnfd_jax.errors import InputError
from attnfd_jax.losses import IGNORE_LABEL


def _all_ignored(file):
  return np.full(masks.read_size(file), IGNORE_LABEL, np.uint8)


def test_images(root):
  """A source of the test split, whose classes are not public: all ignored.

  Args:
    root: has leftImg8bit/test, images/test or leftImg8bit_trainvaltest.zip.

  Raises:
    InputError: if there are no images.
  """
  root = pathlib.Path(root)
  found = []
  for name in ('leftImg8bit', 'images'):
    found = found or list(
      files.list_tree(root / name / 'test', ('.png',)).values()
    )
  archive = root / 'leftImg8bit_trainvaltest.zip'
  if not found and archive.is_file():
    found = files.list_zip(archive, 'leftImg8bit/test/', ('.png',))
  if not found:
    raise InputError(
      f'{root / "leftImg8bit" / "test"}: no images of the test split, nor '
      f'{archive.name} beside it; is the folder right? (--data_root=PATH)'
    )
  pairs = [Pair(file.stem, file, file) for file in found]
  return PairSource(pairs, _all_ignored, upright=False)


class Writer:
  """Writes one file for each image.

  A file has the name of its image and starts so with city, sequence and frame,
  by which the server finds it.

  Args:
    directory: made if absent.
    dataset: its name.
    protocol: of the evaluation.

  Raises:
    InputError: for other data sets, resized labels, and a folder that is not
      empty.
  """

  def __init__(self, directory, *, dataset, protocol):
    if dataset != 'cityscapes':
      raise InputError(
        f'--submission is for the data set cityscapes, this one is {dataset}; '
        'python -m attnfd_jax.predict writes the class ids of any image.'
      )
    if protocol != 'native':
      raise InputError(
        f'--submission needs results at full size, which protocol {protocol} '
        'does not give; add --protocol=native.'
      )
    self._directory = pathlib.Path(directory)
    if self._directory.exists() and (
      not self._directory.is_dir() or any(self._directory.iterdir())
    ):
      raise InputError(
        f'--submission={directory} exists and is not an empty folder.'
      )
    self._directory.mkdir(parents=True, exist_ok=True)
    self._ids = np.array(classes.CITYSCAPES_IDS, np.uint8)

  def write(self, name, ids):
    """`name` is the file of the image, `ids` uint8 [h, w] of train ids."""
    path = self._directory / f'{pathlib.PurePath(name).stem}.png'
    Image.fromarray(self._ids[ids]).save(path)
