# SPDX-License-Identifier: Apache-2.0
"""Correlation of classes against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.ickd import correlation_distance

SHAPE = (3, 4, 5, 6)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_distance(student, teacher):
  def rows(x):
    x = x.astype(np.float64).reshape(-1, x.shape[-1])
    gram = x.T @ x
    return gram / np.linalg.norm(gram, axis=1, keepdims=True)

  return np.array(
    [
      np.mean(2 - 2 * np.sum(rows(s) * rows(t), 1))
      for s, t in zip(student, teacher, strict=True)
    ]
  )


@pytest.fixture
def logits():
  return 1 + normal(0, *SHAPE), normal(1, *SHAPE)


def test_value(logits):
  found = correlation_distance(*logits)
  np.testing.assert_allclose(found, numpy_distance(*logits), rtol=1e-6)
  assert (found > 0).all() and (found < 4).all()


@pytest.mark.parametrize('factor', [-3.0, 1e-9, 1e15])
def test_factors_of_an_image_change_nothing(logits, factor):
  s, t = logits
  expected = correlation_distance(s, t)
  factors = np.array([factor, 1, -2], np.float32)[:, None, None, None]
  np.testing.assert_allclose(
    correlation_distance(factors * s, t), expected, rtol=1e-5
  )
  found = correlation_distance(factors * t, t)
  np.testing.assert_allclose(found, 0, rtol=0, atol=1e-6)


def test_the_order_of_pixels_does_not_matter(logits):
  expected = correlation_distance(*logits)
  order = np.random.default_rng(2).permutation(20)
  shuffled = (x.reshape(3, 20, 6)[:, order].reshape(SHAPE) for x in logits)
  found = correlation_distance(*shuffled)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_zero_at_equality_and_finite_without_a_class():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  s[..., 2] = 0
  t[0] = 0

  def loss(s, t):
    return correlation_distance(s, t).sum()

  value, grads = jax.value_and_grad(loss)(s, s)
  assert value == 0
  np.testing.assert_array_equal(grads, 0)
  value, grads = jax.value_and_grad(loss)(s, t)
  assert np.isfinite(value) and np.isfinite(grads).all()


def test_the_method_takes_either_size():
  student, teacher = (
    {
      'logits': normal(seed, 3, 16, 20, 6),
      'coarse_logits': normal(seed + 1, *SHAPE),
      'features': {},
    }
    for seed in (0, 5)
  )
  labels = np.full((3, 16, 20), 255, np.uint8)
  arguments = student, teacher, labels
  for key, full_size in (('coarse_logits', False), ('logits', True)):
    method = attnfd_jax.make_method(
      'ickd', student, teacher, full_size=full_size
    )
    loss, terms = method.apply({}, *arguments, train=True, step=0)
    expected = numpy_distance(student[key], teacher[key])
    assert loss.count == 3 and not terms
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-6)


def test_the_teacher_is_a_constant():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = jax.grad(lambda t: correlation_distance(s, t).sum())(t)
  np.testing.assert_array_equal(grads, 0)
