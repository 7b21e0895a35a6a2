# SPDX-License-Identifier: Apache-2.0
r"""Cityscapes, ResNet-101 -> ResNet-18, defaults of the AttnFD reference.

  python -m attnfd_jax.main --config=configs/cityscapes.py[:imagenet|:debug] \
    --config.data.root=PATH

PATH holds leftImg8bit/ and gtFine/, or the two files as they are downloaded,
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip: they are read in
place. The authors' images/<split>/<city>/ is read, too.

:imagenet starts both networks from ImageNet weights, as the authors do; their
rates are those for such a start.

The authors publish 73.04 mIoU on val (README), protocol reference, and no
command; crop and base size are the defaults of their script. Not run by us on
the real images.
"""

from attnfd_jax.config import reference_config, with_variant


def imagenet(config):
  config.teacher.pretrained = config.student.pretrained = 'imagenet'


def get_config(arg=None):
  config = reference_config()
  config.data.name = 'cityscapes'
  config.data.root = 'data/cityscapes'
  config.num_epochs = 200.0  # train_kd.py:275.
  config.optim.lr = 0.01  # train_kd.py:289, for a batch of 6.
  return with_variant(config, arg, imagenet=imagenet)
