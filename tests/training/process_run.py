# SPDX-License-Identifier: Apache-2.0
"""Config of a tiny run, and `main` with small networks, for test_processes."""

import runpy

import flax.linen as nn
import tiny_run

from attnfd_jax.models import layers, resizing
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus


class Small(DeepLabV3Plus):
  """Two convolutions with statistics and noise, which compile fast."""

  @nn.compact
  def __call__(self, image, *, train, dropout=None):
    dropout = train if dropout is None else dropout

    def block(name, x, strides):
      module = layers.ConvNorm(8, strides=strides, name=name)
      return nn.relu(module(x, train=train))

    x = tap = block('decoder', block('backbone', image, 2), 2)
    x = nn.Dropout(self.decoder_dropout)(x, deterministic=not dropout)
    coarse = layers.Conv(self.num_classes, 1, name='classifier')(x)
    return {
      'logits': resizing.resize(coarse, *image.shape[1:3]),
      'coarse_logits': coarse,
      'features': {'decoder': tap},
    }


networks.NETWORKS['coupled'] = Small


def get_config(arg=None):
  """Teacher and student, two epochs of two steps each."""
  del arg
  config = tiny_run.tiny_config()
  config.stages = ('teacher', 'distill')
  config.teacher.network = config.student.network = 'coupled'
  config.data.val_scenes = 3  # Uneven: 2 images for one process, 1 for one.
  config.data.threads = 1
  config.eval.batch_size = 2
  config.eval.num_pictures = 1
  config.eval.every_epochs = 1.0
  config.num_epochs = config.teacher.num_epochs = 2.0
  config.log_every_steps = 1
  config.optim.ema_decay = 0.5
  config.distill.attnfd.student_attention = 'none'
  return config


if __name__ == '__main__':
  runpy.run_module('attnfd_jax.main', run_name='__main__')
