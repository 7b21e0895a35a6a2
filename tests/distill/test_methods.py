# SPDX-License-Identifier: Apache-2.0
"""Methods by name, alone and summed."""

import functools

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.config import resolve
from attnfd_jax.distill import make_distiller
from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.distill.kd import logit_distance

CONFIG = {
  'attn_lambda': 2.0,
  'kd_weight': 0.25,
  'temperature': 4.0,
  'teacher_attention': 'parameter_free',
  'student_attention': 'none',
  'norm_scope': 'image',
  'reduction': 'unitmean',
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


@pytest.mark.parametrize('method', ['attnfd', 'kd', 'attnfd+kd', 'kd+attnfd'])
def test_sum_of_weighted_parts(fill, method):
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  module = make_distiller(CONFIG | {'method': method}, student, teacher)
  labels = np.zeros((2, 9, 9), np.uint8)
  init = functools.partial(module.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), student, teacher, labels)
  variables = fill(shapes)
  loss, terms = jax.jit(functools.partial(module.apply, train=False))(
    variables, student, teacher, labels
  )
  expected, wanted = 0.0, {}
  if 'kd' in method:
    maps = student['coarse_logits'], teacher['coarse_logits']
    wanted['kd'] = logit_distance(*maps, temperature=4.0)
    expected += 0.25 * wanted['kd']
  if 'attnfd' in method:
    options = {k: v for k, v in CONFIG.items() if k in AttnFD.__annotations__}
    alone = AttnFD({'backbone': 4}, {'backbone': 5}, **options)
    distance, parts = alone.apply(
      {part: tree['methods_attnfd'] for part, tree in variables.items()},
      student['features'],
      teacher['features'],
      train=False,
    )
    wanted |= {'attnfd': distance, 'attnfd_backbone': parts['backbone']}
    expected += 2.0 * distance
  assert set(terms) == set(wanted)
  for name, value in wanted.items():
    # Two programs of the same float32 sums.
    np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (
      'atnfd',
      "Unknown method 'atnfd'.*Did you mean 'attnfd'.*Have: attnfd, kd",
    ),
    ('attnfd+dk', "Unknown method 'dk' in distill.method='attnfd.dk'"),
    ('', "Unknown method ''"),
  ],
  ids=['near', 'second', 'empty'],
)
def test_unknown_method(method, message):
  outputs = make_outputs(0, 4)
  with pytest.raises(ValueError, match=message):
    make_distiller(CONFIG | {'method': method}, outputs, outputs)


@pytest.mark.parametrize('recipe', ['clean', 'reference'])
def test_recipes_reach_the_method(recipe):
  config = default_config()
  config.recipe = recipe
  distill = resolve(config).distill
  student, teacher = make_outputs(0, 4), make_outputs(1, 5)
  module = make_distiller(distill, student, teacher).methods['attnfd']
  assert dict(module.student_channels) == {'backbone': 4}
  assert dict(module.teacher_channels) == {'backbone': 5}
  expected = {
    # No in_path teacher in the defaults: gates that nobody trained add noise.
    'clean': ('parameter_free', 'learnable', 'unitmean', 'running'),
    'reference': ('checkpoint', 'mlp_frozen', 'batchmean', 'batch'),
  }[recipe]
  assert expected == (
    module.teacher_attention,
    module.student_attention,
    module.reduction,
    module.teacher_bn,
  )


def test_a_config_dict_will_do():
  outputs = make_outputs(0, 4)
  config = ConfigDict(CONFIG | {'method': 'kd'})
  module = make_distiller(config, outputs, outputs)
  assert module.methods['kd'].temperature == 4.0
