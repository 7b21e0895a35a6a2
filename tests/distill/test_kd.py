# SPDX-License-Identifier: Apache-2.0
"""Logit distillation against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.distill import kd

# Means of some hundred float32 logarithms.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}
SHAPE = (2, 4, 5, 6)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logit_distance(student, teacher, **options):
  return kd.logit_distance(student, teacher, **options).value


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_value_and_gradient(temperature):
  s, t = 2 * normal(0, *SHAPE), 2 * normal(1, *SHAPE)
  loss, grads = jax.value_and_grad(logit_distance)(
    s, t, temperature=temperature
  )
  assert loss.dtype == jnp.float32
  p = softmax(t.astype(np.float64) / temperature)
  q = softmax(s.astype(np.float64) / temperature)
  divergence = np.sum(p * np.log(p / q), -1)
  np.testing.assert_allclose(loss, temperature**2 * divergence.mean(), **CLOSE)
  # T^2 from the front, 1 / T from inside; 40 pixels.
  np.testing.assert_allclose(grads, temperature * (q - p) / 40, **CLOSE)


def test_a_shift_of_all_scores_of_a_pixel_changes_nothing():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  loss = logit_distance(s, t, temperature=2.0)
  shift = 5 * normal(2, *SHAPE[:3], 1)
  for pair in ((s + shift, t), (s, t + shift)):
    np.testing.assert_allclose(
      logit_distance(*pair, temperature=2.0), loss, **CLOSE
    )


def test_soft_cross_entropy_without_the_entropy_of_the_teacher():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  p, q = (softmax(x.astype(np.float64)) for x in (t, s))
  cross_entropy, entropy = (-np.sum(p * np.log(x), -1).mean() for x in (q, p))
  loss = logit_distance(s, t, temperature=1.0)
  np.testing.assert_allclose(loss, cross_entropy - entropy, **CLOSE)


def test_standardized_logits():
  s, t = 2 * normal(0, *SHAPE) + 1, 5 * normal(1, *SHAPE)

  def standardized(x):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

  p, q = (softmax(standardized(x) / 2) for x in (t, s))
  expected = 4 * np.sum(p * np.log(p / q), -1).mean()
  loss = logit_distance(s, t, temperature=2.0, standardize=True)
  np.testing.assert_allclose(loss, expected, **CLOSE)
  # A positive factor of a pixel, and a shift, change nothing.
  factor = np.exp(normal(2, *SHAPE[:3], 1))
  for pair in ((factor * s + 1, t), (s, factor * t - 1)):
    found = logit_distance(*pair, temperature=2.0, standardize=True)
    np.testing.assert_allclose(found, loss, rtol=1e-4, atol=1e-5)
  assert abs(logit_distance(s, t, temperature=2.0) - loss) > 0.1


def test_standardized_logits_that_are_all_equal():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  s[0, 0], t[1] = 0.1, 0.0
  loss, grads = jax.value_and_grad(logit_distance)(
    s, t, temperature=2.0, standardize=True
  )
  assert np.isfinite(loss) and np.isfinite(grads).all()


def test_zero_at_equality():
  s = 3 * normal(0, *SHAPE)
  loss, grads = jax.value_and_grad(logit_distance)(s, s, temperature=2.0)
  assert loss == 0
  # Rounding of probabilities, over 40 pixels.
  np.testing.assert_allclose(grads, 0, rtol=0, atol=1e-7)


def test_teacher_has_no_gradient():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = jax.grad(logit_distance, argnums=1)(s, t, temperature=2.0)
  np.testing.assert_array_equal(grads, 0)


def test_large_and_bfloat16_logits():
  s, t = 1e3 * normal(0, *SHAPE), 1e3 * normal(1, *SHAPE)
  loss, grads = jax.value_and_grad(logit_distance)(s, t, temperature=1.0)
  assert np.isfinite(loss) and np.isfinite(grads).all()
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in (s, t)]
  assert logit_distance(*rounded, temperature=1.0).dtype == jnp.float32


def test_shapes_must_be_equal(no_type_checks):
  s, t = normal(0, *SHAPE), normal(1, 2, 4, 5, 7)
  with pytest.raises(ValueError, match=r'\(2, 4, 5, 6\).*\(2, 4, 5, 7\)'):
    logit_distance(s, t, temperature=1.0)


def test_the_method_takes_the_scores_before_the_last_resize():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  whole = {'logits': normal(2, 2, 8, 10, 6), 'features': {}}
  student, teacher = whole | {'coarse_logits': s}, whole | {'coarse_logits': t}

  def loss(*outputs):
    labels = np.full((2, 8, 10), 255, np.uint8)  # Unlabeled images, too.
    return kd.LogitKD(3.0).apply({}, *outputs, labels, train=True, step=0)

  (total, count), terms = loss(student, teacher)
  assert terms == {} and count == s[..., 0].size
  expected = logit_distance(s, t, temperature=3.0)
  np.testing.assert_array_equal(total / count, expected)
  # One side has none, or of another size: those of the image.
  other = whole | {'logits': normal(3, 2, 8, 10, 6)}
  expected = logit_distance(other['logits'], whole['logits'], temperature=3.0)
  for teacher in (whole, whole | {'coarse_logits': normal(4, 2, 2, 3, 6)}):
    found, _ = loss(other | {'coarse_logits': s}, teacher)
    np.testing.assert_array_equal(found.value, expected)


def test_logits_of_the_size_of_the_image():
  small, large = normal(0, *SHAPE), normal(1, 2, 8, 10, 6)
  student = {'logits': large, 'coarse_logits': small, 'features': {}}
  teacher = student | {'logits': normal(2, 2, 8, 10, 6)}
  labels = np.full((2, 8, 10), 255, np.uint8)

  def loss(**options):
    method = kd.LogitKD(**options)
    arguments = student, teacher, labels
    return method.apply({}, *arguments, train=True, step=0)[0].value

  assert loss() == 0
  expected = logit_distance(large, teacher['logits'], temperature=1.0)
  np.testing.assert_array_equal(loss(full_size=True), expected)


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan'), '4'])
def test_the_temperature_is_positive(no_type_checks, temperature):
  with pytest.raises(ValueError, match=rf'temperature={temperature} must be'):
    kd.LogitKD(temperature)
