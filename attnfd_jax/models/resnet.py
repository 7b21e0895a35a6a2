# SPDX-License-Identifier: Apache-2.0
"""Dilated ResNet whose blocks put the ReLU at their entry.

Forward values are those of a standard ResNet; the entry ReLU lets the last
map be tapped before its activation (AttnFD, modeling/backbone/resnet.py).
"""

from typing import ClassVar

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from attnfd_jax.models import layers


class Block(nn.Module):
  """BasicBlock, or Bottleneck when `bottleneck`; returns the raw sum."""

  width: int
  strides: int = 1
  dilation: int = 1
  bottleneck: bool = False
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    def conv_norm(name, features, size, strides=1, dilation=1):
      return layers.ConvNorm(
        features,
        size,
        strides,
        dilation,
        kernel_init=layers.fan_out_normal,
        dtype=self.dtype,
        name=name,
      )

    x = nn.relu(x)
    width, strides, dilation = self.width, self.strides, self.dilation
    if self.bottleneck:
      features = 4 * width
      y = conv_norm('conv1', width, 1)(x, train=train)
      y = conv_norm('conv2', width, 3, strides, dilation)(
        nn.relu(y), train=train
      )
      y = conv_norm('conv3', features, 1)(nn.relu(y), train=train)
    else:
      features = width
      y = conv_norm('conv1', width, 3, strides, dilation)(x, train=train)
      y = conv_norm('conv2', width, 3, 1, dilation)(nn.relu(y), train=train)
    if strides != 1 or x.shape[-1] != features:
      x = conv_norm('downsample', features, 1, strides)(x, train=train)
    x = layers.finished(x + y, layers.any_weight(self))
    return checkpoint_name(x, 'block')


def block_table(stage_sizes, bottleneck, output_stride):
  """[(name, stage from 1, strides, dilation), ...] of the blocks in order."""
  if output_stride == 16:
    strides, dilations = (1, 2, 2, 1), (1, 1, 1, 2)
  else:
    strides, dilations = (1, 2, 1, 1), (1, 1, 2, 4)
  return [
    (
      f'layer{stage + 1}_{i}',
      stage + 1,
      strides[stage] if i == 0 else 1,
      # Multi-grid (1, 2, 4).
      dilations[stage] * (2**i if bottleneck and stage == 3 else 1),
    )
    for stage, blocks in enumerate(stage_sizes)
    for i in range(blocks)
  ]


class ResNet(nn.Module):
  """Returns the stride-4 map and the last map, before its ReLU."""

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  output_stride: int = 16
  width_multiplier: float = 1.0
  dtype: jnp.dtype | None = None

  relu_after_tap: ClassVar[bool] = True

  @nn.compact
  def __call__(self, x, *, train):
    """[b, h, w, 3] -> low level [b, h/4, w/4, c], last map [b, h/s, w/s, c]."""
    base = round(64 * self.width_multiplier)
    x = layers.ConvNorm(
      base,
      7,
      2,
      kernel_init=layers.fan_out_normal,
      dtype=self.dtype,
      name='stem',
    )(x, train=train)
    x = layers.max_pool(nn.relu(x))
    table = block_table(self.stage_sizes, self.bottleneck, self.output_stride)
    for name, stage, strides, dilation in table:
      if stage == 2 and strides == 2:
        low_level = nn.relu(x)
      x = Block(
        base * 2 ** (stage - 1),
        strides,
        dilation,
        self.bottleneck,
        dtype=self.dtype,
        name=name,
      )(x, train=train)
    return low_level, x
