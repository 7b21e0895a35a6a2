# SPDX-License-Identifier: Apache-2.0
"""Networks: sizes, strides, borders, dropout and types."""

import functools

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.models import convolution, layers, resizing
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.deeplab import ASPP, Decoder, DeepLabV3Plus, normalize
from attnfd_jax.models.efficientnet_lite import EfficientNetLite
from attnfd_jax.models.mobilenet_v2 import (
  block_table,
  InvertedResidual,
  MobileNetV2,
)
from attnfd_jax.models.resnet import Block, ResNet

# Float32 through a small network whose features are of order 1 to 10.
CLOSE = {'rtol': 1e-4, 'atol': 1e-4}
BACKBONES = (
  'resnet18',
  'resnet34',
  'resnet50',
  'resnet101',
  'mobilenet_v2',
  'efficientnet_lite0',
  'efficientnet_lite1',
  'efficientnet_lite2',
)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def abstract(module, *shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = functools.partial(module.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), x)


@functools.cache
def abstract_network(backbone, num_classes=21, output_stride=16):
  network = DeepLabV3Plus(backbone, num_classes, output_stride)
  return network, abstract(network, 1, 64, 64, 3)


def small(backbone='resnet18', **options):
  options = {
    'width_multiplier': 0.125,
    'aspp_channels': 8,
    'decoder_channels': 8,
    'low_level_channels': 4,
    **options,
  }
  return DeepLabV3Plus(backbone, 3, **options)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('backbone', 'trunk', 'aspp', 'decoder'),
  [
    ('resnet18', 11_176_512, 4_131_840, 1_299_829),
    ('resnet34', 21_284_672, 4_131_840, 1_299_829),
    ('resnet50', 23_508_032, 15_535_104, 1_309_045),
    ('resnet101', 42_500_160, 15_535_104, 1_309_045),
    ('mobilenet_v2', 1_811_712, 2_706_432, 1_297_909),
    # The trunks as counted in efficientnet_lite_pytorch; the heads are those
    # of MobileNetV2, with a last map of 32 channels more in Lite2.
    ('efficientnet_lite0', 2_958_848, 2_706_432, 1_297_909),
    ('efficientnet_lite1', 3_723_520, 2_706_432, 1_297_909),
    ('efficientnet_lite2', 4_357_952, 2_944_000, 1_297_909),
  ],
  ids=BACKBONES,
)
def test_parameter_counts(backbone, trunk, aspp, decoder):
  params = abstract_network(backbone)[1]['params']
  assert count(params['backbone']) == trunk
  assert count(params['aspp']) == aspp
  assert count(params['decoder']) + count(params['classifier']) == decoder
  assert count(params) == trunk + aspp + decoder


def test_two_classes_less_are_514_parameters_less():
  more = abstract_network('mobilenet_v2')[1]['params']
  less = abstract_network('mobilenet_v2', num_classes=19)[1]['params']
  assert count(more) - count(less) == 514


# Size at stride 4, 8 and 16, by the table of METHOD section 1.
SIZES = {
  (513, 513): ((129, 129), (65, 65), (33, 33)),
  (360, 480): ((90, 120), (45, 60), (23, 30)),
}


@pytest.mark.parametrize('output_stride', [8, 16], ids=['os8', 'os16'])
@pytest.mark.parametrize('size', SIZES, ids=['513', '360x480'])
@pytest.mark.parametrize(
  ('backbone', 'channels'),
  [
    ('resnet18', 512),
    ('resnet50', 2048),
    ('mobilenet_v2', 320),
    ('efficientnet_lite0', 320),
    ('efficientnet_lite2', 352),
  ],
  ids=['resnet18', 'resnet50', 'mobilenet_v2', 'lite0', 'lite2'],
)
def test_shapes(backbone, channels, size, output_stride):
  network, variables = abstract_network(backbone, output_stride=output_stride)
  image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  out = jax.eval_shape(
    functools.partial(network.apply, train=False), variables, image
  )
  quarter, *deep = SIZES[size]
  deep = deep[0] if output_stride == 8 else deep[1]
  assert out['features']['backbone'].shape == (2, *deep, channels)
  assert out['features']['aspp'].shape == (2, *deep, 256)
  assert out['features']['decoder'].shape == (2, *quarter, 256)
  assert out['coarse_logits'].shape == (2, *quarter, 21)
  assert out['logits'].shape == (2, *size, 21)


# (stride, dilation) of every convolution larger than 1x1 before the ASPP.
TRUNKS = {
  ('resnet18', 16): [(2, 1)]
  + [(1, 1)] * 4
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(1, 2)] * 4,
  ('resnet18', 8): [(2, 1)]
  + [(1, 1)] * 4
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(1, 2)] * 4
  + [(1, 4)] * 4,
  ('resnet50', 16): [(2, 1)]
  + [(1, 1)] * 3
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(2, 1)]
  + [(1, 1)] * 5
  + [(1, 2), (1, 4), (1, 8)],
  ('resnet50', 8): [(2, 1)]
  + [(1, 1)] * 3
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(1, 2)] * 6
  + [(1, 4), (1, 8), (1, 16)],
  ('mobilenet_v2', 16): [(2, 1), (1, 1)]
  + [(2, 1), (1, 1)]
  + [(2, 1), (1, 1), (1, 1)]
  + [(2, 1)]
  + [(1, 1)] * 3
  + [(1, 1)] * 3
  + [(1, 1)] * 3
  + [(1, 2)],
  ('mobilenet_v2', 8): [(2, 1), (1, 1)]
  + [(2, 1), (1, 1)]
  + [(2, 1), (1, 1), (1, 1)]
  + [(1, 1)] * 4
  + [(1, 2)] * 3
  + [(1, 2)] * 3
  + [(1, 4)],
  # The convolution whose stride is not taken is not dilated yet.
  ('efficientnet_lite0', 16): [(2, 1), (1, 1)]
  + [(2, 1), (1, 1)]
  + [(2, 1), (1, 1)]
  + [(2, 1)]
  + [(1, 1)] * 2
  + [(1, 1)] * 3
  + [(1, 1)]
  + [(1, 2)] * 3
  + [(1, 2)],
  ('efficientnet_lite2', 8): [(2, 1), (1, 1)]
  + [(2, 1), (1, 1), (1, 1)]
  + [(2, 1), (1, 1), (1, 1)]
  + [(1, 1)]
  + [(1, 2)] * 3
  + [(1, 2)] * 4
  + [(1, 2)]
  + [(1, 4)] * 4
  + [(1, 4)],
}


@pytest.mark.parametrize(
  ('backbone', 'output_stride'), TRUNKS, ids=[f'{b}_os{s}' for b, s in TRUNKS]
)
def test_strides_and_dilations(monkeypatch, backbone, output_stride):
  network, variables = abstract_network(backbone, output_stride=output_stride)
  calls, convolve = [], convolution.convolve

  def spy(x, kernel, *, strides=1, dilation=1, padding=0):
    calls.append((kernel.shape, strides, dilation))
    return convolve(
      x, kernel, strides=strides, dilation=dilation, padding=padding
    )

  def joined_spy(coarse, fine, kernel):
    calls.append((kernel.shape, 1, 1))
    return jnp.zeros((*fine.shape[:3], kernel.shape[-1]))

  monkeypatch.setattr(convolution, 'convolve', spy)
  monkeypatch.setattr(convolution, 'convolve_joined', joined_spy)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  jax.eval_shape(
    functools.partial(network.apply, train=False), variables, image
  )
  large = [call[1:] for call in calls if call[0][0] > 1]
  expected = TRUNKS[backbone, output_stride]
  assert large[: len(expected)] == expected
  rate = {16: 6, 8: 12}[output_stride]
  context = [(1, rate), (1, 2 * rate), (1, 3 * rate)]
  assert large[len(expected) :] == [*context, (1, 1), (1, 1)]
  # A 1x1 convolution strides only where a ResNet stage does: its shortcut.
  steps = [call[1] for call in calls if call[0][0] == 1 and call[1] > 1]
  shortcuts = {16: 2, 8: 1}[output_stride] if 'resnet' in backbone else 0
  assert len(steps) == shortcuts


def test_last_mobilenet_blocks_subsample(fill):
  # Blocks 8 to 10 do not: stride 8 leaves them undilated (METHOD 2.2).
  x = normal(0, 1, 9, 9, 4)
  chosen = (10, 13, 16)  # Blocks 11, 14 and 17.

  def run(output_stride, variables, x):
    table = list(block_table(output_stride))
    for i in chosen:
      module = InvertedResidual(2, 4, *table[i][2:])
      x = module.apply(variables[i], x, train=False)
    return x

  shapes = {i: abstract(InvertedResidual(2, 4, 1, 1), *x.shape) for i in chosen}
  fine, coarse = jax.jit(
    lambda variables: (run(8, variables, x), run(16, variables, x[:, ::2, ::2]))
  )(fill(shapes))
  assert np.std(coarse) > 0.1
  # The border shows the expansion of zeros on both grids.
  np.testing.assert_allclose(fine[:, ::2, ::2], coarse, **CLOSE)


@pytest.mark.parametrize(
  'bottleneck', [False, True], ids=['basic', 'bottleneck']
)
def test_resnet_blocks_at_twice_the_dilation_subsample(fill, bottleneck):
  # The first block of an unstrided ResNet stage is dilated already, and so not
  # what the strided one computes (resnet.py of the reference): blocks only.
  x = normal(0, 1, 17, 17, 32)
  coarse = Block(8, 1, 2, bottleneck)
  fine = Block(8, 1, 4, bottleneck)
  variables = fill(abstract(coarse, *x.shape))

  @functools.partial(jax.jit, static_argnums=0)
  def run(module, x):
    return module.apply(variables, x, train=False)

  y = run(fine, x)
  np.testing.assert_allclose(
    y[:, ::2, ::2], run(coarse, x[:, ::2, ::2]), **CLOSE
  )
  # The offset grid holds other values.
  assert np.abs(y[:, 1::2, 1::2] - y[:, :-1:2, :-1:2]).max() > 0.1


def test_aspp_at_stride_16_subsamples_stride_8(fill):
  x = normal(0, 1, 33, 33, 6)
  variables = fill(abstract(ASPP(4, 16), *x.shape))
  # The mean over the map is not that over every second pixel of it.
  variables['params']['pool']['bn']['scale'][:] = 0

  @functools.partial(jax.jit, static_argnums=0)
  def run(module, x):
    return module.apply(variables, x, train=False)

  fine = run(ASPP(4, 8), x)[:, ::2, ::2]
  np.testing.assert_allclose(fine, run(ASPP(4, 16), x[:, ::2, ::2]), **CLOSE)


def test_aspp_merges_in_the_order_of_the_reference(fill):
  x = normal(0, 2, 7, 7, 6)
  variables = fill(abstract(ASPP(4, 16), *x.shape))
  stats = variables['batch_stats']
  order = ('point', 'atrous1', 'atrous2', 'atrous3', 'pool')
  kernel = variables['params']['merge']['conv']['kernel']
  kernel[:] = 0
  run = jax.jit(functools.partial(ASPP(4, 16).apply, train=False))
  base = run(variables, x)
  for i, name in enumerate(order):
    # Passes only channel 0 of branch i to output 0.
    kernel[:] = 0
    kernel[0, 0, 4 * i, 0] = 1
    x_branch = layers.ConvNorm(
      4, 3 if 'atrous' in name else 1, dilation=6 * i if 0 < i < 4 else 1
    ).apply(
      {
        'params': variables['params'][name],
        'batch_stats': stats[name],
      },
      x.mean((1, 2), keepdims=True) if name == 'pool' else x,
      train=False,
    )
    bn = variables['params']['merge']['bn']
    scale = bn['scale'][0] / np.sqrt(stats['merge']['bn']['var'][0] + 1e-5)
    branch = np.maximum(np.asarray(x_branch)[..., 0], 0)
    expected = (branch - stats['merge']['bn']['mean'][0]) * scale
    expected = np.maximum(expected + bn['bias'][0], 0)
    actual = run(variables, x)
    expected = np.broadcast_to(expected, actual.shape[:3])
    np.testing.assert_allclose(actual[..., 0], expected, **CLOSE)
    np.testing.assert_array_equal(actual[..., 1:], base[..., 1:])


def test_decoder_concatenates_context_then_detail(fill):
  low_level, context = normal(0, 1, 9, 9, 2), normal(1, 1, 3, 3, 4)
  module = Decoder(4, 3, dropout=0.0)
  init = functools.partial(module.init, train=False, dropout=False)
  variables = fill(jax.eval_shape(init, jax.random.key(0), low_level, context))
  # Only the first four inputs of the merging convolution are used.
  kernel = variables['params']['conv1']['conv']['kernel']
  assert kernel.shape[2] == 4 + 3
  kernel[:, :, 4:] = 0
  run = jax.jit(functools.partial(module.apply, train=False, dropout=False))
  y = run(variables, low_level, context)
  np.testing.assert_array_equal(run(variables, -low_level, context), y)
  assert np.abs(run(variables, low_level, -context) - y).max() > 0.01


def numpy_norm(x, params, stats):
  x = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  return x * params['scale'] + params['bias']


def numpy_residual(variables, x, strides, dilation):
  """An inverted residual that pads its input, in evaluation."""
  params, stats = variables['params'], variables['batch_stats']

  def norm(name, x):
    return numpy_norm(x, params[name]['bn'], stats[name]['bn'])

  pad = (dilation, dilation)
  y = np.pad(x, ((0, 0), pad, pad, (0, 0)))
  if 'expand' in params:
    y = np.clip(
      norm('expand', y @ params['expand']['conv']['kernel'][0, 0]), 0, 6
    )
  kernel = params['depthwise']['conv']['kernel'][:, :, 0]
  h, w = x.shape[1:3]
  total = 0
  for i in range(3):
    for j in range(3):
      rows = slice(i * dilation, i * dilation + h, strides)
      columns = slice(j * dilation, j * dilation + w, strides)
      total = total + y[:, rows, columns] * kernel[i, j]
  y = np.clip(norm('depthwise', total), 0, 6)
  y = norm('project', y @ params['project']['conv']['kernel'][0, 0])
  return x + y if x.shape == y.shape else y


@pytest.mark.parametrize(
  ('expansion', 'features', 'strides', 'dilation'),
  [(6, 4, 1, 1), (6, 8, 2, 1), (6, 4, 1, 2), (6, 8, 1, 4), (1, 8, 1, 1)],
  ids=['residual', 'strided', 'dilated', 'dilated4', 'first'],
)
def test_inverted_residual_pads_before_the_expansion(
  fill, expansion, features, strides, dilation
):
  x = normal(0, 2, 7, 6, 4)
  module = InvertedResidual(expansion, features, strides, dilation)
  variables = fill(abstract(module, *x.shape))
  y = jax.jit(functools.partial(module.apply, train=False))(variables, x)
  expected = numpy_residual(variables, x, strides, dilation)
  np.testing.assert_allclose(y, expected, **CLOSE)


@pytest.mark.parametrize('twice', [False, True], ids=['once', 'twice'])
@pytest.mark.parametrize('dilation', [1, 2])
def test_expansion_statistics(fill, dilation, twice):
  x = 1 + normal(0, 2, 5, 4, 3)
  module = InvertedResidual(6, 3, 1, dilation, twice)
  variables = fill(abstract(module, *x.shape))

  @jax.jit
  def run(variables):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  y, updated = run(variables)
  bare = (
    x.astype(np.float64) @ variables['params']['expand']['conv']['kernel'][0, 0]
  )
  # The border counts, with zeros.
  pad = (dilation, dilation)
  padded = np.pad(bare, ((0, 0), pad, pad, (0, 0)))
  expected = variables['batch_stats']['expand']['bn']
  mean, var = expected['mean'], expected['var']
  for values in [padded, bare] if twice else [padded]:
    mean = 0.9 * mean + 0.1 * values.mean((0, 1, 2))
    var = 0.9 * var + 0.1 * values.var((0, 1, 2), ddof=1)
  actual = updated['batch_stats']['expand']['bn']
  np.testing.assert_allclose(actual['mean'], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(actual['var'], var, rtol=1e-5, atol=1e-6)
  once = InvertedResidual(6, 3, 1, dilation).apply(variables, x, train=True)
  np.testing.assert_allclose(y, once, **CLOSE)


def test_update_norms_twice_moves_three_norms(fill):
  image = normal(0, 2, 33, 33, 3)
  once = MobileNetV2(width_multiplier=0.1)
  twice = MobileNetV2(width_multiplier=0.1, update_norms_twice=True)

  def run(module, variables):
    maps, updated = module.apply(
      variables, image, train=True, mutable=['batch_stats']
    )
    return maps, traverse_util.flatten_dict(updated['batch_stats'], sep='/')

  # One program: the compiler merges what both compute.
  (maps, stats), (same, other) = jax.jit(
    lambda variables: (run(once, variables), run(twice, variables))
  )(fill(abstract(once, *image.shape)))
  for actual, expected in zip(same, maps, strict=True):
    np.testing.assert_allclose(actual, expected, **CLOSE)
  moved = {
    name.rpartition('/')[0]
    for name, value in stats.items()
    # Rounding at most; a second update moves by per cents.
    if not np.allclose(value, other[name], rtol=1e-3, atol=1e-4)
  }
  assert moved == {f'block{i}/expand/bn' for i in (4, 7, 14)}


def test_networks_pass_update_norms_twice_on(monkeypatch):
  updates, original = [], InvertedResidual.__call__

  def spy(self, x, *, train):
    updates.append(self.update_twice)
    return original(self, x, train=train)

  monkeypatch.setattr(InvertedResidual, '__call__', spy)
  abstract(small('mobilenet_v2', update_norms_twice=True), 1, 33, 33, 3)
  assert [i for i, twice in enumerate(updates, 1) if twice] == [4, 7, 14]


@pytest.mark.parametrize(
  'backbone', ['resnet18', 'mobilenet_v2', 'efficientnet_lite0']
)
def test_taps(fill, backbone):
  network = small(backbone)
  image = normal(0, 1, 33, 33, 3)
  variables = fill(abstract(network, *image.shape))
  seen = {}

  def record(next_function, args, kwargs, context):
    if isinstance(context.module, ASPP):
      seen['aspp_input'] = args[0]
    return next_function(*args, **kwargs)

  @jax.jit
  def run(variables):
    seen.clear()
    with nn.intercept_methods(record):
      out = network.apply(variables, image, train=False)
    return out, dict(seen)

  out, inputs = run(variables)
  features = out['features']
  assert set(features) == {'backbone', 'aspp', 'decoder'}
  tap = np.asarray(features['backbone'])
  assert tap.min() < 0  # Before the last ReLU, or linear.
  expected = np.maximum(tap, 0) if backbone == 'resnet18' else tap
  np.testing.assert_array_equal(inputs['aspp_input'], expected)
  for name in ('aspp', 'decoder'):
    assert np.min(features[name]) == 0 < np.max(features[name])
  logits = resizing.resize(out['coarse_logits'], 33, 33)
  # The same resize, compiled with the network.
  np.testing.assert_allclose(out['logits'], logits, **CLOSE)
  head = variables['params']['classifier']
  expected = features['decoder'] @ head['kernel'][0, 0]
  np.testing.assert_allclose(
    out['coarse_logits'], np.asarray(expected) + head['bias'], **CLOSE
  )


@pytest.mark.parametrize(
  'module',
  [
    ResNet((1, 1, 1, 1), False, width_multiplier=0.125),
    MobileNetV2(width_multiplier=0.2),
    EfficientNetLite(1.0, 1.0, width_multiplier=0.2),
  ],
  ids=['resnet18', 'mobilenet_v2', 'efficientnet_lite0'],
)
def test_low_level_map(fill, module):
  # A ResNet gives it after a ReLU, the others without one.
  is_resnet = isinstance(module, ResNet)
  image = normal(0, 1, 33, 33, 3)
  variables = fill(abstract(module, *image.shape))
  run = jax.jit(functools.partial(module.apply, train=False))
  low_level, _ = run(variables, image)
  assert low_level.shape == (1, 9, 9, 8)
  assert (np.min(low_level) < 0) == (not is_resnet)


def test_in_path_attention_refines_the_taps(fill):
  image = normal(0, 1, 33, 33, 3)
  network = small(in_path_attention=True)
  variables = fill(abstract(network, *image.shape))
  gates = {name for name in variables['params'] if 'attention' in name}
  assert gates == {
    f'attention_{tap}' for tap in ('backbone', 'aspp', 'decoder')
  }
  plain = {
    part: {k: v for k, v in tree.items() if k not in gates}
    for part, tree in variables.items()
  }
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.map(np.shape, plain),
    jax.tree.map(np.shape, abstract(small(), *image.shape)),
  )

  def run(variables, plain):
    refined = network.apply(variables, image, train=False)['features']
    bare = small().apply(plain, image, train=False)['features']

    def part(name):
      return {kind: tree[name] for kind, tree in variables.items()}

    def refine(tap, x):
      return CBAM().apply(part(f'attention_{tap}'), x, train=False)

    trunk = refine('backbone', bare['backbone'])
    # The gated map goes on into the ASPP.
    context = ASPP(8, 16).apply(part('aspp'), nn.relu(trunk), train=False)
    return refined, {'backbone': trunk, 'aspp': refine('aspp', context)}

  refined, expected = jax.jit(run)(variables, plain)
  for tap, wanted in expected.items():
    np.testing.assert_allclose(refined[tap], wanted, **CLOSE)


DROPS = {
  # Which outputs change when only this dropout is on.
  'aspp_dropout': {'decoder', 'logits'},
  'decoder_dropout': {'decoder', 'logits'},
  'head_dropout': {'logits'},
}


@pytest.mark.parametrize(('name', 'changed'), DROPS.items(), ids=DROPS)
def test_dropouts(fill, name, changed):
  rates = dict.fromkeys(DROPS, 0.0) | {name: 0.5}
  network = small(**rates)
  image = normal(0, 1, 33, 33, 3)
  variables = fill(abstract(network, *image.shape))

  @functools.partial(jax.jit, static_argnames='dropout')
  def run(rng=None, *, dropout):
    out = network.apply(
      variables,
      image,
      train=False,
      dropout=dropout,
      rngs={} if rng is None else {'dropout': rng},
    )
    return {'logits': out['logits'], **out['features']}

  bare = run(dropout=None)  # As train: off, and no rng is needed.
  first, second = (run(jax.random.key(i), dropout=True) for i in (0, 1))
  for output in bare:
    same = np.allclose(first[output], bare[output], rtol=1e-4, atol=1e-4)
    again = np.allclose(first[output], second[output], rtol=1e-4, atol=1e-4)
    assert same == again == (output not in changed), output


def test_training_drops_unless_told_otherwise():
  network = small()
  image = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32)
  variables = abstract(network, *image.shape)
  train = functools.partial(network.apply, train=True)
  with pytest.raises(Exception, match='dropout'):
    jax.eval_shape(train, variables, image)
  jax.eval_shape(functools.partial(train, dropout=False), variables, image)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'backbone': 'resnet-18'}, "Unknown backbone 'resnet-18'.*'resnet18'"),
    ({'backbone': 'vgg'}, 'Have: resnet18, .*mobilenet_v2'),
    ({'output_stride': 32}, 'output_stride=32 must be 8 or 16'),
    ({'num_classes': 0}, 'num_classes=0 must be 1 or more'),
  ],
  ids=['near', 'far', 'stride', 'classes'],
)
def test_wrong_options(options, message):
  options = {'backbone': 'resnet18', 'num_classes': 2} | options
  with pytest.raises(ValueError, match=message):
    DeepLabV3Plus(**options)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'message'),
  [
    ((1, 33, 33, 3), np.uint8, 'uint8; call attnfd_jax.normalize'),
    ((1, 33, 33, 4), np.float32, r'\(1, 33, 33, 4\) must be \[b, h, w, 3\]'),
    ((33, 33, 3), np.float32, r'\(33, 33, 3\) must be \[b, h, w, 3\]'),
  ],
  ids=['uint8', 'channels', 'rank'],
)
def test_wrong_images(no_type_checks, key, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    small().init(key, np.zeros(shape, dtype), train=False)


def test_normalize():
  image = np.array([[[0, 0, 0], [255, 255, 255], [124, 116, 104]]], np.uint8)
  mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
  actual = normalize(image)
  assert actual.dtype == jnp.float32
  expected = (image / 255 - mean) / std
  # Numbers of order 1 in float32.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'backbone', ['resnet18', 'mobilenet_v2', 'efficientnet_lite0']
)
def test_bfloat16_keeps_variables_in_float32(fill, backbone):
  network = small(backbone, dtype=jnp.bfloat16)
  image = normal(0, 2, 33, 33, 3)
  shapes = abstract(network, *image.shape)

  def run(variables):
    return network.apply(
      variables, image, train=True, dropout=False, mutable=['batch_stats']
    )

  if backbone == 'resnet18':
    out, updated = jax.jit(run)(fill(shapes))
    for leaf in jax.tree.leaves((out, updated)):
      assert np.isfinite(np.asarray(leaf, np.float32)).all()
  else:  # Compiles for long, and could differ in types only.
    out, updated = jax.eval_shape(run, shapes)
  for leaf in jax.tree.leaves((shapes, updated)):
    assert leaf.dtype == jnp.float32
  assert out['logits'].dtype == out['coarse_logits'].dtype == jnp.float32
  for feature in out['features'].values():
    assert feature.dtype == jnp.bfloat16
