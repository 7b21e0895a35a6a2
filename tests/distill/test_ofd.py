# SPDX-License-Identifier: Apache-2.0
"""OFD against NumPy, and the maps that networks give when they are asked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny_run

from attnfd_jax import distill
from attnfd_jax.config import resolve
from attnfd_jax.data import sources
from attnfd_jax.devices import sharding
from attnfd_jax.distill import ofd
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus, RAW_TAPS
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.class_order import Reordered
from attnfd_jax.teachers.teacher import FrozenNetwork, with_taps
from attnfd_jax.training import stage as stages

DIVISORS = (8, 4, 2, 1, 1, 16)
LABELS = np.full((2, 16, 16), 255, np.uint8)
SMALL = {
  'num_classes': 3,
  'width_multiplier': 0.125,
  'aspp_channels': 8,
  'decoder_channels': 16,
  'low_level_channels': 4,
}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Margins.


def expected_margin(scale, bias):
  s = abs(float(scale))
  share = (1 + math.erf(-bias / s / math.sqrt(2))) / 2
  if share <= 0.001:
    return -3 * s
  density = math.exp(-((bias / s) ** 2) / 2) / math.sqrt(2 * math.pi)
  return bias - s * density / share


@pytest.mark.parametrize(
  ('scale', 'bias', 'expected'),
  [
    (1, 0, -0.79788),
    (-1, 0, -0.79788),
    (0.5, 0.3, -0.30751),
    (2, -1, -2.01832),
    (1, 5, -3),
  ],
)
def test_margins(scale, bias, expected):
  found = ofd.margin(jnp.float32(scale), jnp.float32(bias))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(found, expected_margin(scale, bias), rtol=1e-5)


def test_a_margin_is_the_mean_of_what_is_negative():
  x = 0.7 * np.random.default_rng(0).normal(size=1_000_000) + 0.4
  found = ofd.margin(jnp.float32(0.7), jnp.float32(0.4))
  np.testing.assert_allclose(found, x[x < 0].mean(), rtol=5e-3)


def test_margins_of_channels_that_never_vary():
  scale, bias = jnp.zeros(3), jnp.array([-2.0, 0.0, 3.0])
  np.testing.assert_allclose(ofd.margin(scale, bias), [-2, 0, 0], atol=1e-9)


# The distance.


def test_partial_distance():
  # Positive targets always count, others where the student is above.
  student = jnp.array([1.0, -3.0, 0.5, -2.0])
  target = jnp.array([2.0, 1.0, -0.5, -0.5])
  loss, grads = jax.value_and_grad(ofd.partial_distance)(student, target)
  np.testing.assert_allclose(loss, 1 + 16 + 1 + 0)
  np.testing.assert_allclose(grads, [-2, -8, 2, 0])
  np.testing.assert_array_equal(
    jax.grad(ofd.partial_distance, 1)(student, target), 0
  )
  loss, grads = jax.value_and_grad(ofd.partial_distance)(target, target)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0)


def make_outputs(seed, channels, dtype=np.float32):
  maps, norms = {}, {}
  for i, tap in enumerate(RAW_TAPS):
    maps[tap] = normal(seed + i, 2, 4 + i, 5, channels).astype(dtype)
    scale = 1 + normal(seed + 10 + i, channels) / 4
    norms[tap] = {'scale': scale, 'bias': normal(seed + 20 + i, channels)}
  logits = np.zeros((2, 16, 16, 3), np.float32)
  return {'logits': logits, 'features': maps, 'norms': norms}


def test_value(fill):
  method = ofd.OFD()
  student, teacher = make_outputs(0, 4), make_outputs(50, 6)
  init = functools.partial(method.init, train=False, step=0)
  variables = fill(
    jax.eval_shape(init, jax.random.key(0), student, teacher, LABELS)
  )
  loss, terms = method.apply(
    variables, student, teacher, LABELS, train=False, step=0
  )
  expected = {}
  for tap, divisor in zip(RAW_TAPS, DIVISORS, strict=True):
    weights, stats = (
      variables[part][f'connectors_{tap}']['conv_norm']
      for part in ('params', 'batch_stats')
    )
    norm, moments = weights['bn'], stats['bn']
    x = student['features'][tap].astype(np.float64)
    x = x @ weights['conv']['kernel'][0, 0].astype(np.float64)
    deviation = np.sqrt(moments['var'].astype(np.float64) + 1e-5)
    x = (x - moments['mean']) / deviation * norm['scale'] + norm['bias']
    pairs = teacher['norms'][tap].values()
    margins = [expected_margin(*pair) for pair in zip(*pairs, strict=True)]
    y = np.maximum(teacher['features'][tap], np.array(margins))
    total = np.sum((x - y) ** 2 * ((x > y) | (y > 0)))
    expected[tap] = total / divisor / 2
  assert set(terms) == set(expected)
  for tap, value in expected.items():
    # Some hundred squares of float32.
    np.testing.assert_allclose(terms[tap], value, rtol=1e-5)
  np.testing.assert_allclose(loss.value, sum(expected.values()), rtol=1e-5)
  assert loss.count == 2


def test_bfloat16_and_zeros():
  method = ofd.OFD()
  student, teacher = (make_outputs(x, 4, jnp.bfloat16) for x in (0, 50))
  run = functools.partial(distill.init_distiller, method, train=True)
  variables = run((student, teacher))
  zeros = jax.tree.map(np.zeros_like, teacher)

  def loss(student, teacher):
    (value, _), _ = method.apply(
      variables,
      student,
      teacher,
      LABELS,
      train=True,
      step=0,
      mutable=['batch_stats'],
    )
    return value.value

  for pair in ((student, teacher), (zeros, teacher), (zeros, zeros)):
    value, grads = jax.value_and_grad(loss, (0, 1))(*pair)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    for leaf in jax.tree.leaves(grads):
      assert np.isfinite(np.asarray(leaf, np.float32)).all()
    for leaf in jax.tree.leaves(grads[1]):
      assert not np.asarray(leaf, np.float32).any()


def test_its_groups_and_schedule():
  total = distill.make_distiller('kd+ofd', {'ofd': {'weight': 1e-5}, 'kd': {}})
  assert total.connector_schedule == 'warmup'
  assert total.parameter_groups()[0][1] == 'connectors'
  assert total.extra_taps == tuple(sorted(RAW_TAPS))
  assert distill.WEIGHTS['ofd'] == 1e-5


# What networks give.


def run_network(network, variables, image, **options):
  call = functools.partial(network.apply, mutable=['batch_stats'], **options)
  return jax.jit(call)(variables, image)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize(
  'backbone', ['resnet18', 'mobilenet_v2', 'efficientnet_lite0']
)
def test_asking_changes_nothing_else(fill, backbone, train):
  plain = DeepLabV3Plus(backbone, **SMALL)
  asked = networks.with_taps(plain, RAW_TAPS)
  variables = fill(networks.abstract_variables(plain))
  same = networks.abstract_variables(asked)
  assert jax.tree.structure(same) == jax.tree.structure(variables)
  assert networks.with_taps(plain, ()) is plain
  image = normal(0, 2, 64, 64, 3)
  options = {'train': train, 'dropout': False}
  before, stats = run_network(plain, variables, image, **options)
  out, moved = run_network(asked, variables, image, **options)
  assert set(out['features']) == {*before['features'], *RAW_TAPS}
  # Two programs of the same sums.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, moved, stats)
  for key in ('logits', 'coarse_logits'):
    close(out[key], before[key])
  for tap, x in before['features'].items():
    close(out['features'][tap], x)
  maps = out['features']
  for tap in ('aspp', 'decoder'):
    raw = maps[f'{tap}_raw']
    assert np.min(raw) < 0
    close(np.maximum(raw, 0), maps[tap])
  close(maps['layer4_raw'], maps['backbone'])
  assert [maps[tap].shape[1] for tap in RAW_TAPS] == [16, 8, 4, 4, 4, 16]
  layers = {
    'resnet18': ('layer{}_1', 'conv2', (1, 2, 3, 4)),
    'mobilenet_v2': ('block{}', 'expand', (4, 7, 14)),
    'efficientnet_lite0': ('block{}', 'expand', (3, 5, 11)),
  }[backbone]
  name, conv, numbers = layers
  for tap, number in zip(RAW_TAPS, numbers, strict=False):
    norm = variables['params']['backbone'][name.format(number)][conv]['bn']
    small_run.assert_same_tree(out['norms'][tap], norm)
    assert maps[tap].shape[-1] == norm['scale'].size
  for part, conv in (('aspp', 'merge'), ('decoder', 'conv2')):
    norm = variables['params'][part][conv]['bn']
    small_run.assert_same_tree(out['norms'][f'{part}_raw'], norm)


@pytest.mark.parametrize(
  ('backbone', 'widths'),
  [
    ('resnet18', (64, 128, 256, 512, 256, 256)),
    ('resnet101', (256, 512, 1024, 2048, 256, 256)),
    ('mobilenet_v2', (144, 192, 576, 320, 256, 256)),
    ('efficientnet_lite0', (144, 240, 672, 320, 256, 256)),
  ],
)
def test_maps_have_the_published_sizes(backbone, widths):
  network = DeepLabV3Plus(backbone, 21, extra_taps=RAW_TAPS)
  maps = networks.abstract_outputs(network, (513, 513))['features']
  sides = (129, 65, 33, 33, 33, 129)
  for tap, side, width in zip(RAW_TAPS, sides, widths, strict=True):
    assert maps[tap].shape == (2, side, side, width)


@pytest.mark.parametrize(
  ('backbone', 'counts'),
  [
    ('resnet18', (16896, 66560, 264192, 1052672, 66048, 66048)),
    ('mobilenet_v2', (37376, 99328, 591872, 659456, 66048, 66048)),
  ],
)
def test_connectors_have_the_published_parameters(backbone, counts):
  sides = [
    networks.abstract_outputs(
      DeepLabV3Plus(name, 21, extra_taps=RAW_TAPS), (65, 65)
    )
    for name in (backbone, 'resnet101')
  ]
  params = distill.abstract_variables(ofd.OFD(), *sides)['params']
  for tap, count in zip(RAW_TAPS, counts, strict=True):
    leaves = jax.tree.leaves(params[f'connectors_{tap}'])
    assert sum(leaf.size for leaf in leaves) == count


def test_teachers_pass_the_question_on():
  network = DeepLabV3Plus('resnet18', **SMALL)
  teacher = FrozenNetwork(network, {}, 'name', ('a', 'b', 'c'))
  reordered = Reordered(teacher, (2, 1, 0), ('c', 'b', 'a'))
  assert with_taps(teacher, ()) is teacher
  assert with_taps(teacher, RAW_TAPS).network.extra_taps == RAW_TAPS
  asked = with_taps(reordered, RAW_TAPS)
  assert asked.class_names == ('c', 'b', 'a')
  variables = networks.abstract_variables(network)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  out = jax.eval_shape(asked.apply, variables, image)
  assert {*RAW_TAPS} == out['norms'].keys() <= out['features'].keys()
  # Anything else stays what it is.
  assert with_taps('teacher', RAW_TAPS) == 'teacher'


def test_an_unknown_map_is_named():
  with pytest.raises(ValueError, match="Unknown tap 'layer5_raw'"):
    DeepLabV3Plus('resnet18', 3, extra_taps=('layer5_raw',))


def test_what_is_missing_is_named():
  student, teacher = make_outputs(0, 4), make_outputs(50, 6)
  make = functools.partial(distill.make_method, 'ofd')
  make(student, teacher)
  with pytest.raises(InputError, match='divisors=.*one for each of taps'):
    make(student, teacher, taps=('aspp_raw',))
  plain = student | {'features': {'aspp': student['features']['aspp_raw']}}
  with pytest.raises(
    InputError, match="student has no map 'layer1_raw', only "
  ):
    make(plain, teacher)
  bare = {key: x for key, x in teacher.items() if key != 'norms'}
  with pytest.raises(
    InputError, match=r"teacher gives no norms\['layer1_raw'\]"
  ):
    make(student, bare)
  small = {tap: x[:, ::2] for tap, x in teacher['features'].items()}
  with pytest.raises(InputError, match="Sizes differ at 'layer1_raw'.*stride"):
    make(student, teacher | {'features': small})


def distill_stage(config):
  config = resolve(config)
  dataset = sources.load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  plan = stages.plan('distill', config, dataset, mesh)
  teacher = teachers.abstract(plan.config, dataset.class_names)
  return stages.with_teacher(plan, teacher)


def test_a_stage_asks_its_networks():
  config = tiny_run.tiny_config()
  config.distill.method = 'kd+ofd'
  for role in ('teacher', 'student'):
    for key, value in SMALL.items():
      if key != 'num_classes':
        config[role][key] = value
  config.teacher.backbone = 'resnet18'
  config.student.backbone = 'mobilenet_v2'
  stage = distill_stage(config)
  assert stage.network.extra_taps == tuple(sorted(RAW_TAPS))
  assert stage.teacher.network.extra_taps == tuple(sorted(RAW_TAPS))
  shapes = stage.abstract_state()
  connectors = shapes.params['distiller']['methods_ofd']
  assert set(connectors) == {f'connectors_{tap}' for tap in RAW_TAPS}
  # One step, traced.
  step = stage.make_train_step()
  batch = {
    'image': jax.ShapeDtypeStruct((4, 32, 32, 3), np.uint8),
    'label': jax.ShapeDtypeStruct((4, 32, 32), np.uint8),
  }
  state, metrics = jax.eval_shape(
    step, shapes, stage.teacher.variables, batch, jax.random.key(0)
  )
  assert {'ofd', 'kd', 'ofd_layer1_raw'} <= set(metrics)
  assert jax.tree.structure(state) == jax.tree.structure(shapes)
