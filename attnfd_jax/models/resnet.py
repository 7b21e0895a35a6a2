# SPDX-License-Identifier: Apache-2.0
"""Defines a dilated ResNet whose blocks begin with their ReLU.

It computes the same as a standard ResNet; with the ReLU at the beginning, the
last feature map is available before its activation (AttnFD,
modeling/backbone/resnet.py).
"""

from collections.abc import Callable, Iterator, Sequence
import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attnfd_jax.models import layers
from attnfd_jax.types import AnyArray, DType

_conv_norm = functools.partial(
  layers.ConvNorm, kernel_init=layers.fan_out_normal
)


class Block(nn.Module):
  """BasicBlock or Bottleneck; returns the sum before its ReLU."""

  width: int
  strides: int = 1
  dilation: int = 1
  bottleneck: bool = False
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c'], *, train: bool
  ) -> Float[Array, 'b h_out w_out f']:
    """Applies the block to a feature map before its ReLU."""
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
    x = layers.computed_once(x + y, self.variables['params'])
    return checkpoint_name(x, 'block')


def block_table(
  stage_sizes: Sequence[int], bottleneck: bool, output_stride: int
) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, stage from 1, stride, dilation) of each block."""
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
  """A backbone that returns the stride-4 map, and the last map before its ReLU.

  Attributes:
    stage_sizes: number of blocks in each stage.
    bottleneck: kind of the blocks.
    output_stride: 8 or 16.
    width_multiplier: scales the channels.
    dtype: compute dtype.
  """

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  output_stride: int = 16
  width_multiplier: float = 1.0
  dtype: DType | None = None

  relu_after_tap = True  # The network that uses the last map applies it.

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
      keep: called as keep(name, map, norm=path) with the sum of each stage
        before its ReLU, and the path of its last normalization.

    Returns:
      The map at stride 4, after its ReLU, and the last map, before it.
    """
    base = round(64 * self.width_multiplier)
    stem = _conv_norm(base, 7, 2, dtype=self.dtype, name='stem')
    x = layers.max_pool(nn.relu(stem(x, train=train)))
    low_level = x  # Replaced after stage 1.
    table = block_table(self.stage_sizes, self.bottleneck, self.output_stride)
    for name, stage, strides, dilation in table:
      if stage == 2 and strides == 2:
        low_level = nn.relu(x)
      form = (base * 2 ** (stage - 1), strides, dilation, self.bottleneck)
      x = Block(*form, dtype=self.dtype, name=name)(x, train=train)
      if keep and name == f'layer{stage}_{self.stage_sizes[stage - 1] - 1}':
        last_conv = 'conv3' if self.bottleneck else 'conv2'
        keep(f'layer{stage}', x, norm=(name, last_conv, 'bn'))
    return low_level, x
