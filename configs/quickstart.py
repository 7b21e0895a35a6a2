# SPDX-License-Identifier: Apache-2.0
r"""Few labels, many images: a student with 16 labeled scenes, and a teacher.

  python -m attnfd_jax.main --config=configs/quickstart.py

Nothing to download: street scenes are drawn on the fly. The student alone has
16 of them with labels; distilled, it sees 1008 more without labels, and what
the teacher finds in all of them. Variant: debug.
"""

from attnfd_jax.config import default_config, with_variant


def get_config(arg=None):
  config = default_config()
  config.data.name = 'scenes'
  config.data.image_size = (96, 128)
  config.data.train_scenes = 1024
  # Of 64 scenes mIoU is half a point off, as much as distillation gives.
  config.data.val_scenes = 1024
  config.data.base_size = 96
  config.data.scale_range = (0.8, 1.3)
  config.data.crop_size = (96, 96)
  config.student.labeled_limit = 16
  config.data.unlabeled = 'rest'
  config.data.unlabeled_share = 0.75
  config.batch_size = 16
  config.num_epochs = 7.5
  config.eval.every_epochs = 2.5
  # A teacher has something to give when it is well ahead of the student.
  config.teacher.num_epochs = 9.0
  # Adam: momentum SGD is far from done after so few steps.
  config.optim.name = 'adamw'
  config.optim.lr = 0.003
  config.optim.head_lr_scale = 1.0
  config.optim.weight_decay = 0.01
  config.teacher.backbone = 'resnet18'
  config.teacher.width_multiplier = 0.5
  config.student.backbone = 'resnet18'
  config.student.width_multiplier = 0.125
  for network, channels in ((config.teacher, 64), (config.student, 16)):
    network.aspp_channels = network.decoder_channels = channels
    network.low_level_channels = 16
    # Half the channels dropped is too much for so small networks.
    network.aspp_dropout = network.decoder_dropout = 0.1
  # AttnFD alone gives less, KD alone nearly as much: experiments/quickstart.
  config.distill.method = 'attnfd+kd'
  # The paper's 2 is for students that start from ImageNet weights.
  config.distill.attnfd.weight = 0.3
  return with_variant(config, arg)
