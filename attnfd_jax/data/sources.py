# SPDX-License-Identifier: Apache-2.0
"""Loads data sets by name.

To add a data set, write a function that takes the group `data` of a config and
the names of splits, and returns a Dataset with those of the splits that exist;
their sources have the methods of records.Source. Then add it to DATASETS.
"""

from collections.abc import Callable, Sequence

from attnfd_jax.data import prepared, unlabeled
from attnfd_jax.data.camvid import camvid
from attnfd_jax.data.cityscapes import cityscapes
from attnfd_jax.data.coco import coco
from attnfd_jax.data.files import IMAGE_ENDINGS as IMAGE_ENDINGS
from attnfd_jax.data.folder import folder
from attnfd_jax.data.masks import read_image as read_image
from attnfd_jax.data.masks import read_mask as read_mask
from attnfd_jax.data.pairs import Dataset as Dataset
from attnfd_jax.data.pairs import SPLITS as SPLITS
from attnfd_jax.data.records import DataConfig
from attnfd_jax.data.synthetic import scenes
from attnfd_jax.data.voc import pascal_voc
from attnfd_jax.errors import check_name, DataError

DATASETS: dict[str, Callable[[DataConfig, Sequence[str]], Dataset]] = {
  'camvid': camvid,
  'cityscapes': cityscapes,
  'coco': coco,
  'folder': folder,
  'pascal_voc': pascal_voc,
  'scenes': scenes,
}


def load_dataset(
  config: DataConfig, *, strict: bool = True, splits: Sequence[str] = SPLITS
) -> Dataset:
  """Loads the data set of a config; images are read later.

  Args:
    config: the group `data`, or a dict with its keys.
    strict: whether to raise the first problem. If not, problems are in
      `problems`, and everything else can be used.
    splits: the splits to load. Only with all of them, the default, the images
      of config.data.unlabeled are loaded too.

  Raises:
    DataError: for a missing folder; if strict, for the first problem.
    InputError: for an unknown name or incompatible keys.
  """
  check_name('data set', config['name'], DATASETS)
  read = prepared.load if config['prepared'] else DATASETS[config['name']]
  dataset = read(config, splits)
  if tuple(splits) == SPLITS:
    dataset = unlabeled.with_unlabeled(dataset, config)
  if strict and dataset.problems:
    first, *others = dataset.problems
    if not others:
      raise first
    more = f'{len(others)} more; python -m attnfd_jax.check_data lists all.'
    raise DataError(f'{first} (And {more})', first.kind, first.file)
  return dataset
