# SPDX-License-Identifier: Apache-2.0
"""DIST against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.dist import correlation, prediction_distances
from attnfd_jax.distill.weighted_sum import WeightedSum

SHAPE = (3, 4, 5, 6)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def numpy_distances(student, teacher, temperature=1.0):
  p, q = (
    softmax(x.astype(np.float64) / temperature).reshape(-1, x.shape[-1])
    for x in (student, teacher)
  )
  rows = [np.corrcoef(*pair)[0, 1] for pair in zip(p, q, strict=True)]
  columns = [np.corrcoef(*pair)[0, 1] for pair in zip(p.T, q.T, strict=True)]
  return 1 - np.mean(rows), 1 - np.mean(columns)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_value(temperature):
  s, t = 2 * normal(0, *SHAPE), 2 * normal(1, *SHAPE)
  found = prediction_distances(s, t, temperature=temperature)
  expected = numpy_distances(s, t, temperature)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  assert all(0 <= x <= 2 for x in found)


def test_a_shift_of_all_logits_of_a_pixel_changes_nothing():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  shift = 5 * normal(2, *SHAPE[:3], 1)
  np.testing.assert_allclose(
    prediction_distances(s + shift, t - shift),
    prediction_distances(s, t),
    rtol=1e-5,
  )


def test_zero_at_equality_but_for_epsilon(x64):
  s = normal(0, *SHAPE)
  value, grads = jax.value_and_grad(
    lambda s, t: sum(prediction_distances(s, t))
  )(s, s)
  np.testing.assert_allclose(value, 0, rtol=0, atol=1e-6)
  np.testing.assert_allclose(grads, 0, rtol=0, atol=1e-6)
  with x64():
    s = s.astype(np.float64)
    inter, intra = map(float, prediction_distances(s, s))
  # 1e-8 over squared lengths of 0.01 to 1; far from float64's rounding.
  assert 1e-9 < inter < 1e-6 and 1e-10 < intra < 1e-6


def test_correlation():
  x, y = normal(0, 3, 50), normal(1, 3, 50)
  expected = [np.corrcoef(x[i], y[i])[0, 1] for i in range(3)]
  np.testing.assert_allclose(correlation(x, y, (1,)), expected, rtol=1e-5)
  found = correlation(3 * x + 2, y, (1,))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  found = correlation(-x, y, (1,))
  np.testing.assert_allclose(found, np.negative(expected), rtol=1e-5)
  np.testing.assert_allclose(correlation(x, 2 * x + 1, (1,)), 1, rtol=1e-6)
  np.testing.assert_allclose(correlation(x, -x, (1,)), -1, rtol=1e-6)


def test_constant_predictions_have_no_correlation():
  t = normal(1, *SHAPE)
  zeros = np.zeros_like(t)
  for s, target in ((zeros, t), (t, zeros), (zeros, zeros)):
    value, grads = jax.value_and_grad(
      lambda s, t: sum(prediction_distances(s, t))
    )(s, target)
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    assert np.isfinite(grads).all()


def make_outputs(seed):
  return {
    'logits': normal(seed, 3, 16, 20, 6),
    'coarse_logits': normal(seed + 1, *SHAPE),
    'features': {},
  }


def test_the_method_weighs_its_terms():
  student, teacher = make_outputs(0), make_outputs(5)
  labels = np.full((3, 16, 20), 255, np.uint8)
  arguments = student, teacher, labels

  def run(**options):
    method = attnfd_jax.make_method('dist', student, teacher, **options)
    return method.apply({}, *arguments, train=True, step=0)

  coarse = [side['coarse_logits'] for side in (student, teacher)]
  inter, intra = numpy_distances(*coarse)
  loss, terms = run()
  assert loss.shape == ()
  np.testing.assert_allclose(loss, inter + intra, rtol=1e-6)
  np.testing.assert_allclose(terms['inter'], inter, rtol=1e-6)
  np.testing.assert_allclose(terms['intra'], intra, rtol=1e-6)
  inter, intra = numpy_distances(*coarse, 2.0)
  loss, _ = run(inter_weight=2.0, intra_weight=0.5, temperature=2.0)
  np.testing.assert_allclose(loss, 8 * inter + 2 * intra, rtol=1e-6)
  loss, _ = run(full_size=True)
  pair = student['logits'], teacher['logits']
  np.testing.assert_allclose(loss, sum(numpy_distances(*pair)), rtol=1e-6)


def test_division_by_the_batch():
  student, teacher = make_outputs(0), make_outputs(5)
  labels = np.full((3, 16, 20), 255, np.uint8)
  found = []
  for divides in (False, True):
    method = attnfd_jax.METHODS['dist'](divides_by_batch=divides)
    total = WeightedSum({'dist': method}, {'dist': 1.0})
    arguments = student, teacher, labels
    losses, _ = total.apply({}, *arguments, train=True, step=0, batch_size=12)
    found.append(losses['dist'].value)
  np.testing.assert_allclose(found[0], 12 * found[1], rtol=1e-6)


def test_the_teacher_is_a_constant():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = jax.grad(lambda t: sum(prediction_distances(s, t)).sum())(t)
  np.testing.assert_array_equal(grads, 0)
