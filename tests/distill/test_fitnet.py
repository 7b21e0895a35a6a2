# SPDX-License-Identifier: Apache-2.0
"""Hints against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.fitnet import squared_distance

SHAPE = (3, 4, 5, 6)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_outputs(seed, channels):
  return {
    'logits': normal(seed, 3, 16, 20, 2),
    'features': {'aspp': normal(seed + 1, 3, 4, 5, channels)},
  }


LABELS = np.full((3, 16, 20), 255, np.uint8)


def loss(method, params, student, teacher):
  variables, outputs = {'params': params}, (student, teacher, LABELS)
  return method.apply(variables, *outputs, train=True, step=0)[0].value


def weights(kernel):
  return {'regressor_aspp': {'conv': {'kernel': kernel[None, None]}}}


def test_value_and_gradient_of_the_regressor():
  student, teacher = make_outputs(0, 6), make_outputs(5, 9)
  method = attnfd_jax.make_method('fitnet', student, teacher)
  kernel = normal(9, 6, 9)
  found, grads = jax.value_and_grad(loss, 1)(
    method, weights(kernel), student, teacher
  )
  s, t = (
    side['features']['aspp'].astype(np.float64).reshape(60, -1)
    for side in (student, teacher)
  )
  error = s @ kernel.astype(np.float64) - t
  np.testing.assert_allclose(found, np.mean(error**2), rtol=1e-6)
  # That of least squares.
  expected = 2 * s.T @ error / error.size
  grads = grads['regressor_aspp']['conv']['kernel'][0, 0]
  np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-6)


def test_equal_maps_under_the_identity():
  side = make_outputs(0, 6)
  method = attnfd_jax.make_method('fitnet', side, side)
  assert loss(method, weights(np.eye(6, dtype=np.float32)), side, side) == 0


def test_quadratic():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  np.testing.assert_allclose(
    squared_distance(3 * s, 3 * t), 9 * squared_distance(s, t), rtol=1e-6
  )


def test_the_regressor_starts_as_in_torch():
  student, teacher = make_outputs(0, 64), make_outputs(5, 256)
  method = attnfd_jax.make_method('fitnet', student, teacher)
  arguments = student, teacher, LABELS
  variables = method.init(jax.random.key(0), *arguments, train=True, step=0)
  (kernel,) = jax.tree.leaves(variables)  # And no bias.
  assert kernel.shape == (1, 1, 64, 256)
  # U(-1 / 8, 1 / 8), 16,384 draws.
  assert 0.124 < np.abs(kernel).max() <= 0.125
  np.testing.assert_allclose(np.std(kernel), 0.125 / 3**0.5, rtol=0.02)


def test_normalized_maps():
  s, t = 2 + 3 * normal(0, *SHAPE), normal(1, *SHAPE)
  t += s * np.arange(6, dtype=np.float32)

  def normalized(x):
    x = x.astype(np.float64)
    return (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)

  expected = np.mean((normalized(s) - normalized(t)) ** 2, (1, 2, 3))
  found = squared_distance(s, t, normalize=True)
  # Of maps with a mean, in float32.
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
  moved = 1e3 * t + 5
  found = squared_distance(s, moved, normalize=True)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_normalized_channels_without_variation_are_zero():
  s, t = normal(0, 3, 7, 9, 6), normal(1, 3, 7, 9, 6)
  # Means of 63 equal numbers are not always that number in float32.
  s[..., :4] = normal(2, 3, 1, 1, 4)
  t[..., :4] = normal(3, 3, 1, 1, 4)

  def loss(s):
    return squared_distance(s, t, normalize=True).sum()

  value, grads = jax.value_and_grad(loss)(s)
  rest = [x[..., 4:] for x in (s, t)]
  expected = squared_distance(*rest, normalize=True).sum() * 2 / 6
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_array_equal(grads[..., :4], 0)


@pytest.mark.parametrize('normalize', [False, True])
def test_no_parameters_but_those_of_taps(normalize):
  student, teacher = make_outputs(0, 6), make_outputs(5, 9)
  for side in (student, teacher):
    side['features']['decoder'] = normal(7, 3, 8, 10, 4)
  method = attnfd_jax.make_method(
    'fitnet', student, teacher, taps=('aspp', 'decoder'), normalize=normalize
  )
  arguments = student, teacher, LABELS
  variables = method.init(jax.random.key(0), *arguments, train=True, step=0)
  assert set(variables['params']) == {'regressor_aspp', 'regressor_decoder'}
  found, terms = method.apply(variables, *arguments, train=True, step=0)
  np.testing.assert_allclose(found.value, sum(terms.values()), rtol=1e-6)


def test_the_teacher_is_a_constant():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = jax.grad(lambda t: squared_distance(s, t).sum())(t)
  np.testing.assert_array_equal(grads, 0)
