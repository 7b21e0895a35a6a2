# SPDX-License-Identifier: Apache-2.0
"""Class names and colors of the data sets, in the order of train ids."""

from collections.abc import Collection
from typing import TypeAlias

import numpy as np

Color: TypeAlias = tuple[int, int, int]  # Red, green, blue; 0 to 255.


def voc_palette(num_colors: int) -> np.ndarray:
  """Returns the first colors of the PASCAL VOC devkit, uint8 [num_colors, 3].

  Bit 3 j + c of the index is bit 7 - j of color channel c.
  """
  index = np.arange(num_colors)[:, None]
  bits = (index[..., None] >> (3 * np.arange(8) + np.arange(3)[:, None])) & 1
  return np.sum(bits << (7 - np.arange(8)), -1).astype(np.uint8)


def with_voc_colors(names: Collection[str]) -> dict[str, Color]:
  """Assigns the colors of PASCAL VOC to class names, in their order."""
  colors = voc_palette(len(names)).tolist()
  return dict(zip(names, map(tuple, colors), strict=True))


# The eleven classes of SegNet's CamVid, and its id for unlabeled pixels.
CAMVID_VOID = 11
CAMVID = {
  'sky': (128, 128, 128),
  'building': (128, 0, 0),
  'pole': (192, 192, 128),
  'road': (128, 64, 128),
  'pavement': (60, 40, 222),
  'tree': (128, 128, 0),
  'sign_symbol': (192, 128, 128),
  'fence': (64, 64, 128),
  'car': (64, 0, 128),
  'pedestrian': (64, 64, 0),
  'bicyclist': (0, 128, 192),
}

# cityscapesScripts, helpers/labels.py: the 19 train ids.
CITYSCAPES = {
  'road': (128, 64, 128),
  'sidewalk': (244, 35, 232),
  'building': (70, 70, 70),
  'wall': (102, 102, 156),
  'fence': (190, 153, 153),
  'pole': (153, 153, 153),
  'traffic light': (250, 170, 30),
  'traffic sign': (220, 220, 0),
  'vegetation': (107, 142, 35),
  'terrain': (152, 251, 152),
  'sky': (70, 130, 180),
  'person': (220, 20, 60),
  'rider': (255, 0, 0),
  'car': (0, 0, 142),
  'truck': (0, 0, 70),
  'bus': (0, 60, 100),
  'train': (0, 80, 100),
  'motorcycle': (0, 0, 230),
  'bicycle': (119, 11, 32),
}
# From the same table: the label ids in the order of the train ids, and those
# excluded from evaluation.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
CITYSCAPES_IGNORED = tuple(i for i in range(34) if i not in CITYSCAPES_IDS)

VOC = with_voc_colors(
  'background aeroplane bicycle bird boat bottle bus car cat chair cow '
  'diningtable dog horse motorbike person pottedplant sheep sofa train '
  'tvmonitor'.split()
)

# The COCO 2017 categories of the VOC classes 1 to 20, in their order.
COCO_NAMES = (
  'airplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,'
  'horse,motorcycle,person,potted plant,sheep,couch,train,tv'
).split(',')
