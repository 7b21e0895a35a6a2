# SPDX-License-Identifier: Apache-2.0
"""Defines DeepLabV3+ (arXiv 1802.02611), with the three taps of AttnFD."""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from attnfd_jax.errors import check_name, check_range
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.efficientnet_lite import EfficientNetLite
from attnfd_jax.models.mobilenet_v2 import MobileNetV2
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.types import AnyArray, DType

# To add a backbone, add a module that returns two feature maps, of stride 4 and
# the last one, and whose `relu_after_tap` tells if a ReLU follows the last one.
BACKBONES: dict[str, Any] = {
  'resnet18': functools.partial(ResNet, (2, 2, 2, 2), False),
  'resnet34': functools.partial(ResNet, (3, 4, 6, 3), False),
  'resnet50': functools.partial(ResNet, (3, 4, 6, 3), True),
  'resnet101': functools.partial(ResNet, (3, 4, 23, 3), True),
  'mobilenet_v2': MobileNetV2,
  'efficientnet_lite0': functools.partial(EfficientNetLite, 1.0, 1.0),
  'efficientnet_lite1': functools.partial(EfficientNetLite, 1.0, 1.1),
  'efficientnet_lite2': functools.partial(EfficientNetLite, 1.1, 1.2),
}
TAPS = ('backbone', 'aspp', 'decoder')
# Feature maps before a ReLU, for `extra_taps`.
RAW_TAPS = (
  'layer1_raw',
  'layer2_raw',
  'layer3_raw',
  'layer4_raw',
  'aspp_raw',
  'decoder_raw',
)


def normalize(image: Real[AnyArray, '*batch 3']) -> Float[Array, '*batch 3']:
  """Normalizes RGB images, 0 to 255, by ImageNet's mean and deviation."""
  image = image.astype(jnp.float32) / 255
  mean, std = (
    layers.per_channel(jnp.array(x), image)
    for x in (layers.IMAGE_MEAN, layers.IMAGE_STD)
  )
  return jnp.asarray((image - mean) / std)


def _conv_norm_relu(
  x: Float[AnyArray, 'b h w c'],
  *form: Any,
  train: bool,
  coarse: AnyArray | None = None,
  **options: Any,
) -> jax.Array:
  module = layers.ConvNorm(*form, **options)
  return nn.relu(module(x, train=train, coarse=coarse))


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling, five branches; AttnFD, modeling/aspp.py."""

  features: int
  output_stride: int
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[AnyArray, 'b h w c'],
    *,
    train: bool,
    keep: Callable[..., None] | None = None,
  ) -> Float[Array, 'b h w f']:
    """Merges the branches of the last backbone map; see ResNet for `keep`."""
    conv = functools.partial(_conv_norm_relu, train=train, dtype=self.dtype)
    width, rate = self.features, 96 // self.output_stride
    branches = [conv(x, width, 1, name='point')]
    for i in (1, 2, 3):
      branches.append(conv(x, width, dilation=i * rate, name=f'atrous{i}'))
    pooled = conv(jnp.mean(x, (1, 2), keepdims=True), width, 1, name='pool')
    branches.append(jnp.broadcast_to(pooled, branches[0].shape))
    merge = layers.ConvNorm(width, 1, dtype=self.dtype, name='merge')
    x = merge(jnp.concatenate(branches, -1), train=train)
    if keep:
      keep('aspp', x, norm=('merge', 'bn'))
    return nn.relu(x)


class Decoder(nn.Module):
  """Merges context and detail at stride 4; AttnFD, modeling/decoder.py."""

  features: int
  low_level_features: int
  dropout: float
  dtype: DType | None = None

  @nn.compact
  def __call__(
    self,
    low_level: Float[AnyArray, 'b h4 w4 c4'],
    context: Float[AnyArray, 'b hs ws cs'],
    *,
    train: bool,
    dropout: bool,
    keep: Callable[..., None] | None = None,
  ) -> Float[Array, 'b h4 w4 f']:
    """Merges the maps of the backbone and ASPP; see ResNet for `keep`."""
    conv = functools.partial(_conv_norm_relu, train=train, dtype=self.dtype)
    detail = conv(low_level, self.low_level_features, 1, name='low_level')
    x = conv(detail, self.features, coarse=context, name='conv1')
    x = nn.Dropout(self.dropout, name='dropout')(x, deterministic=not dropout)
    x = layers.ConvNorm(self.features, dtype=self.dtype, name='conv2')(
      x, train=train
    )
    if keep:
      keep('decoder', x, norm=('conv2', 'bn'))
    return nn.relu(x)


class DeepLabV3Plus(nn.Module):
  """A segmentation network; the defaults are those of the AttnFD reference.

  Attributes:
    backbone: a key of BACKBONES.
    num_classes: number of logits per pixel.
    output_stride: image size over size of the last backbone map, 8 or 16.
    width_multiplier: scales the channels of the backbone.
    aspp_channels: channels of the tap 'aspp'.
    decoder_channels: channels of the tap 'decoder'.
    low_level_channels: channels of the stride-4 map in the decoder.
    in_path_attention: refine each tap with a CBAM in the forward pass; the taps
      are then the refined maps. Untrained gates shrink a map to about a
      quarter, so such a network must be trained, or loaded, with its gates.
    aspp_dropout: dropout rate after ASPP. When distilling, the reference has no
      dropout there (aspp.py:86 against :111).
    decoder_dropout: dropout rate in the decoder.
    head_dropout: dropout rate before the classifier.
    update_norms_twice: MobileNetV2 only, see mobilenet_v2.py.
    dtype: compute dtype; parameters and statistics stay float32.
    extra_taps: names from RAW_TAPS of feature maps to return, too, see
      `__call__`; parameters and other results stay the same.
  """

  backbone: str
  num_classes: int
  output_stride: int = 16
  width_multiplier: float = 1.0
  aspp_channels: int = 256
  decoder_channels: int = 256
  low_level_channels: int = 48
  in_path_attention: bool = False
  aspp_dropout: float = 0.5
  decoder_dropout: float = 0.5
  head_dropout: float = 0.1
  update_norms_twice: bool = False
  dtype: DType | None = None
  extra_taps: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for tap in self.extra_taps:
      check_name('tap', tap, RAW_TAPS)
    check_name('backbone', self.backbone, BACKBONES)
    if self.output_stride not in (8, 16):
      raise ValueError(f'output_stride={self.output_stride} must be 8 or 16.')
    check_range('num_classes', self.num_classes, 1)
    check_range('width_multiplier', self.width_multiplier, 1e-3, 64)
    for name, value in layers.options_of(self).items():
      if name.endswith('_channels'):
        check_range(name, value, 1, 2**16)
      elif name.endswith('_dropout'):
        check_range(name, value, 0, 1)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    image: Float[AnyArray, 'b H W 3'],
    *,
    train: bool,
    dropout: bool | None = None,
  ) -> dict[str, Any]:
    """Returns `Outputs`, see network.py.

    Its 'features' are the feature maps 'backbone', 'aspp' and 'decoder', at
    strides output_stride, output_stride and 4. The backbone map of a ResNet is
    taken before its ReLU, the others after theirs. 'coarse_logits' are those
    at stride 4, before the last resize; all logits are float32.

    With `extra_taps`, 'features' also has those maps, each before its ReLU or
    ReLU6, and 'norms' the {'scale', 'bias'} of the last normalization before
    each. 'layer1_raw' to 'layer4_raw' are the stages of a ResNet; in
    MobileNetV2 and EfficientNet-Lite, three expansions and the last map.
    'aspp_raw' and 'decoder_raw' are those of ASPP and decoder.

    Args:
      image: normalized images, see `normalize`.
      train: whether to normalize by batch statistics.
      dropout: whether to apply dropout, with the rng 'dropout'; by default if
        `train`.

    Raises:
      ValueError: if the images have another dtype or shape.
    """
    if not jnp.issubdtype(image.dtype, jnp.floating):
      raise ValueError(
        f'image is {image.dtype}; call attnfd_jax.normalize on uint8 images.'
      )
    if image.ndim != 4 or image.shape[-1] != 3:
      raise ValueError(f'{image.shape=} must be [b, h, w, 3].')
    dropout = train if dropout is None else dropout

    features, norms = {}, {}

    def keep_options(part: str) -> dict[str, Any]:
      def keep(name: str, x: jax.Array, *, norm: tuple[str, ...]) -> None:
        if (tap := f'{name}_raw') in self.extra_taps:
          features[tap], norms[tap] = x, (part, *norm)

      return {'keep': keep} if self.extra_taps else {}

    def add_tap(tap: str, x: jax.Array) -> jax.Array:
      if self.in_path_attention:
        x = CBAM(dtype=self.dtype, name=f'attention_{tap}')(x, train=train)
      features[tap] = x
      return x

    def drop(name: str, rate: float, x: jax.Array) -> jax.Array:
      return nn.Dropout(rate, name=name)(x, deterministic=not dropout)

    names = ['output_stride', 'width_multiplier', 'dtype']
    if self.backbone.startswith('mobilenet'):
      names.append('update_norms_twice')
    options = {name: getattr(self, name) for name in names}
    backbone = BACKBONES[self.backbone](**options, name='backbone')
    low_level, x = backbone(image, train=train, **keep_options('backbone'))
    x = add_tap('backbone', x)
    if backbone.relu_after_tap:
      x = nn.relu(x)
    aspp = ASPP(self.aspp_channels, self.output_stride, self.dtype, name='aspp')
    x = add_tap('aspp', aspp(x, train=train, **keep_options('aspp')))
    x = drop('aspp_dropout', self.aspp_dropout, x)
    form = self.decoder_channels, self.low_level_channels, self.decoder_dropout
    decoder = Decoder(*form, self.dtype, name='decoder')
    options = {'train': train, 'dropout': dropout, **keep_options('decoder')}
    x = add_tap('decoder', decoder(low_level, x, **options))
    x = drop('head_dropout', self.head_dropout, x)
    head = layers.Conv(
      self.num_classes, 1, use_bias=True, dtype=self.dtype, name='classifier'
    )
    coarse = head(x)
    coarse = coarse.astype(layers.at_least_float32(coarse.dtype))
    precision = resizing.logits_precision(self.dtype)
    logits = resizing.resize(coarse, *image.shape[1:3], precision=precision)
    out: dict[str, Any] = {
      'logits': logits,
      'coarse_logits': coarse,
      'features': features,
    }
    if self.extra_taps:
      params = self.variables['params']
      out['norms'] = {
        tap: dict(functools.reduce(lambda x, key: x[key], path, params))
        for tap, path in norms.items()
      }
    return out
