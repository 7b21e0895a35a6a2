# SPDX-License-Identifier: Apache-2.0
"""Class names and colours of the data sets, in the order of train ids."""

import numpy as np


def names_and_palette(table):
  """Names and uint8 [k, 3] of one of the tables below."""
  return tuple(table), np.array(list(table.values()), np.uint8)


def voc_palette(num_colours):
  """Colours of the PASCAL VOC devkit, uint8 [num_colours, 3].

  Bit 3 j + c of the index is bit 7 - j of colour channel c.
  """
  index = np.arange(num_colours)[:, None]
  bits = (index[..., None] >> (3 * np.arange(8) + np.arange(3)[:, None])) & 1
  return np.sum(bits << (7 - np.arange(8)), -1).astype(np.uint8)


def with_voc_colours(names):
  """{name: (r, g, b)}."""
  colours = voc_palette(len(names)).tolist()
  return dict(zip(names, map(tuple, colours), strict=True))


# SegNet's eleven classes of CamVid, and its id of void.
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
# From the same table: label ids in the order of train ids, and those that are
# not evaluated.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
CITYSCAPES_IGNORED = tuple(i for i in range(34) if i not in CITYSCAPES_IDS)

VOC = with_voc_colours(
  'background aeroplane bicycle bird boat bottle bus car cat chair cow '
  'diningtable dog horse motorbike person pottedplant sheep sofa train '
  'tvmonitor'.split()
)

# Categories of COCO 2017 that are the VOC classes 1 to 20, in their order.
COCO_NAMES = (
  'airplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,'
  'horse,motorcycle,person,potted plant,sheep,couch,train,tv'
).split(',')
