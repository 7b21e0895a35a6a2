# SPDX-License-Identifier: Apache-2.0
"""Methods by name, alone and summed."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.distill.kd import logit_distance
from attnfd_jax.errors import InputError
from attnfd_jax.losses import Mean

ATTNFD = {
  'teacher_attention': 'parameter_free',
  'student_attention': 'none',
  'norm_scope': 'image',
  'reduction': 'unitmean',
}
GROUPS = {
  'attnfd': ATTNFD | {'weight': 2.0, 'weight_schedule': 'constant'},
  'kd': {'weight': 0.25, 'weight_schedule': 'constant', 'temperature': 4.0},
}


def make_outputs(seed, channels):
  generator = np.random.default_rng(seed)

  def normal(*shape):
    return generator.normal(size=shape).astype(np.float32)

  return {
    'logits': normal(2, 9, 9, 3),
    'coarse_logits': normal(2, 3, 3, 3),
    'features': {'backbone': normal(2, 3, 3, channels)},
  }


LABELS = np.zeros((2, 9, 9), np.uint8)


def apply(module, fill, student, teacher, **options):
  """Variables, and what the module makes of the outputs."""
  init = functools.partial(module.init, train=False, step=0)
  rngs = {'params': jax.random.key(0), 'distill': jax.random.key(1)}
  variables = fill(jax.eval_shape(init, rngs, student, teacher, LABELS))
  run = functools.partial(module.apply, train=False, step=0, **options)
  return variables, jax.jit(run)(variables, student, teacher, LABELS)


@pytest.mark.parametrize('method', ['attnfd', 'kd', 'attnfd+kd', 'kd+attnfd'])
def test_parts_and_their_weights(fill, method):
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  module = distill.make_distiller(method, GROUPS)
  variables, (losses, terms) = apply(module, fill, student, teacher)
  expected, expected_terms = {}, {}
  if 'kd' in method:
    maps = student['coarse_logits'], teacher['coarse_logits']
    expected['kd'] = logit_distance(*maps, temperature=4.0)
    assert module.weight('kd', 7) == 0.25
  if 'attnfd' in method:
    alone = AttnFD({'backbone': 4}, {'backbone': 5}, **ATTNFD)
    distance, parts = alone.apply(
      {part: tree['methods_attnfd'] for part, tree in variables.items()},
      student['features'],
      teacher['features'],
      train=False,
    )
    expected['attnfd'] = Mean(distance, 1.0)
    expected_terms['attnfd_backbone'] = parts['backbone']
    assert module.weight('attnfd', 7) == 2.0
  assert set(losses) == set(expected) and set(terms) == set(expected_terms)
  for name, loss in expected.items():
    # Two programs of the same float32 sums.
    np.testing.assert_allclose(losses[name], loss, rtol=1e-5, atol=1e-6)
  for name, value in expected_terms.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-6)


def test_a_sum_over_images_is_divided_by_those_of_the_whole_batch(fill):
  """The authors' loss of one unit, of which a part of the batch is a share."""
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  options = {'norm_scope': 'batch', 'reduction': 'batchmean'}
  module = distill.make_distiller(
    'attnfd', {'attnfd': GROUPS['attnfd'] | options}
  )
  variables, (losses, terms) = apply(module, fill, student, teacher)
  alone = AttnFD({'backbone': 4}, {'backbone': 5}, **(ATTNFD | options))
  distance, parts = alone.apply(
    {part: tree['methods_attnfd'] for part, tree in variables.items()},
    student['features'],
    teacher['features'],
    train=False,
  )
  # Two programs of the same float32 sums.
  np.testing.assert_allclose(losses['attnfd'].value, distance, rtol=1e-5)
  np.testing.assert_allclose(
    terms['attnfd_backbone'], parts['backbone'], rtol=1e-5
  )
  _, (part, _) = apply(module, fill, student, teacher, batch_size=8)
  np.testing.assert_allclose(4 * part['attnfd'].value, distance, rtol=1e-5)


def test_a_weight_may_go_to_zero():
  groups = {'kd': GROUPS['kd'] | {'weight_schedule': 'linear_to_zero'}}
  module = distill.make_distiller('kd', groups, num_steps=10)
  weights = [float(module.weight('kd', step)) for step in (0, 5, 10, 11)]
  np.testing.assert_allclose(weights, [0.25, 0.125, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (
      'atnfd',
      "Unknown method 'atnfd'.*Did you mean 'attnfd'.*Have: attnfd, kd",
    ),
    ('attnfd+dk', "Unknown method 'dk'. Have"),
    ('', "Unknown method ''"),
    ('gone.py:Method', "distill.method='gone.py:Method': there is no file"),
  ],
  ids=['near', 'second', 'empty', 'file'],
)
def test_unknown_method(method, message):
  with pytest.raises(InputError, match=message):
    distill.make_distiller(method, GROUPS)


@pytest.mark.parametrize(
  ('name', 'key', 'value', 'message'),
  [
    ('kd', 'weight', -1.0, r'distill\.kd\.weight=-1\.0 must be from 0'),
    ('kd', 'weight', float('nan'), r'distill\.kd\.weight=nan must be from 0'),
    ('attnfd', 'weight', float('inf'), r'distill\.attnfd\.weight=inf must be'),
    (
      'kd',
      'weight_schedule',
      'cosine',
      r"distill\.kd\.weight_schedule='cosine' must be one of constant, linear",
    ),
    ('kd', 'temperature', 0.0, r'distill\.kd: temperature=0\.0 must be from'),
    ('kd', 'temprature', 1.0, r"distill\.kd: .*argument 'temprature'"),
    (
      'attnfd',
      'connector_schedule',
      'never',
      r"distill\.attnfd: connector_schedule='never' must be one of always",
    ),
    (
      'attnfd',
      'norm_scope',
      'image_',
      r"distill\.attnfd: norm_scope='image_' must be one of batch, image",
    ),
  ],
)
def test_wrong_values(name, key, value, message):
  groups = GROUPS | {name: GROUPS[name] | {key: value}}
  with pytest.raises(InputError, match=rf'^config\.{message}'):
    distill.make_distiller('attnfd+kd', groups)


METHOD = """
import flax.linen as nn

class Zero(nn.Module):
  factor: float = 3.0

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    return self.factor * student['logits'].mean(), {}
"""


def test_a_method_in_a_file(fill, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(METHOD)
  outputs = make_outputs(0, 4)
  options = {'factor': 2.0, 'weight': 5.0}
  module = distill.make_distiller(f'{path}:Zero', {}, options=options)
  _, (losses, terms) = apply(module, fill, outputs, outputs)
  assert module.weight('zero', 0) == 5.0 and terms == {}
  total, count = losses['zero']
  np.testing.assert_allclose(total, 2 * outputs['logits'].mean(), rtol=1e-5)
  assert count == 1
  assert options == {'factor': 2.0, 'weight': 5.0}
  with pytest.raises(InputError, match=r'distill\.options\.weight=-5\.0 must'):
    distill.make_distiller(f'{path}:Zero', {}, options={'weight': -5.0})


def test_titles():
  assert distill.title('attnfd+kd') == 'AttnFD + KD'
  assert distill.title('a/mine.py:Zero') == 'Zero'
  assert distill.title('a/mine+1.py:Zero') == 'Zero'


def test_a_method_of_the_api():
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  module = distill.make_method('kd', student, teacher, temperature=2.0)
  assert module.temperature == 2.0


def test_errors_of_a_method_of_the_api(no_type_checks):
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  with pytest.raises(ValueError, match='temperature=0 must be'):
    distill.make_method('kd', student, teacher, temperature=0)
  other = teacher | {'features': {'encoder': teacher['features']['backbone']}}
  with pytest.raises(ValueError, match='the student has backbone, the teacher'):
    distill.make_method('attnfd', student, other)
  teacher = {'logits': teacher['logits'][..., :2], 'features': {}}
  with pytest.raises(ValueError, match='both networks need the same classes'):
    distill.make_method('kd', student, teacher)


@pytest.mark.parametrize('recipe', ['clean', 'reference'])
def test_recipes_reach_the_method(recipe):
  config = default_config()
  config.recipe = recipe
  groups = resolve(config).distill
  student = types.SimpleNamespace(backbone='resnet18')
  # Without gates, in its forward path or stored.
  teacher = types.SimpleNamespace(network=student)
  module = distill.make_distiller(groups.method, groups)
  method = module.adapted(student, teacher).methods['attnfd']
  expected = {
    # Gates that nobody trained would add noise.
    'clean': ('parameter_free', 'learnable', 'unitmean', 'running', 'always'),
    # The authors' own training leaves random ones.
    'reference': ('random', 'mlp_frozen', 'batchmean', 'batch', 'first_epoch'),
  }[recipe]
  assert expected == (
    method.teacher_attention,
    method.student_attention,
    method.reduction,
    method.teacher_bn,
    method.connector_schedule,
  )
  assert method.fan_out_taps == ('backbone',)


@pytest.mark.parametrize(
  ('asked', 'in_path', 'stored', 'found'),
  [
    ('in_path', True, False, 'in_path'),
    ('checkpoint', True, False, 'in_path'),
    ('in_path', False, False, 'parameter_free'),
    ('checkpoint', False, True, 'checkpoint'),
    ('checkpoint', False, False, 'random'),
    ('none', False, True, 'none'),
    ('none', True, False, None),
    ('random', True, False, None),
  ],
)
def test_attention_that_a_teacher_has(asked, in_path, stored, found):
  module = distill.METHODS['attnfd'](teacher_attention=asked)
  teacher = types.SimpleNamespace(
    in_path_attention=in_path, gates={} if stored else None
  )
  if found is None:
    with pytest.raises(ValueError, match='refined in its forward path'):
      module.adapted(None, teacher)
  else:
    assert module.adapted(None, teacher).teacher_attention == found


@pytest.mark.parametrize('match', [True, False], ids=['fits', 'differs'])
def test_stored_gates_are_adopted(fill, match):
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  groups = {
    'attnfd': GROUPS['attnfd'] | {'teacher_attention': 'checkpoint'},
    'kd': GROUPS['kd'],
  }
  module = distill.make_distiller('attnfd+kd', groups)
  variables, _ = apply(module, fill, student, teacher)
  gates = fill(variables['teacher']['methods_attnfd'], seed=9)
  if not match:
    gates = jax.tree.map(lambda x: x[..., None], gates)
  stored = types.SimpleNamespace(gates=gates)
  if not match:
    with pytest.raises(ValueError, match='do not fit its maps'):
      module.adopt(variables, stored)
    return
  adopted = module.adopt(variables, stored)
  found = adopted['teacher']['methods_attnfd']
  jax.tree.map(np.testing.assert_array_equal, found, gates)
  assert adopted['params'] is variables['params']
  absent = types.SimpleNamespace(gates=None)
  assert module.adopt(variables, absent) is variables


class Pictures(nn.Module):
  """A method with maps for the report, and nothing else."""

  pictures_note = 'What it shows.'

  def __call__(self, student, teacher, labels, *, train, step):
    return jnp.zeros(()), {}

  def pictures(self, student, teacher, *, train):
    return {'student': {'mean': student['logits'].mean(-1)}}


def test_pictures_of_all_methods(fill):
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  attnfd = distill.METHODS['attnfd'](**ATTNFD)
  methods = {'attnfd': attnfd, 'own': Pictures(), 'kd': distill.METHODS['kd']()}
  module = distill.WeightedSum(methods, dict.fromkeys(methods, 1.0))
  variables, _ = apply(module, fill, student, teacher)
  maps = module.apply(
    variables, student, teacher, train=False, method='pictures'
  )
  assert {role: set(names) for role, names in maps.items()} == {
    'student': {'backbone', 'mean'},
    'teacher': {'backbone'},
  }
  assert maps['teacher']['backbone'].shape == (2, 3, 3)
  assert module.pictures_note.endswith('What it shows.')
