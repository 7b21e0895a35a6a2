# SPDX-License-Identifier: Apache-2.0
r"""Drawn street scenes: a teacher, a baseline student and an AttnFD student.

python -m attnfd_jax.main --config=configs/quickstart.py
"""

from attnfd_jax.config import default_config


def get_config(arg=None):
  config = default_config()
  config.data.name = 'scenes'
  config.data.image_size = (96, 128)
  config.data.base_size = 96
  config.data.crop_size = (96, 96)
  config.data.train_scenes = 256
  config.data.val_scenes = 64
  config.batch_size = 16
  config.num_epochs = 20.0
  config.eval.every_epochs = 5.0
  config.optim.lr = 0.05
  config.optim.head_lr_scale = 1.0
  config.teacher.backbone = 'resnet18'
  config.teacher.width_multiplier = 0.5
  config.teacher.in_path_attention = True
  config.student.backbone = 'resnet18'
  config.student.width_multiplier = 0.125
  for network, channels in ((config.teacher, 64), (config.student, 16)):
    network.aspp_channels = channels
    network.decoder_channels = channels
    network.low_level_channels = 16
  return config
