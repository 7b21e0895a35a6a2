# SPDX-License-Identifier: Apache-2.0
"""The optimizer against SGD in NumPy, and the groups of METHOD section 4.1."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.distill import init_distiller, make_distiller
from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.network import abstract_outputs, abstract_variables
from attnfd_jax.training import optim
from attnfd_jax.training.stage import plan

SHAPES = {
  'student': {
    'backbone': {'conv': {'kernel': (3, 2)}, 'bn': {'scale': (2,)}},
    'aspp': {'point': {'kernel': (2, 3)}},
    'classifier': {'bias': (3,)},
  },
  'distiller': {
    'methods_attnfd': {
      'connectors_aspp': {'conv_norm': {'kernel': (2, 4)}},
      'student_gates_backbone': {
        'mlp_in': {'kernel': (2, 1)},
        'spatial': {'kernel': (2, 1)},
      },
      'student_gates_aspp': {
        'mlp_in': {'kernel': (2, 1)},
        'spatial': {'kernel': (2, 1)},
      },
    }
  },
}
STEPS = 5
DECAY = 0.05


def draw(seed):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: generator.normal(size=shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


PARAMS = draw(0)
GRADS = [draw(1 + step) for step in range(STEPS)]


def flat(tree):
  return {
    '/'.join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


RATES = (0.1, 0.07, 0.05, 0.04, 0.02)


def schedule(step):
  return jnp.array(RATES)[step]


def make_attnfd(**options):
  return make_distiller('attnfd', {'attnfd': options})


FROZEN = make_attnfd(student_attention='mlp_frozen').parameter_groups()
LEARNABLE = make_attnfd(student_attention='learnable').parameter_groups()


def run(grads=GRADS, *, groups=LEARNABLE, **options):
  """Flat parameters after each step."""
  tx = optim.make_optimizer(
    schedule, weight_decay=DECAY, groups=groups, **options
  )

  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  params = jax.tree.map(jnp.asarray, PARAMS)
  state = tx.init(params)
  history = []
  for gradient in grads:
    params, state = update(params, state, gradient)
    history.append(flat(params))
  assert update._cache_size() == 1
  return history


def torch_sgd(w, grads, rates, *, nesterov=True, momentum=0.9):
  """Weights after each step; a rate of None is a step without this tensor."""
  w, buffer, history = w.astype(np.float64), None, []
  for g, rate in zip(grads, rates, strict=True):
    if rate is not None:
      d = g + DECAY * w
      buffer = d if buffer is None else momentum * buffer + d
      w = w - rate * (d + momentum * buffer if nesterov else buffer)
    history.append(w)
  return history


def kind(path):
  """Role of a parameter, told without the rules under test."""
  if path.startswith('student/'):
    return 'backbone' if '/backbone/' in path else 'head'
  if 'connectors' in path:
    return 'connectors'
  gate = 'mlp' if 'mlp' in path else 'spatial'
  return f'{gate}_{"backbone" if "gates_backbone" in path else "head"}'


def assert_history(history, rates, **options):
  """`rates`: kind -> step -> rate or None."""
  grads = [flat(g) for g in GRADS]
  for path, start in flat(PARAMS).items():
    steps = [rates[kind(path)](step) for step in range(STEPS)]
    expected = torch_sgd(start, [g[path] for g in grads], steps, **options)
    for ours, theirs in zip(history, expected, strict=True):
      # float32 against float64 over five steps.
      np.testing.assert_allclose(
        ours[path], theirs, rtol=1e-5, atol=2e-6, err_msg=path
      )


def times(scale):
  return lambda step: scale * RATES[step]


def never(step):
  del step


def until(end, rate):
  return lambda step: rate(step) if step < end else None


def since(start, rate):
  return lambda step: rate(step) if step >= start else None


HEAD = dict.fromkeys(
  ('head', 'connectors', 'mlp_backbone', 'mlp_head'), times(10.0)
) | {'spatial_backbone': times(10.0), 'spatial_head': times(10.0)}


@pytest.mark.parametrize('nesterov', [True, False], ids=['nesterov', 'plain'])
def test_sgd_is_that_of_torch(nesterov):
  history = run(nesterov=nesterov)
  assert_history(history, HEAD | {'backbone': times(1.0)}, nesterov=nesterov)


def test_momentum_and_head_scale_are_used():
  history = run(momentum=0.5, head_lr_scale=3.0)
  rates = dict.fromkeys(HEAD, times(3.0)) | {'backbone': times(1.0)}
  assert_history(history, rates, momentum=0.5)


def reference_rates(connectors, main_from):
  """METHOD 4.1: the MLP of the gates is in no group."""
  small, large = (since(main_from, times(scale)) for scale in (1.0, 10.0))
  return {
    'backbone': small,
    'head': large,
    'spatial_backbone': small,
    'spatial_head': large,
    'mlp_backbone': never,
    'mlp_head': never,
    'connectors': connectors,
  }


def warm_connectors(step):
  return (1.0 if step < 2 else 10.0) * RATES[step]


@pytest.mark.parametrize(
  ('connector_schedule', 'connectors', 'main_from'),
  [
    ('first_epoch', until(2, times(1.0)), 2),
    ('warmup', warm_connectors, 2),
    ('always', times(10.0), 0),
  ],
  ids=['first_epoch', 'warmup', 'always'],
)
def test_phases(connector_schedule, connectors, main_from):
  history = run(
    connector_schedule=connector_schedule, epoch_steps=2, groups=FROZEN
  )
  assert_history(history, reference_rates(connectors, main_from))


def test_what_rests_is_bit_identical():
  history = run(connector_schedule='first_epoch', epoch_steps=2, groups=FROZEN)
  start = flat(PARAMS)
  moved = [
    {kind(path) for path in start if np.any(now[path] != before[path])}
    for before, now in zip([start, *history[:-1]], history, strict=True)
  ]
  main = {'backbone', 'head', 'spatial_backbone', 'spatial_head'}
  assert moved == [{'connectors'}] * 2 + [main] * 3


def test_adamw(standard_promotion):
  history = run(name='adamw')
  grads = [flat(g) for g in GRADS]
  for path, w in flat(PARAMS).items():
    w = w.astype(np.float64)
    mean = square = 0.0
    for step in range(STEPS):
      g = grads[step][path]
      mean = 0.9 * mean + 0.1 * g
      square = 0.999 * square + 0.001 * g**2
      scaled = mean / (1 - 0.9 ** (step + 1))
      scaled /= np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
      rate = RATES[step] * (1 if kind(path) == 'backbone' else 10)
      w = w - rate * (scaled + DECAY * w)
      # Float32, and roots of small numbers.
      np.testing.assert_allclose(
        history[step][path], w, rtol=1e-4, atol=1e-5, err_msg=path
      )


@pytest.mark.parametrize('clip', [0.5, 1e3], ids=['clipped', 'wide'])
def test_clip_scales_the_whole_gradient(clip):
  scaled = []
  for grads in GRADS:
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in flat(grads).values()))
    factor = np.float32(min(1.0, clip / norm))
    scaled.append(jax.tree.map(lambda g, f=factor: g * f, grads))
  ours, theirs = run(clip_norm=clip)[-1], run(scaled)[-1]
  for path, value in theirs.items():
    # Norms are summed in another order.
    np.testing.assert_allclose(ours[path], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('step', [0, 1, 50, 99, 100, 101], ids=str)
def test_poly_schedule(step):
  rate = optim.poly_schedule(0.007, num_steps=100, power=0.9)
  expected = 0.007 * max(1 - step / 100, 0) ** 0.9
  # One power in float32.
  np.testing.assert_allclose(
    rate(jnp.int32(step)), expected, rtol=1e-5, atol=1e-9
  )


def test_warmup_is_linear_and_ends():
  options = {'num_steps': 100, 'power': 0.9}
  plain = optim.poly_schedule(1.0, **options)
  warm = optim.poly_schedule(1.0, **options, warmup_steps=4)
  steps = np.arange(8)
  ratio = [warm(step) / plain(step) for step in steps]
  np.testing.assert_allclose(
    ratio, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rtol=1e-6, atol=0
  )


@pytest.mark.parametrize(
  ('name', 'warmup', 'changes', 'epochs'),
  [
    ('student', 3, {}, '2'),
    ('student', 2, {}, '2'),  # Its end has the rate of the last step: none.
    ('student', 1, {}, None),
    ('student', 0, {}, None),
    ('student', 3, {'student.num_epochs': 9.0}, None),
    ('teacher', 3, {'student.num_epochs': 9.0}, '2'),
    ('teacher', 3, {'teacher.num_epochs': 9.0}, None),
    ('student', 3, {'teacher.num_epochs': 9.0}, '2'),
    ('student', 0.25, {'student.num_epochs': 0.25}, None),  # One step.
    ('student', 1, {'student.num_epochs': 0.25}, '0.25'),
  ],
  ids=str,
)
def test_a_warmup_that_is_too_long_is_a_line(name, warmup, changes, epochs):
  config = small_run.make_config()
  config.num_epochs, config.teacher.num_epochs = 2.0, None
  config.optim.warmup_epochs = float(warmup)
  config.update_from_flattened_dict(changes)
  config = resolve(config)
  mesh, lines = sharding.make_mesh(1), []
  dataset = load_dataset(config.data)
  plan(name, config, dataset, mesh).init_state(log=lines.append)
  assert len(lines) == (epochs is not None)
  for line in lines:
    assert f'config.optim.warmup_epochs={warmup} is not shorter' in line
    assert f'than this stage of {epochs} epochs: the learning' in line
    assert 'the learning rate 0.05 is never reached' in line


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'name': 'adam'}, "optim.name='adam' must be one of sgd, adamw"),
    ({'momentum': 1.5}, 'optim.momentum=1.5 must be from 0 to 1'),
    ({'momentum': -0.5}, 'optim.momentum=-0.5 must be from 0 to 1'),
    ({'weight_decay': -1.0}, 'optim.weight_decay=-1.0 must be 0 or more'),
    ({'clip_norm': -1.0}, 'optim.clip_norm=-1.0 must be 0 or more'),
    ({'head_lr_scale': float('nan')}, 'optim.head_lr_scale=nan must be 0 or'),
    (
      {'connector_schedule': 'never'},
      "connector_schedule='never' must be one of always, first_epoch, warmup",
    ),
  ],
  ids=str,
)
def test_wrong_values_are_named(options, message):
  with pytest.raises(InputError, match=message):
    optim.make_optimizer(schedule, **options)


@functools.cache
def network_shapes(backbone):
  """Variables and outputs for VOC."""
  network = DeepLabV3Plus(backbone, 21)
  return abstract_variables(network), abstract_outputs(network, (64, 64))


@functools.cache
def trained_shapes(backbone, student_attention):
  """Parameters of a whole stage 'distill', as shapes."""
  variables, student = network_shapes(backbone)
  outputs = student, network_shapes('resnet101')[1]
  distiller = make_attnfd(
    student_attention=student_attention, teacher_attention='random'
  )
  init = functools.partial(init_distiller, distiller, outputs)
  params = jax.eval_shape(init)['params']
  return {'student': variables['params'], 'distiller': params}


def count_groups(params, groups):
  labels = flat_labels(optim.make_labels(groups)(params))
  tensors, values = collections.Counter(), collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    group = labels['/'.join(key.key for key in path)]
    tensors[group] += 1
    values[group] += leaf.size
  return {group: (tensors[group], values[group]) for group in tensors}


def flat_labels(labels):
  return {
    '/'.join(key.key for key in path): label
    for path, label in jax.tree_util.tree_leaves_with_path(labels)
  }


# METHOD 4.1, counted in the authors' code.
COUNTS = {
  'resnet18': {
    'backbone': (63, 11_176_612),
    'head': (35, 5_431_869),
    'frozen': (12, 50_240),
  },
  'resnet101': {
    'backbone': (315, 42_500_260),
    'head': (35, 16_844_349),
    'frozen': (12, 543_392),
  },
  'mobilenet_v2': {
    'backbone': (156, 1_811_812),
    'head': (35, 4_004_541),
    'frozen': (12, 30_068),
  },
}


@pytest.mark.parametrize('backbone', sorted(COUNTS))
def test_groups_of_the_reference(backbone):
  params = trained_shapes(backbone, 'mlp_frozen')
  counts = count_groups(params, FROZEN)
  connectors = counts.pop('connectors')
  assert counts == COUNTS[backbone]
  # Three 1x1 convolutions to the teacher's channels, each with its norm.
  last = {'mobilenet_v2': 320, 'resnet101': 2048, 'resnet18': 512}[backbone]
  weights = last * 2048 + 2 * 256 * 256
  assert connectors == (9, weights + 2 * (2048 + 256 + 256))


def test_clean_trains_everything():
  params = trained_shapes('resnet18', 'learnable')
  counts = count_groups(params, LEARNABLE)
  assert set(counts) == {'backbone', 'head', 'connectors'}
  student = params['student']['backbone']
  trunk = sum(leaf.size for leaf in jax.tree.leaves(student))
  assert counts['backbone'] == (60, trunk)
  # Nothing is lost: the gates' MLPs and the backbone's gate join the head.
  reference = COUNTS['resnet18']
  for i in range(2):
    total = sum(group[i] for group in reference.values())
    assert counts['backbone'][i] + counts['head'][i] == total


def test_every_rule_names_parameters():
  """A renamed module would fall to another rule without a word."""
  params = trained_shapes('resnet18', 'mlp_frozen')
  paths = [
    '/'.join(key.key for key in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for rule, _ in FROZEN:
    rule = f'distiller/{rule}'
    assert any(re.fullmatch(rule, path) for path in paths), rule
