# SPDX-License-Identifier: Apache-2.0
"""Dilated MobileNetV2 of the AttnFD reference, border quirk included."""

import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from attnfd_jax.models import layers

# (expansion, channels, blocks, stride of the first block), arXiv 1801.04381.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# The reference's distillation forward evaluates the expansion of these blocks
# again, on the unpadded input, for maps nobody uses (mobilenet.py:148-150).
TWICE_UPDATED = (4, 7, 14)
# Blocks whose expansions OFD takes for the stages of a ResNet.
RAW_LAYERS = {4: 'layer1', 7: 'layer2', 14: 'layer3'}


def block_table(output_stride):
  """Yields (expansion, channels, stride, dilation) of blocks 1 to 17."""
  stride, dilation = 2, 1
  for expansion, channels, blocks, first in STAGES:
    taken = first if stride < output_stride else 1
    for i in range(blocks):
      yield expansion, channels, taken if i == 0 else 1, dilation
    # A stride that is not taken becomes dilation of the *next* stage.
    stride, dilation = stride * taken, dilation * (first // taken)


class InvertedResidual(nn.Module):
  """Expand, depthwise, project. The reference pads before the expansion:

  at the border the depthwise convolution sees the expansion of zeros, and the
  statistics of the expansion include those pixels (mobilenet.py:63).
  """

  expansion: int
  features: int
  strides: int
  dilation: int
  update_twice: bool = False
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    conv_norm = functools.partial(layers.ConvNorm, padding=0, dtype=self.dtype)
    hidden, pad = self.expansion * x.shape[-1], (self.dilation, self.dilation)
    y = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    if self.expansion != 1:
      expand = conv_norm(hidden, 1, name='expand')
      expanded = expand(y, train=train)
      y = nn.relu6(expanded)
      twice = self.update_twice and train
      again = expand(x, train=train) if twice else None
      if keep:
        # Where the reference evaluates again what is here but for the border.
        inside = slice(self.dilation, -self.dilation)
        keep(again if twice else expanded[:, inside, inside])
    form = (hidden, 3, self.strides, self.dilation)
    depthwise = conv_norm(*form, depthwise=True, name='depthwise')
    y = nn.relu6(depthwise(y, train=train))
    y = conv_norm(self.features, 1, name='project')(y, train=train)
    if self.strides == 1 and x.shape[-1] == self.features:
      y = layers.finished(x + y, self.variables['params'])
    return checkpoint_name(y, 'block')


class MobileNetV2(nn.Module):
  """Returns the stride-4 map and the last map; both are linear."""

  output_stride: int = 16
  width_multiplier: float = 1.0
  # True repeats a side effect of the reference: METHOD "double BN update".
  update_norms_twice: bool = False
  dtype: jnp.dtype | None = None

  relu_after_tap = False

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    """[b, h, w, 3] -> low level [b, h/4, w/4, c], last map [b, h/s, w/s, c].

    `keep(name, map, norm)` is called with three expansions before their ReLU6
    and the last map, and the path of the last normalization of each.
    """

    def scaled(channels):
      # Multiples of 8, as in the MobileNetV2 paper's smaller networks.
      return max(8, int(channels * self.width_multiplier + 4) // 8 * 8)

    stem = layers.ConvNorm(scaled(32), 3, 2, dtype=self.dtype, name='stem')
    x = nn.relu6(stem(x, train=train))
    rows = enumerate(block_table(self.output_stride), start=1)
    for index, (expansion, channels, strides, dilation) in rows:
      twice = self.update_norms_twice and index in TWICE_UPDATED
      form = (expansion, scaled(channels), strides, dilation, twice)
      name, kept = f'block{index}', {}
      if keep and index in RAW_LAYERS:
        norm = name, 'expand', 'bn'
        kept['keep'] = functools.partial(keep, RAW_LAYERS[index], norm=norm)
      block = InvertedResidual(*form, dtype=self.dtype, name=name)
      x = block(x, train=train, **kept)
      if index == 3:
        low_level = x
    if keep:
      keep('layer4', x, norm=(name, 'project', 'bn'))
    return low_level, x
