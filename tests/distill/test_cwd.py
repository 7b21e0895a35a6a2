# SPDX-License-Identifier: Apache-2.0
"""Channel-wise distillation against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.cwd import channel_distance
from attnfd_jax.errors import InputError

SHAPE = (3, 4, 5, 6)
# Logarithms of some ten float32 probabilities.
CLOSE = {'rtol': 1e-6, 'atol': 1e-6}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_distance(student, teacher, temperature):
  def softmax(x):
    x = x.astype(np.float64).reshape(len(x), -1, x.shape[-1]) / temperature
    p = np.exp(x - x.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)

  p, q = softmax(teacher), softmax(student)
  return temperature**2 * np.sum(p * np.log(p / q), 1).mean(-1)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_value(temperature):
  s, t = 3 * normal(0, *SHAPE), 3 * normal(1, *SHAPE)
  found = channel_distance(s, t, temperature=temperature)
  expected = numpy_distance(s, t, temperature)
  assert found.shape == (3,) and (found > 0).all()
  # KL of probabilities that nearly agree is a small difference of large terms.
  np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6)


def test_a_constant_of_a_channel_changes_nothing_and_a_factor_does():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  loss = channel_distance(s, t, temperature=4.0)
  shift = normal(2, 3, 1, 1, 6)
  found = channel_distance(s + shift, t - shift, temperature=4.0)
  np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-6)
  found = channel_distance(t + shift, t, temperature=4.0)
  np.testing.assert_allclose(found, 0, rtol=0, atol=1e-6)
  assert (
    abs(channel_distance(2 * s, 2 * t, temperature=4.0) - loss) > 0.1
  ).all()


def test_large_maps_do_not_underflow():
  s, t = 1e3 * normal(0, *SHAPE), 1e3 * normal(1, *SHAPE)

  def loss(s):
    return channel_distance(s, t, temperature=1.0).sum()

  value, grads = jax.value_and_grad(loss)(s)
  assert np.isfinite(value) and np.isfinite(grads).all()


def make_outputs(seed, channels):
  return {
    'logits': normal(seed, 3, 16, 20, 4),
    'coarse_logits': normal(seed + 1, 3, 8, 10, 4),
    'features': {'aspp': normal(seed + 2, 3, 4, 5, channels)},
  }


LABELS = np.full((3, 16, 20), 255, np.uint8)


def run(student, teacher, **options):
  method = attnfd_jax.make_method('cwd', student, teacher, **options)
  arguments = student, teacher, LABELS
  variables = method.init(jax.random.key(0), *arguments, train=True, step=0)
  return variables, method.apply(variables, *arguments, train=True, step=0)


def test_both_parts_by_their_weights():
  student, teacher = make_outputs(0, 6), make_outputs(5, 6)
  variables, (loss, terms) = run(student, teacher)
  assert not variables  # Channels are equal.
  pair = [x['features']['aspp'] for x in (student, teacher)]
  features = numpy_distance(*pair, 4.0).mean()
  pair = [x['coarse_logits'] for x in (student, teacher)]
  logits = numpy_distance(*pair, 4.0).mean()
  np.testing.assert_allclose(terms['aspp'], features, **CLOSE)
  np.testing.assert_allclose(terms['logits'], logits, **CLOSE)
  assert loss.count == 3
  np.testing.assert_allclose(loss.value, 50 * features + 3 * logits, rtol=1e-5)


def test_a_convolution_brings_the_student_to_the_teachers_channels():
  student, teacher = make_outputs(0, 6), make_outputs(5, 9)
  options = {'feature_weight': 1.0, 'logits_weight': 0.0, 'temperature': 2.0}
  variables, (loss, terms) = run(student, teacher, **options)
  (kernel,) = jax.tree.leaves(variables)
  assert kernel.shape == (1, 1, 6, 9) and set(terms) == {'aspp'}
  mapped = student['features']['aspp'] @ np.asarray(kernel)[0, 0]
  expected = numpy_distance(mapped, teacher['features']['aspp'], 2.0).mean()
  np.testing.assert_allclose(loss.value, expected, **CLOSE)


def test_logits_alone_need_no_maps():
  student, teacher = make_outputs(0, 6), make_outputs(5, 9)
  teacher['features'] = {}
  options = {'feature_weight': 0.0, 'logits_weight': 5.0, 'temperature': 1.0}
  variables, (loss, _) = run(student, teacher, **options)
  assert not variables
  pair = [x['coarse_logits'] for x in (student, teacher)]
  expected = 5 * numpy_distance(*pair, 1.0).mean()
  np.testing.assert_allclose(loss.value, expected, rtol=1e-5)
  _, (loss, _) = run(student, teacher, full_size=True, **options)
  pair = [x['logits'] for x in (student, teacher)]
  expected = 5 * numpy_distance(*pair, 1.0).mean()
  np.testing.assert_allclose(loss.value, expected, rtol=1e-5)


def test_wrong_options():
  student, teacher = make_outputs(0, 6), make_outputs(5, 9)
  make = attnfd_jax.make_method
  with pytest.raises(InputError, match='are both 0'):
    make('cwd', student, teacher, feature_weight=0.0, logits_weight=0.0)
  with pytest.raises(InputError, match='logits_weight=-1.0 must be'):
    make('cwd', student, teacher, logits_weight=-1.0)
  teacher['coarse_logits'] = teacher['logits'] = teacher['logits'][..., :3]
  with pytest.raises(InputError, match='need the same classes'):
    make('cwd', student, teacher)


def test_the_teacher_is_a_constant():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = jax.grad(lambda t: channel_distance(s, t, temperature=4.0).sum())(t)
  np.testing.assert_array_equal(grads, 0)
