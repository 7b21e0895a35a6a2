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
  def __call__(self, x, *, train):
    conv_norm = functools.partial(layers.ConvNorm, padding=0, dtype=self.dtype)
    hidden, pad = self.expansion * x.shape[-1], (self.dilation, self.dilation)
    y = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    if self.expansion != 1:
      expand = conv_norm(hidden, 1, name='expand')
      y = nn.relu6(expand(y, train=train))
      if self.update_twice and train:
        expand(x, train=train)
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
  def __call__(self, x, *, train):
    """[b, h, w, 3] -> low level [b, h/4, w/4, c], last map [b, h/s, w/s, c]."""

    def scaled(channels):
      # Multiples of 8, as in the MobileNetV2 paper's smaller networks.
      return max(8, int(channels * self.width_multiplier + 4) // 8 * 8)

    stem = layers.ConvNorm(scaled(32), 3, 2, dtype=self.dtype, name='stem')
    x = nn.relu6(stem(x, train=train))
    rows = enumerate(block_table(self.output_stride), start=1)
    for index, (expansion, channels, strides, dilation) in rows:
      twice = self.update_norms_twice and index in TWICE_UPDATED
      form = (expansion, scaled(channels), strides, dilation, twice)
      block = InvertedResidual(*form, dtype=self.dtype, name=f'block{index}')
      x = block(x, train=train)
      if index == 3:
        low_level = x
    return low_level, x
