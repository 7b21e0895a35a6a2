# SPDX-License-Identifier: Apache-2.0
"""What trains when: phases of connectors, the clip, and averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.training import optim
from attnfd_jax.training import step as steps
from attnfd_jax.training.stage import Stage

PARAMS = {
  'student': {'backbone': {'w': jnp.ones(3)}, 'classifier': {'w': jnp.ones(3)}},
  'distiller': {},
}
GATES = {'methods_attnfd': {'connectors_aspp': {'w': jnp.ones(3)}}}


def make_tx(method, recipe, **options):
  config = default_config()
  config.recipe, config.distill.method = recipe, method
  config.optim.update(options)
  config = resolve(config)
  return Stage(
    'distill',
    config,
    dataset=None,
    mesh=None,
    network=None,
    distiller=distill.make_distiller(method, config.distill),
    epoch_steps=2,
    num_steps=10,
  ).make_optimizer()


def moved(tx, params, *, steps=1, scale=1.0):
  """Leaves that `steps` updates by a constant gradient have changed."""
  state = tx.init(params)
  first = params
  grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), params)
  for _ in range(steps):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return jax.tree.map(lambda x, y: float(jnp.max(abs(x - y))), params, first)


def test_kd_alone_trains_from_the_first_step():
  """It has no connectors to train alone; before, nothing moved in epoch 0."""
  for recipe in ('reference', 'clean'):
    change = moved(make_tx('kd', recipe), PARAMS)
    assert min(jax.tree.leaves(change)) > 0, recipe


def test_connectors_train_alone_in_the_first_epoch_of_the_reference():
  params = PARAMS | {'distiller': GATES}
  change = moved(make_tx('attnfd', 'reference'), params)
  assert max(jax.tree.leaves(change['student'])) == 0
  assert min(jax.tree.leaves(change['distiller'])) > 0


@pytest.mark.parametrize('method', ['attnfd', 'attnfd+kd'])
def test_the_clip_counts_what_trains(method):
  """Gradients of groups that rest made the others' steps smaller."""
  params = PARAMS | {'distiller': GATES}
  tx = make_tx(method, 'reference', clip_norm=1.0, weight_decay=0.0)
  large = {
    'student': jax.tree.map(lambda x: 1e3 * x, params['student']),
    'distiller': jax.tree.map(lambda x: 1e-3 * x, params['distiller']),
  }
  updates, _ = tx.update(large, tx.init(params), params)
  clipped = updates['distiller']['methods_attnfd']['connectors_aspp']['w']
  plain = make_tx(method, 'reference', weight_decay=0.0)
  expected, _ = plain.update(large, plain.init(params), params)
  # Far below the limit by itself: nothing is to be clipped.
  np.testing.assert_allclose(
    clipped,
    expected['distiller']['methods_attnfd']['connectors_aspp']['w'],
    rtol=1e-6,
  )
  assert np.max(np.abs(clipped)) > 0


def test_a_method_brings_its_own_optimizer():
  class Game(distill.METHODS['kd']):
    def parameter_groups(self):
      return ((r'discriminator/.*', 'adversary'),)

    def optimizers(self, num_steps):
      return {'adversary': optax.sgd(-1.0)}

  distiller = distill.WeightedSum({'game': Game()}, {'game': 1.0})
  tx = optim.make_optimizer(
    lambda step: 0.5,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    groups=distiller.parameter_groups(),
    optimizers=distiller.optimizers(),
  )
  params = {
    'student': {'classifier': jnp.zeros(2)},
    'distiller': {'methods_game': {'discriminator': {'w': jnp.zeros(2)}}},
  }
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  adversary = updates['distiller']['methods_game']['discriminator']['w']
  np.testing.assert_array_equal(adversary, [1.0, 1.0])
  np.testing.assert_array_equal(updates['student']['classifier'], [-5.0, -5.0])


def test_evaluated_are_averaged_params_with_the_statistics_of_now():
  """Of student and distiller alike; before, statistics were averaged twice and
  gates not at all.
  """
  variables = {
    name: {'params': {'w': jnp.ones(2)}, 'batch_stats': {'mean': jnp.ones(2)}}
    for name in ('student', 'distiller')
  }
  state = steps.make_state(variables, optax.sgd(0.1), ema=True)
  state = state.replace(
    ema=jax.tree.map(lambda x: 3 * x, state.ema),
    collections=jax.tree.map(lambda x: 5 * x, state.collections),
  )
  for name in ('student', 'distiller'):
    found = state.variables(name)
    np.testing.assert_array_equal(found['params']['w'], [3, 3])
    np.testing.assert_array_equal(found['batch_stats']['mean'], [5, 5])


def test_each_alternative_of_a_group_has_its_prefix():
  class Two(distill.METHODS['kd']):
    def parameter_groups(self):
      return ((r'proj/.*|disc/.*', 'frozen'),)

  groups = distill.WeightedSum({'two': Two()}, {'two': 1.0}).parameter_groups()
  tree = {part: {'w': jnp.ones(1)} for part in ('proj', 'disc', 'other')}
  labels = optim.make_labels(groups)({'distiller': {'methods_two': tree}})
  assert jax.tree.leaves(labels) == ['frozen', 'head', 'frozen']
