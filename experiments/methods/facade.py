# SPDX-License-Identifier: Apache-2.0
r"""LabelMeFacade, short side 96, for a comparison on two CPU cores.

  python -m attnfd_jax.compare --config=experiments/methods/facade.py \
    --config.data.root=PATH --methods=attnfd,kd --seeds=0,1,2 --workdir=DIR

838 photographs that differ from each other, 8 classes, in the layout of
configs/folder.py. The teacher starts from ImageNet, the student from nothing;
how the sizes and lengths were found: experiments/methods/README.md.
"""

from attnfd_jax.config import default_config, from_imagenet, with_variant

CLASSES = ('building', 'car', 'door', 'pavement')
CLASSES += ('road', 'sky', 'vegetation', 'window')


def get_config(arg=None):
  config = default_config()
  config.data.name = 'folder'
  config.data.root = 'data/labelmefacade'
  config.data.class_names = CLASSES
  config.data.base_size = config.eval.short_side = 96
  config.data.crop_size = (96, 96)
  config.data.photometric = 0.5
  config.data.cache = True
  config.batch_size = 16
  config.num_epochs = 40.0
  config.eval.every_epochs = 10.0
  config.optim.name, config.optim.weight_decay = 'adamw', 0.01
  config.optim.lr = 0.002
  config.optim.head_lr_scale = 1.0
  config.optim.warmup_epochs = 1.0
  config.teacher.backbone = 'efficientnet_lite0'
  config.teacher.num_epochs = 30.0
  from_imagenet(config.teacher)
  config.student.width_multiplier = 0.25
  for network, channels in ((config.teacher, 64), (config.student, 32)):
    network.aspp_channels = network.decoder_channels = channels
  return with_variant(config, arg)
