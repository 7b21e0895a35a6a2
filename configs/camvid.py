# SPDX-License-Identifier: Apache-2.0
r"""CamVid (SegNet's 480x360 release), ResNet-34 -> ResNet-18, from scratch.

  python -m attnfd_jax.main --config=configs/camvid.py[:VARIANT] \
    --config.data.root=PATH [--config.optim.dtype=bfloat16]

VARIANT is imagenet, cpu, cpu_imagenet or debug.

The paper gives no CamVid recipe; this one is ours (recipe clean). Without
ImageNet weights its ResNet-101 teacher stays below the student it should teach
(val 57.6, a ResNet-18 60.3); a ResNet-34 reaches 63.7 in four minutes of an
H100. All numbers: experiments/camvid/README.md.
"""

from attnfd_jax.config import default_config, from_imagenet, with_variant


def cpu(config):
  """Twenty minutes on two cores, a third of the resolution."""
  config.data.base_size = 120
  config.data.crop_size = (120, 120)
  config.eval.short_side = 120
  config.optim.name = 'adamw'
  config.optim.lr = 0.002
  config.optim.weight_decay = 0.01
  config.teacher.backbone = 'resnet18'
  config.teacher.width_multiplier = 0.5
  config.student.width_multiplier = 0.25
  for network, channels in ((config.teacher, 64), (config.student, 32)):
    network.aspp_channels = network.decoder_channels = channels
  config.num_epochs = 40.0
  config.teacher.num_epochs = 50.0
  config.distill.attnfd.weight = 0.3


def cpu_imagenet(config):
  """As `cpu`, with a teacher from ImageNet; from the extra `pretrained`."""
  cpu(config)
  config.teacher.backbone = 'efficientnet_lite0'
  config.teacher.width_multiplier = 1.0
  config.teacher.num_epochs = 40.0
  config.optim.warmup_epochs = 1.0
  from_imagenet(config.teacher)


def imagenet(config):
  """The paper's networks from ImageNet; torchvision's files are downloaded."""
  config.teacher.backbone = 'resnet101'
  config.optim.name, config.optim.weight_decay = 'adamw', 0.01
  config.optim.warmup_epochs = 1.0
  for network in (config.teacher, config.student):
    from_imagenet(network)


def get_config(arg=None):
  config = default_config()
  config.data.name = 'camvid'
  config.data.root = 'data/camvid'
  config.data.base_size = 360
  config.data.crop_size = (360, 360)  # As CIRKD.
  # Val and test are other drives: colors and light must not be memorised.
  config.data.photometric = 1.0
  config.data.cache = True  # 0.35 GB.
  config.batch_size = 16
  config.num_epochs = 120.0
  config.teacher.num_epochs = 200.0
  config.teacher.backbone = 'resnet34'
  config.optim.lr = 0.05
  config.optim.head_lr_scale = 1.0  # No part starts from pretrained weights.
  config.optim.warmup_epochs = 3.0
  config.eval.every_epochs = 10.0
  config.eval.test_split = 'test'

  return with_variant(
    config, arg, imagenet=imagenet, cpu_imagenet=cpu_imagenet, cpu=cpu
  )
