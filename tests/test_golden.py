# SPDX-License-Identifier: Apache-2.0
"""Networks, statistics, loss and gradients against torch, without torch.

golden/make_networks.py computed the numbers in networks/ in float64; here they
are computed in float64 as well, so that a difference is one of meaning and not
of rounding. State dicts have the authors' names and come in by torch_models.
"""

import functools
import json
import pathlib
import re

from golden import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnfd_jax.config import default_config, resolve
from attnfd_jax.devices import sharding
from attnfd_jax.distill import make_distiller
from attnfd_jax.distill.attnfd import Connector
from attnfd_jax.losses import softmax_cross_entropy
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.deeplab import ASPP, Decoder, DeepLabV3Plus, TAPS
from attnfd_jax.models.mobilenet_v2 import InvertedResidual
from attnfd_jax.models.resnet import Block
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.training.step import make_state, make_train_step

FOLDER = pathlib.Path(__file__).parent / 'golden' / 'networks'
IMAGE, CLASSES = (3, 3, 33, 37), 5
# Of the largest value of a tensor. The numbers are stored in float32, half a
# unit of which is 6e-8; what is computed in float64 agrees to 1e-10.
TOLERANCE = 2e-7


@pytest.fixture(scope='module', autouse=True)
def exact():
  """Float64; programs that run once are not worth optimizing."""
  values = {
    'jax_enable_x64': (True, False),
    'jax_default_matmul_precision': ('highest', None),
    'jax_disable_most_optimizations': (True, False),
    # Fresh variables are float32 in part, whatever the image is.
    'jax_numpy_dtype_promotion': ('standard', 'strict'),
  }
  for name, (here, _) in values.items():
    jax.config.update(name, here)
  yield
  for name, (_, before) in values.items():
    jax.config.update(name, before)


@functools.cache
def golden(name):
  with np.load(FOLDER / f'{name}.npz') as file:
    return dict(file)


def nhwc(x):
  return np.moveaxis(x, 1, -1)


def draw_state(seed, shapes):
  """The state dict that torch had, {name: array}; buffers that count are 0."""
  return {
    name: drawn.weight(f'{seed} {name}', shape)
    if shape
    else np.zeros((), np.int64)
    for name, shape in drawn.from_bytes(shapes).items()
  }


def as_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_close(actual, expected, name):
  expected = np.asarray(expected, np.float64)
  scale = np.abs(expected).max()
  # What is 0 in theory is rounding on both sides.
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=TOLERANCE * scale + 1e-12, err_msg=name
  )


def stored(arrays, key):
  """{name: summary} of a state dict."""
  return drawn.unpack(arrays[f'{key}/values'], arrays[f'{key}/sizes'])


def assert_same_state(tensors, expected):
  """Every tensor by its summary; neither side has more."""
  assert set(tensors) == set(expected)
  for name, value in tensors.items():
    assert_close(drawn.summary(name, value), expected[name], name)


def test_tensors_are_drawn_as_torch_had_them():
  versions = json.loads((FOLDER / 'versions.json').read_text())
  assert drawn.checksum() == versions['drawn']


# Layers and blocks: module, name of a path in the authors' files.


def at(module, backbone='resnet18'):
  """Names of the leaves of a module at a path of DeepLabV3Plus."""
  return lambda path: torch_names.network_name(f'{module}/{path}', backbone)


def of_gate(path):
  return torch_names.gate_name('aspp', path)


def of_connector(path):
  return torch_names.connector_name('backbone', path)


def resized(height, width):
  return lambda x: resizing.resize(x, height, width)


CASES = {
  'conv_norm': (layers.ConvNorm(8, 3, 2, 2), at('backbone/stem')),
  'depthwise': (
    layers.ConvNorm(6, 3, 2, 2, depthwise=True),
    at('backbone/block5/depthwise', 'mobilenet_v2'),
  ),
  'larger': (resized(9, 13), None),
  'smaller': (resized(4, 6), None),
  'from_point': (resized(4, 5), None),
  'to_point': (resized(1, 1), None),
  'max_pool': (layers.max_pool, None),
  'basic_block': (Block(8, 2, 2), at('backbone/layer3_0')),
  'bottleneck': (Block(4, 1, 4, bottleneck=True), at('backbone/layer4_1')),
  'inverted_residual': (
    InvertedResidual(6, 4, 1, 2),
    at('backbone/block4', 'mobilenet_v2'),
  ),
  'updated_twice': (
    InvertedResidual(6, 6, 2, 1, update_twice=True),
    at('backbone/block4', 'mobilenet_v2'),
  ),
  'aspp': (ASPP(4, 16), at('aspp')),
  'decoder': (Decoder(6, 3, dropout=0.0), at('decoder')),
  'cbam': (CBAM(freeze_mlp=True), of_gate),
  'cbam_free': (CBAM(parameter_free=True), None),
  'connector': (Connector(7), of_connector),
}


def run_modes(apply, variables, maps, weights):
  """Outputs in both modes, statistics and gradients, from one program."""

  def weighed(params, maps):
    y, updated = apply({**variables, 'params': params}, *maps, train=True)
    return jnp.sum(y * weights), (y, updated)

  @jax.jit
  def run(params, maps):
    grads, (y, updated) = jax.grad(weighed, (0, 1), has_aux=True)(params, maps)
    y_eval, _ = apply({**variables, 'params': params}, *maps, train=False)
    return y_eval, y, updated, *grads

  return run(variables['params'], maps)


@pytest.mark.parametrize('name', CASES)
def test_layers_and_blocks(name):
  module, name_of = CASES[name]
  expected = {
    key.removeprefix(f'{name}/'): value
    for key, value in golden('cases').items()
    if key.startswith(f'{name}/')
  }
  maps = [
    nhwc(drawn.image(f'{name} {i}', expected[f'gradient/{i}'].shape))
    for i in range(2)
    if f'gradient/{i}' in expected
  ]
  options = {'dropout': False} if name == 'decoder' else {}
  variables = {'params': {}}
  if name_of:
    init = functools.partial(module.init, train=False, **options)
    target = jax.eval_shape(init, jax.random.key(0), *maps)
    tensors = draw_state(name, expected['state'])
    filled, report = torch_names.fill(target, tensors, name_of)
    assert not report.missing and not report.reshaped
    left = [x for x in report.unexpected if 'num_batches_tracked' not in x]
    assert not left
    variables = as_float64(filled)

  def apply(variables, *maps, train):
    if hasattr(module, 'apply'):
      mutable = ['batch_stats'] if train else []
      return module.apply(
        variables, *maps, train=train, mutable=mutable, **options
      )
    return module(*maps), {}

  shape = expected['train'].shape
  weights = nhwc(drawn.uniform(f'{name} weights', shape))
  y_eval, y, updated, grads, map_grads = run_modes(
    apply, variables, maps, weights
  )
  assert_close(y, nhwc(expected['train']), 'train')
  for i, grad in enumerate(map_grads):
    assert_close(grad, nhwc(expected[f'gradient/{i}']), f'map {i}')
  if not name_of:
    return
  assert_close(y_eval, nhwc(expected['eval']), 'eval')
  for key, tree in (
    ('statistics', {'batch_stats': updated['batch_stats']}),
    ('gradients', {'params': grads}),
  ):
    tensors = exported(tree, name_of)
    for frozen in [x for x in tensors if '.mlp.' in x]:
      np.testing.assert_array_equal(tensors.pop(frozen), 0)
    assert_same_state(tensors, stored(expected, key))


def exported(tree, name_of):
  return {
    name: value
    for name, value in torch_names.export(tree, name_of).items()
    if not name.endswith('num_batches_tracked')
  }


# Whole networks and one step of the recipe.

NARROW = {
  'aspp_channels': 32,
  'decoder_channels': 16,
  'low_level_channels': 8,
}
NETWORKS = {
  'resnet18': {'width_multiplier': 0.125, **NARROW},
  'mobilenet_v2': {
    'width_multiplier': 0.25,
    'update_norms_twice': True,
    **NARROW,
  },
  'resnet50': {
    'width_multiplier': 0.125,
    'aspp_channels': 48,
    'decoder_channels': 32,
    'low_level_channels': 8,
  },
}
# torch draws other noise.
UNDROPPED = dict.fromkeys(
  ('aspp_dropout', 'decoder_dropout', 'head_dropout'), 0.0
)


@functools.cache
def load(backbone):
  """Network, its variables, its gates and its whole state dict."""
  seed = 'teacher' if backbone == 'resnet50' else backbone
  tensors = draw_state(seed, golden(backbone)['state'])
  own = {k: v for k, v in tensors.items() if not k.startswith('Connectors.')}
  options = NETWORKS[backbone] | UNDROPPED
  # Refuses missing, unknown and misshapen tensors.
  variables, gates = torch_models.load_torch(
    own, backbone=backbone, num_classes=CLASSES, **options
  )
  network = DeepLabV3Plus(backbone, CLASSES, **options)
  return network, as_float64(variables), as_float64(gates), tensors


def get_image():
  return nhwc(drawn.image('image', IMAGE))


@functools.cache
def run_eval(backbone):
  network, variables, *_ = load(backbone)
  return jax.jit(functools.partial(network.apply, train=False))(
    variables, get_image()
  )


@functools.cache
def run_teacher():
  """Its outputs in train mode, and what its statistics would become."""
  network, variables, *_ = load('resnet50')

  @jax.jit
  def run(variables, image):
    return network.apply(variables, image, train=True, mutable=['batch_stats'])

  return run(variables, get_image())


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('backbone', NETWORKS)
def test_networks(backbone, mode):
  if mode == 'eval':
    outputs = run_eval(backbone)
  elif backbone == 'resnet50':
    outputs, _ = run_teacher()
  else:  # Of a whole step, so that nothing is compiled twice.
    outputs = run_step(backbone)[2]['outputs']
  expected = golden(backbone)
  for tap in TAPS:
    actual = outputs['features'][tap]
    assert_close(actual, nhwc(expected[f'{mode}/{tap}']), tap)
  # Thinned out: the loss has seen them all.
  logits = outputs['logits'][:, 1::3, ::4]
  assert_close(logits, nhwc(expected[f'{mode}/logits']), 'logits')


def of_network(tree, backbone, gates=None):
  """{name: array} of collections of a network, and of its gates by tap."""
  tensors = torch_models.export_torch(tree, gates, backbone=backbone)
  return {
    name: value
    for name, value in tensors.items()
    # Counters of batches, and MobileNetV2's names for the same tensors.
    if not re.search('num_batches_tracked|_level_features', name)
  }


def test_statistics_of_a_bottleneck_network():
  _, updated = run_teacher()
  expected = stored(golden('resnet50'), 'statistics')
  own = {k: v for k, v in expected.items() if '.cbam.' not in k}
  assert_same_state(of_network(updated, 'resnet50'), own)


def load_connectors(student, teacher, tensors):
  """{'params', 'batch_stats'} of the connectors by tap, for two Outputs."""
  found = {'params': {}, 'batch_stats': {}}
  for tap in TAPS:
    inputs, features = (
      x['features'][tap].shape[-1] for x in (student, teacher)
    )
    module = Connector(features)
    x = jnp.zeros((1, 1, 1, inputs), jnp.float32)
    target = jax.eval_shape(
      functools.partial(module.init, train=False), jax.random.key(0), x
    )
    filled, report = torch_names.fill(
      target, tensors, functools.partial(torch_names.connector_name, tap)
    )
    assert not report.missing and not report.reshaped
    for part in found:
      found[part][tap] = filled[part]
  return as_float64(found)


def split_distiller(tree):
  """A collection of the distiller as gates and connectors by tap."""
  gates, connectors = {}, {}
  for module, value in tree['methods_attnfd'].items():
    kind, tap = module.rsplit('_', 1)
    {'student_gates': gates, 'connectors': connectors}[kind][tap] = value
  return gates, connectors


class Given:
  """A teacher whose outputs are its variables: nothing to compile again."""

  def apply(self, variables, image, *, rng=None):
    assert rng is not None  # METHOD 4.3: the teacher is in train mode.
    return variables


class Shown:
  """A distiller that puts what the student gave beside its terms."""

  def __init__(self, distiller):
    self._distiller = distiller

  def apply(self, variables, student, *inputs, **options):
    (losses, terms), updated = self._distiller.apply(
      variables, student, *inputs, **options
    )
    return (losses, terms | {'outputs': student}), updated

  def weight(self, name, step):
    return self._distiller.weight(name, step)

  def task_weight(self, step):
    return self._distiller.task_weight(step)


@functools.cache
def run_step(backbone):
  """State before and after a step of recipe `reference`, and its metrics."""
  config = default_config()
  config.recipe = 'reference'
  distill = resolve(config).distill
  student, variables, gates, tensors = load(backbone)
  teacher_gates = load('resnet50')[2]
  target, _ = run_teacher()
  distiller = make_distiller('attnfd', distill)
  connectors = load_connectors(run_eval(backbone), target, tensors)
  frozen = {'methods_attnfd': teacher_gates}
  wanted = {'student': variables, 'distiller': {'teacher': frozen}}
  for part in ('params', 'batch_stats'):
    modules = {f'student_gates_{k}': v for k, v in gates[part].items()}
    modules |= {f'connectors_{k}': v for k, v in connectors[part].items()}
    wanted['distiller'][part] = {'methods_attnfd': modules}
  # The update is the gradient.
  tx = optax.scale(-1.0)
  start = make_state(wanted, tx, ema=False)
  train_step = make_train_step(
    student,
    tx,
    task_loss=lambda *x: {'ce': softmax_cross_entropy(*x)},
    teacher=Given(),
    distiller=Shown(distiller),
    schedule=lambda step: 0.0,
    mesh=sharding.make_mesh(1),
    ce_batch_division=distill.ce_batch_division,
  )
  label = drawn.labels('label', (IMAGE[0], *IMAGE[2:]), CLASSES)
  state, metrics = train_step(
    jax.tree.map(np.copy, start),
    target,
    {'image': get_image(), 'label': label},
    jax.random.key(0),
  )
  return start, state, metrics


def step_tensors(backbone, part, student, distiller):
  """{name: array} of one collection of the student and of the distiller."""
  gates, connectors = split_distiller(distiller)
  tensors = of_network({part: student}, backbone, {part: gates})
  return tensors | exported(
    {part: connectors},
    lambda path: torch_names.connector_name(*path.split('/', 1)),
  )


STUDENTS = ('resnet18', 'mobilenet_v2')


@pytest.mark.parametrize('backbone', STUDENTS)
def test_losses_of_a_step(backbone):
  """Cross-entropy over the batch, plus twice the terms of the three taps."""
  *_, metrics = run_step(backbone)
  expected = {
    key.removeprefix('loss/'): value
    for key, value in golden(backbone).items()
    if key.startswith('loss/')
  }
  assert set(expected) <= set(metrics)
  for name, value in expected.items():
    assert_close(metrics[name], value, name)


@pytest.mark.parametrize('backbone', STUDENTS)
def test_gradients_of_a_step(backbone):
  """Of every trained tensor; the MLPs of the gates have none."""
  start, state, _ = run_step(backbone)
  grads = jax.tree.map(lambda a, b: a - b, start.params, state.params)
  tensors = step_tensors(backbone, 'params', **grads)
  frozen = [name for name in tensors if '.mlp.' in name]
  assert len(frozen) == 12
  for name in frozen:
    np.testing.assert_array_equal(tensors.pop(name), 0)
  assert_same_state(tensors, stored(golden(backbone), 'gradients'))


@pytest.mark.parametrize('backbone', STUDENTS)
def test_statistics_after_a_step(backbone):
  """Of the student, its gates and the connectors.

  Three norms of MobileNetV2 are updated twice.
  """
  _, state, _ = run_step(backbone)
  parts = {
    name: tree['batch_stats'] for name, tree in state.collections.items()
  }
  tensors = step_tensors(backbone, 'batch_stats', **parts)
  assert_same_state(tensors, stored(golden(backbone), 'statistics'))
