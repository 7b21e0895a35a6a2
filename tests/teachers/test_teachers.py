# SPDX-License-Identifier: Apache-2.0
"""Teachers by name: stages, and functions of the user's."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from attnfd_jax.config import default_config, resolve
from attnfd_jax.devices import sharding
from attnfd_jax.distill import METHODS
from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.network import abstract_variables
from attnfd_jax.teachers import sources
from attnfd_jax.teachers.teacher import FrozenNetwork, Scored
from attnfd_jax.training import stage as stages

NAMES = ('road', 'sky')
SMALL = {
  'width_multiplier': 0.125,
  'aspp_channels': 8,
  'decoder_channels': 8,
  'low_level_channels': 8,
}
FACTORY = """
import jax.numpy as jnp

class Teacher:
  name, class_names = 'mine', {names}
  variables = {{'bias': jnp.ones(2)}}

  def apply(self, variables, image, *, rng=None):
    shape = (*image.shape[:3], 2)
    return {{'logits': jnp.zeros(shape) + variables['bias'][None, None, None],
            'features': {{}}}}

def make():
  return Teacher()

def broken():
  return object()
"""


def make_config(**changes):
  config = default_config()
  config.data.crop_size = (64, 64)
  config.update_from_flattened_dict(changes)
  return resolve(config)


def distilled(config, *, in_path, gates=None):
  """The distiller for a small student and a teacher, with or without gates."""
  student = DeepLabV3Plus('resnet18', 2, **SMALL)
  network = student.clone(in_path_attention=in_path)
  teacher = FrozenNetwork(
    network, abstract_variables(network), 'small', NAMES, gates=gates
  )
  stage = stages.Stage('distill', config, None, None, student)
  found = stages.with_teacher(stage, teacher).distiller
  return found.methods['attnfd'].teacher_attention


def test_the_teacher_itself_says_where_its_attention_is():
  """Not config.teacher.in_path_attention, which is of the stage that trains
  one: a checkpoint with gates in its path ended in an error whose remedy
  changed nothing.
  """
  config = make_config()
  assert not config.teacher.in_path_attention
  assert distilled(config, in_path=True) == 'in_path'
  assert distilled(config, in_path=False) == 'parameter_free'
  reference = make_config(recipe='reference')
  assert distilled(reference, in_path=True) == 'in_path'
  assert distilled(reference, in_path=False) == 'random'


def test_an_attention_that_does_not_go_with_the_path_is_refused():
  config = make_config(**{'distill.attnfd.teacher_attention': 'none'})
  with pytest.raises(InputError, match="attention='none', but .*use in_path"):
    distilled(config, in_path=True)


def from_factory(tmp_path, name='make', names=NAMES):
  path = tmp_path / 'mine.py'
  path.write_text(FACTORY.format(names=names))
  config = make_config(**{'teacher.factory': f'{path}:{name}'})
  return sources.from_config(config, tmp_path, NAMES, sharding.make_mesh())


def test_a_function_of_the_users(tmp_path):
  teacher = from_factory(tmp_path)
  assert teacher.name == 'mine'
  image = np.zeros((1, 8, 8, 3), np.float32)
  out = jax.jit(Scored(teacher).apply)(teacher.variables, image)
  np.testing.assert_array_equal(out['logits'], np.ones((1, 8, 8, 2)))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'name': 'broken'}, 'returned object without name, class_names, variab'),
    ({'name': 'none'}, 'has no none'),
    ({'names': ('a', 'b', 'c')}, r"has 3 classes \['a', 'b', 'c'\]"),
  ],
  ids=['no teacher', 'no function', 'classes'],
)
def test_what_is_no_teacher_is_refused(tmp_path, options, message):
  with pytest.raises(InputError, match=message) as error:
    from_factory(tmp_path, **options)
  assert '\n' not in str(error.value)


class Normed(nn.Module):
  """A network of the user's whose statistics would move in training."""

  num_classes: int = 2
  dtype: None = None

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Conv(2, (1, 1))(image)
    x = nn.BatchNorm(not train, dtype=self.dtype)(x)
    return {'logits': x, 'features': {}}


def test_batch_statistics_of_a_users_network_are_not_kept():
  image = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  network = Normed()
  variables = network.init(jax.random.key(0), image, train=False)
  teacher = FrozenNetwork(network, variables, 'x', NAMES, batch_statistics=True)
  out = teacher.apply(variables, image, rng=jax.random.key(1))
  np.testing.assert_allclose(np.mean(out['logits'], (0, 1, 2)), 0, atol=1e-5)


def test_gates_of_the_taps_that_are_compared_are_adopted():
  gates = {'params': {'backbone': np.ones(2), 'aspp': np.ones(3)}}
  method = METHODS['attnfd'](teacher_attention='checkpoint')
  teacher = FrozenNetwork(None, {}, 'x', NAMES, gates=gates)
  fresh = {'teacher': {'params': {'aspp': np.zeros(3)}}}
  found = method.adopt(fresh, teacher)['teacher']
  assert set(found['params']) == {'aspp'} and found['params']['aspp'][0] == 1
  wrong = {'teacher': {'params': {'decoder': np.zeros(3)}}}
  with pytest.raises(InputError, match='do not fit its maps'):
    method.adopt(wrong, teacher)
