# SPDX-License-Identifier: Apache-2.0
"""DeepLabV3+ (arXiv 1802.02611) with the three maps that AttnFD distils."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.errors import known, within
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.efficientnet_lite import EfficientNetLite
from attnfd_jax.models.mobilenet_v2 import MobileNetV2
from attnfd_jax.models.resnet import ResNet

# To add a backbone, add a row: a module that is called with (image, train) and
# returns the stride-4 map and the last map, and says if a ReLU follows.
BACKBONES = {
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
# Maps before a ReLU, which `extra_taps` may name.
RAW_TAPS = (
  'layer1_raw',
  'layer2_raw',
  'layer3_raw',
  'layer4_raw',
  'aspp_raw',
  'decoder_raw',
)


def normalise(image):
  """uint8 RGB [..., 3] -> float32 with ImageNet's mean and deviation."""
  image = image.astype(jnp.float32) / 255
  mean, std = (
    layers.per_channel(jnp.array(x), image)
    for x in (layers.IMAGE_MEAN, layers.IMAGE_STD)
  )
  return (image - mean) / std


def _conv_norm_relu(x, *form, train, coarse=None, **options):
  module = layers.ConvNorm(*form, **options)
  return nn.relu(module(x, train=train, coarse=coarse))


class ASPP(nn.Module):
  """Five branches of context at the output stride; AttnFD, modeling/aspp.py."""

  features: int
  output_stride: int
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train, keep=None):
    """[b, h, w, c] -> [b, h, w, features]; `keep` as that of ResNet."""
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
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, low_level, context, *, train, dropout, keep=None):
    """[b, h/4, w/4, c], [b, h/s, w/s, c] -> [b, h/4, w/4, features]; `keep` as
    that of ResNet.
    """
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
    num_classes: number of scores per pixel.
    output_stride: image size over size of the last backbone map, 8 or 16.
    width_multiplier: scales the channels of the backbone.
    aspp_channels, decoder_channels: channels of the other two taps.
    low_level_channels: channels of the stride-4 detail in the decoder.
    in_path_attention: refines each tap by a CBAM inside the forward path; the
      refined maps are then the taps. Fresh gates shrink a map to about a
      quarter, so such a network must be trained, or loaded, with its gates.
    aspp_dropout, decoder_dropout, head_dropout: dropped shares. The reference
      has no ASPP dropout while distilling (aspp.py:86 against :111).
    update_norms_twice: MobileNetV2 only, see mobilenet_v2.py.
    dtype: compute type; parameters and statistics stay float32.
    extra_taps: names of RAW_TAPS that are returned, too, see `__call__`;
      parameters and other results stay the same.
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
  dtype: jnp.dtype | None = None
  extra_taps: tuple[str, ...] = ()

  def __post_init__(self):
    for tap in self.extra_taps:
      known('tap', tap, RAW_TAPS)
    known('backbone', self.backbone, BACKBONES)
    if self.output_stride not in (8, 16):
      raise ValueError(f'output_stride={self.output_stride} must be 8 or 16.')
    within('num_classes', self.num_classes, 1)
    within('width_multiplier', self.width_multiplier, 1e-3, 64)
    for name, value in layers.options_of(self).items():
      if name.endswith('_channels'):
        within(name, value, 1, 2**16)
      elif name.endswith('_dropout'):
        within(name, value, 0, 1)
    super().__post_init__()

  @nn.compact
  def __call__(self, image, *, train, dropout=None):
    """Scores and taps of normalised images.

    Args:
      image: float [b, h, w, 3], see `normalise`.
      train: normalise by the statistics of the batch.
      dropout: drop at random; by default as `train`. Needs the rng 'dropout'.

    Returns:
      'logits': float32 [b, h, w, k], at the size of the image.
      'coarse_logits': [b, h/4, w/4, k], before the last resize.
      'features': {'backbone', 'aspp', 'decoder'}, maps [b, h', w', c] of
        strides output_stride, output_stride and 4. The backbone map of a
        ResNet is tapped before its ReLU, the others after theirs.
      With `extra_taps` also, before its ReLU or ReLU6, 'layer1_raw' to
      'layer4_raw', the raw sum of each stage of a ResNet, of MobileNetV2 and
      EfficientNet-Lite three expansions and the last map; 'aspp_raw' and
      'decoder_raw'; and 'norms': {tap: {'scale', 'bias'}} of the last
      normalization before each.
    """
    if not jnp.issubdtype(image.dtype, jnp.floating):
      raise ValueError(
        f'image is {image.dtype}; call attnfd_jax.normalise on uint8 images.'
      )
    if image.ndim != 4 or image.shape[-1] != 3:
      raise ValueError(f'{image.shape=} must be [b, h, w, 3].')
    dropout = train if dropout is None else dropout

    features, norms = {}, {}

    def keeping(part):
      """Options of a part that may have maps of extra_taps."""

      def keep(name, x, *, norm):
        if (tap := f'{name}_raw') in self.extra_taps:
          features[tap], norms[tap] = x, (part, *norm)

      return {'keep': keep} if self.extra_taps else {}

    def tapped(tap, x):
      if self.in_path_attention:
        x = CBAM(dtype=self.dtype, name=f'attention_{tap}')(x, train=train)
      features[tap] = x
      return x

    def drop(name, rate, x):
      return nn.Dropout(rate, name=name)(x, deterministic=not dropout)

    names = ['output_stride', 'width_multiplier', 'dtype']
    if self.backbone.startswith('mobilenet'):
      names.append('update_norms_twice')
    options = {name: getattr(self, name) for name in names}
    backbone = BACKBONES[self.backbone](**options, name='backbone')
    low_level, x = backbone(image, train=train, **keeping('backbone'))
    x = tapped('backbone', x)
    if backbone.relu_after_tap:
      x = nn.relu(x)
    aspp = ASPP(self.aspp_channels, self.output_stride, self.dtype, name='aspp')
    x = tapped('aspp', aspp(x, train=train, **keeping('aspp')))
    x = drop('aspp_dropout', self.aspp_dropout, x)
    form = self.decoder_channels, self.low_level_channels, self.decoder_dropout
    decoder = Decoder(*form, self.dtype, name='decoder')
    options = {'train': train, 'dropout': dropout, **keeping('decoder')}
    x = tapped('decoder', decoder(low_level, x, **options))
    x = drop('head_dropout', self.head_dropout, x)
    head = layers.Conv(
      self.num_classes, 1, use_bias=True, dtype=self.dtype, name='classifier'
    )
    coarse = head(x)
    coarse = coarse.astype(layers.at_least_float32(coarse.dtype))
    precision = resizing.score_precision(self.dtype)
    logits = resizing.resize(coarse, *image.shape[1:3], precision=precision)
    out = {'logits': logits, 'coarse_logits': coarse, 'features': features}
    if self.extra_taps:
      params = self.variables['params']
      out['norms'] = {
        tap: dict(functools.reduce(lambda x, key: x[key], path, params))
        for tap, path in norms.items()
      }
    return out
