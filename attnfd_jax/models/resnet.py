# SPDX-License-Identifier: Apache-2.0
"""Dilated ResNet whose blocks put the ReLU at their entry.

Forward values are those of a standard ResNet; the entry ReLU lets the last
map be tapped before its activation (AttnFD, modeling/backbone/resnet.py).
"""

import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from attnfd_jax.models import layers

_conv_norm = functools.partial(
  layers.ConvNorm, kernel_init=layers.fan_out_normal
)


class Block(nn.Module):
  """BasicBlock, or Bottleneck when `bottleneck`; returns the raw sum."""

  width: int
  strides: int = 1
  dilation: int = 1
  bottleneck: bool = False
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    conv_norm = functools.partial(_conv_norm, dtype=self.dtype)
    width, strides, dilation = self.width, self.strides, self.dilation
    # Features, kernel size, strides, dilation.
    forms = [(width, 3, strides, dilation), (width, 3, 1, dilation)]
    if self.bottleneck:
      forms = [(width, 1), forms[0], (4 * width, 1)]
    x = y = nn.relu(x)
    for i, form in enumerate(forms, 1):
      y = y if i == 1 else nn.relu(y)
      y = conv_norm(*form, name=f'conv{i}')(y, train=train)
    if strides != 1 or x.shape[-1] != y.shape[-1]:
      x = conv_norm(y.shape[-1], 1, strides, name='downsample')(x, train=train)
    x = layers.finished(x + y, self.variables['params'])
    return checkpoint_name(x, 'block')


def block_table(stage_sizes, bottleneck, output_stride):
  """Yields (name, stage from 1, stride, dilation) of the blocks."""
  if output_stride == 16:
    strides, dilations = (1, 2, 2, 1), (1, 1, 1, 2)
  else:
    strides, dilations = (1, 2, 1, 1), (1, 1, 2, 4)
  stages = zip(stage_sizes, strides, dilations, strict=True)
  for stage, (blocks, stride, dilation) in enumerate(stages, start=1):
    for i in range(blocks):
      grid = 2**i if bottleneck and stage == 4 else 1  # Multi-grid (1, 2, 4).
      yield f'layer{stage}_{i}', stage, stride if i == 0 else 1, dilation * grid


class ResNet(nn.Module):
  """Returns the stride-4 map and the last map, before its ReLU."""

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  output_stride: int = 16
  width_multiplier: float = 1.0
  dtype: jnp.dtype | None = None

  relu_after_tap = True  # In the network that follows.

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    """[b, h, w, 3] -> low level [b, h/4, w/4, c], last map [b, h/s, w/s, c].

    `keep(name, map, norm)` is called with the raw sum of each stage and the
    path of its last normalization.
    """
    base = round(64 * self.width_multiplier)
    stem = _conv_norm(base, 7, 2, dtype=self.dtype, name='stem')
    x = layers.max_pool(nn.relu(stem(x, train=train)))
    table = block_table(self.stage_sizes, self.bottleneck, self.output_stride)
    for name, stage, strides, dilation in table:
      if stage == 2 and strides == 2:
        low_level = nn.relu(x)
      form = (base * 2 ** (stage - 1), strides, dilation, self.bottleneck)
      x = Block(*form, dtype=self.dtype, name=name)(x, train=train)
      if keep and name == f'layer{stage}_{self.stage_sizes[stage - 1] - 1}':
        last = 'conv3' if self.bottleneck else 'conv2'
        keep(f'layer{stage}', x, norm=(name, last, 'bn'))
    return low_level, x
