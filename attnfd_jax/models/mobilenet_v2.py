# SPDX-License-Identifier: Apache-2.0
"""Defines the dilated MobileNetV2 of the AttnFD reference, quirks included."""

from collections.abc import Callable, Iterator
import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.models import layers
from attnfd_jax.types import AnyArray, DType

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
# When distilling, the reference computes the expansions of these blocks again,
# on the unpadded input, for feature maps it never uses (mobilenet.py:148-150).
TWICE_UPDATED = (4, 7, 14)
# Blocks whose expansions OFD uses in place of the stages of a ResNet.
RAW_LAYERS = {4: 'layer1', 7: 'layer2', 14: 'layer3'}


def block_table(output_stride: int) -> Iterator[tuple[int, int, int, int]]:
  """Yields (expansion, channels, stride, dilation) of blocks 1 to 17."""
  stride, dilation = 2, 1
  for expansion, channels, blocks, first in STAGES:
    taken = first if stride < output_stride else 1
    for i in range(blocks):
      yield expansion, channels, taken if i == 0 else 1, dilation
    # A stride that is left out becomes dilation from the *next* stage on.
    stride, dilation = stride * taken, dilation * (first // taken)


class InvertedResidual(nn.Module):
  """Expansion, depthwise convolution and projection.

  As in the reference, padding comes before the expansion: at the border the
  depthwise convolution reads the expansion of zeros, and the batch statistics
  of the expansion include those pixels (mobilenet.py:63).

  Attributes:
    expansion: hidden channels over input channels; 1 for no expansion.
    features: output channels.
    strides: of the depthwise convolution.
    dilation: of the depthwise convolution.
    update_twice: in training, update the statistics of the expansion a second
      time, with the unpadded input.
    dtype: compute dtype.
  """

  expansion: int
  features: int
  strides: int
  dilation: int
  update_twice: bool = False
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
        # The reference computes it again; here the border is cut off.
        inside = slice(self.dilation, -self.dilation)
        keep(again if twice else expanded[:, inside, inside])
    form = (hidden, 3, self.strides, self.dilation)
    depthwise = conv_norm(*form, depthwise=True, name='depthwise')
    y = nn.relu6(depthwise(y, train=train))
    y = conv_norm(self.features, 1, name='project')(y, train=train)
    if self.strides == 1 and x.shape[-1] == self.features:
      y = layers.computed_once(x + y, self.variables['params'])
    return checkpoint_name(y, 'block')


class MobileNetV2(nn.Module):
  """A backbone that returns feature maps without activation.

  Attributes:
    output_stride: 8 or 16.
    width_multiplier: scales the channels.
    update_norms_twice: repeat a side effect of the reference, see METHOD,
      "double BN update".
    dtype: compute dtype.
  """

  output_stride: int = 16
  width_multiplier: float = 1.0
  update_norms_twice: bool = False
  dtype: DType | None = None

  relu_after_tap = False

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
      keep: called as keep(name, map, norm=path) with three expansions before
        their ReLU6, with the last map, and the path of their normalization.

    Returns:
      The map at stride 4 and the last map.
    """

    def scaled(channels: int) -> int:
      # A multiple of 8, as in the smaller networks of the MobileNetV2 paper.
      return max(8, int(channels * self.width_multiplier + 4) // 8 * 8)

    stem = layers.ConvNorm(scaled(32), 3, 2, dtype=self.dtype, name='stem')
    x = nn.relu6(stem(x, train=train))
    low_level, name = x, ''  # Both are set in the loop.
    rows = enumerate(block_table(self.output_stride), start=1)
    for index, (expansion, channels, strides, dilation) in rows:
      twice = self.update_norms_twice and index in TWICE_UPDATED
      form = (expansion, scaled(channels), strides, dilation, twice)
      name, options = f'block{index}', {}
      if keep and index in RAW_LAYERS:
        norm = name, 'expand', 'bn'
        options['keep'] = functools.partial(keep, RAW_LAYERS[index], norm=norm)
      block = InvertedResidual(*form, dtype=self.dtype, name=name)
      x = block(x, train=train, **options)
      if index == 3:
        low_level = x
    if keep:
      keep('layer4', x, norm=(name, 'project', 'bn'))
    return low_level, x
