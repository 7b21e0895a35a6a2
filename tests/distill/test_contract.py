# SPDX-License-Identifier: Apache-2.0
"""Every method of the registry keeps the contract of distill/method.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax import distill
from attnfd_jax.config import default_config
from attnfd_jax.errors import InputError
from attnfd_jax.losses import Mean
from attnfd_jax.models.deeplab import RAW_TAPS


def make_outputs(seed, channels):
  keys = jax.random.split(jax.random.key(seed), 5)
  normal = jax.random.normal
  # What OFD asks networks for.
  raw = {tap: normal(keys[4], (2, 4, 4, channels)) for tap in RAW_TAPS}
  norm = {'scale': jnp.ones(channels), 'bias': jnp.zeros(channels)}
  coarse = normal(keys[0], (2, 8, 8, 3))
  return {
    'logits': jax.image.resize(coarse, (2, 32, 32, 3), 'linear'),
    'coarse_logits': coarse,
    'features': {
      'backbone': normal(keys[1], (2, 4, 4, channels)),
      'aspp': normal(keys[2], (2, 4, 4, channels)),
      'decoder': normal(keys[3], (2, 8, 8, channels)),
      **raw,
    },
    'norms': dict.fromkeys(RAW_TAPS, norm),
  }


@pytest.fixture(scope='module')
def outputs():
  return make_outputs(0, 6), make_outputs(1, 10)


LABELS = jnp.zeros((2, 32, 32), jnp.uint8)
# By its defaults it has nothing to say about these.
OPTIONS = {'pseudo': {'everywhere': True, 'min_confidence': 0.5}}


def run(method, outputs, *, train=True, step=0):
  rngs = {name: jax.random.key(2) for name in ('params', 'distill')}
  variables = method.init(rngs, *outputs, LABELS, train=train, step=step)
  mutable = [name for name in variables if name != 'params']

  @jax.jit
  def loss_fn(variables, student, teacher):
    (loss, terms), _ = method.apply(
      variables,
      student,
      teacher,
      LABELS,
      train=train,
      step=step,
      rngs={'distill': jax.random.key(3)},
      mutable=mutable,
    )
    return (loss.value if isinstance(loss, Mean) else loss), terms

  return jax.value_and_grad(loss_fn, argnums=(1, 2), has_aux=True)(
    variables, *outputs
  )


@pytest.mark.parametrize('name', sorted(attnfd_jax.METHODS))
def test_a_scalar_with_gradients_of_the_student_alone(name, outputs):
  options = OPTIONS.get(name, {})
  method = attnfd_jax.make_method(name, *outputs, **options)
  assert isinstance(method, attnfd_jax.METHODS[name])
  (loss, terms), (student, teacher) = run(method, outputs)
  assert loss.shape == () and loss.dtype == jnp.float32 and loss > 0
  assert all(value.shape == () for value in terms.values())
  assert max(np.abs(x).max() for x in jax.tree.leaves(student)) > 0
  assert max(np.abs(x).max() for x in jax.tree.leaves(teacher)) == 0


@pytest.mark.parametrize('name', sorted(attnfd_jax.METHODS))
def test_its_options_are_keys_of_the_config(name):
  config = default_config().distill[name]
  fields = distill.option_defaults(attnfd_jax.METHODS[name])
  assert set(config) == {'weight', 'weight_schedule', *fields}
  assert config.weight_schedule == 'constant'


def test_unknown_methods_and_options_are_named(outputs):
  with pytest.raises(InputError, match="Unknown method 'kdd'.*mean 'kd'"):
    attnfd_jax.make_method('kdd', *outputs)
  with pytest.raises(InputError, match="distill.kd: .*argument 'temp'"):
    attnfd_jax.make_method('kd', *outputs, temp=2.0)


def test_networks_without_a_common_tap_are_named(outputs):
  student, teacher = outputs
  other = teacher | {'features': {'stage4': teacher['features']['aspp']}}
  message = 'student has aspp, .*, the teacher stage4'
  with pytest.raises(ValueError, match=message):
    attnfd_jax.make_method('attnfd', student, other)
  # Logits are there without any.
  attnfd_jax.make_method('kd', student, other)


def test_logits_are_compared_where_one_side_has_no_coarse_ones(outputs):
  student, teacher = outputs
  teacher = {key: x for key, x in teacher.items() if key != 'coarse_logits'}
  (coarse, _), _ = run(distill.METHODS['kd'](), outputs)
  (fine, _), _ = run(distill.METHODS['kd'](), (student, teacher))
  assert coarse > 0 and fine > 0 and abs(coarse - fine) > 1e-6


def test_the_sum_weighs_each_by_its_schedule(outputs):
  options = default_config().distill.to_dict()
  options['attnfd'] |= {'norm_scope': 'batch', 'reduction': 'unitmean'}
  for key, value in (
    ('student_attention', 'learnable'),
    ('teacher_attention', 'parameter_free'),
    ('teacher_bn', 'running'),
    ('connector_schedule', 'always'),
  ):
    options['attnfd'][key] = value
  options['kd'] |= {'weight': 4.0, 'weight_schedule': 'linear_to_zero'}
  total = distill.make_distiller('attnfd+kd', options, num_steps=10)
  assert total.weight('attnfd', 5) == 2.0
  for step, expected in ((0, 4.0), (5, 2.0), (10, 0.0), (12, 0.0)):
    np.testing.assert_allclose(total.weight('kd', step), expected)
  rngs = {'params': jax.random.key(0), 'distill': jax.random.key(1)}
  arguments = (*outputs, LABELS)
  variables = total.init(rngs, *arguments, train=False, step=0)
  losses, terms = total.apply(variables, *arguments, train=False, step=0)
  assert set(losses) == {'attnfd', 'kd'}
  assert set(terms) == {f'attnfd_{x}' for x in ('aspp', 'backbone', 'decoder')}
  np.testing.assert_allclose(losses['attnfd'].value, sum(terms.values()), 1e-6)


def test_a_schedule_that_does_not_exist_is_refused():
  options = default_config().distill.to_dict()
  options['kd']['weight_schedule'] = 'cosine'
  with pytest.raises(InputError, match="'cosine' must be one of constant, li"):
    distill.make_distiller('kd', options)
