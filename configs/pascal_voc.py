# SPDX-License-Identifier: Apache-2.0
r"""PASCAL VOC 2012, ResNet-101 -> ResNet-18, command of the AttnFD README.

  python -m attnfd_jax.main --config=configs/pascal_voc.py[:imagenet|:debug] \
    --config.data.root=PATH/VOCdevkit/VOC2012

The folder has JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/. The
authors train on its list train (1464 images); for trainaug (10582) add
--config.data.sbd_root=PATH/benchmark_RELEASE, or with a ready-made list and
SegmentationClassAug/ --config.data.train_list=trainaug.

:imagenet starts both networks from ImageNet weights, as the authors do; their
rates are those for such a start.

The authors publish 73.09 +- 0.06 mIoU on val, protocol reference. Not run by us
on the real images.
"""

from attnfd_jax.config import reference_config, with_variant


def imagenet(config):
  config.teacher.pretrained = config.student.pretrained = 'imagenet'


def get_config(arg=None):
  config = reference_config()
  config.data.name = 'pascal_voc'
  config.data.root = 'data/VOCdevkit/VOC2012'
  config.num_epochs = 120.0  # README; the script's default is 50.
  config.optim.lr = 0.007  # train_kd.py:290, for a batch of 6.
  # Padding is not the authors': 1 is exact, with a compilation for every size.
  config.eval.size_multiple = 64
  return with_variant(config, arg, imagenet=imagenet)
