# SPDX-License-Identifier: Apache-2.0
"""The table of data sets.

A source has `len`, `source[i]` -> {'image': uint8 [h, w, 3], 'label': uint8
[h, w] of train ids, 255 = ignored}, `size(i)` -> (h, w) without decoding,
`name(i)` for messages and `key(i)`, unique in its split. To add a data set: a
function from the group `data` of a config and the names of splits to a Dataset
that has these splits, as far as they exist, and a row in DATASETS.
"""

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
from attnfd_jax.data.synthetic import scenes
from attnfd_jax.data.voc import pascal_voc
from attnfd_jax.errors import DataError, known

DATASETS = {
  'camvid': camvid,
  'cityscapes': cityscapes,
  'coco': coco,
  'folder': folder,
  'pascal_voc': pascal_voc,
  'scenes': scenes,
}


def load_dataset(config, *, strict=True, splits=SPLITS):
  """The Dataset that the group `data` of a config, or a dict like it, names.

  Only the `splits` have to be there; with all of them come the images that
  `unlabeled` names. Not `strict`, problems of the layout are in `problems`, the
  rest can be used.

  Raises:
    DataError: missing folder; if strict, the first problem.
    InputError: unknown name, keys that do not go together.
  """
  known('data set', config['name'], DATASETS)
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
