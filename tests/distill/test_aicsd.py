# SPDX-License-Identifier: Apache-2.0
"""AICSD against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax import distill
from attnfd_jax.distill import aicsd
from attnfd_jax.errors import InputError

SHAPE = (3, 5, 6, 4)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def divergences(logits):
  """[b, k, k], with loops."""
  logits = logits.astype(np.float64)
  b, _, _, k = logits.shape
  found = np.zeros((b, k, k))
  for image, i, j in np.ndindex(b, k, k):
    p, q = (np.exp(logits[image, ..., c]) for c in (i, j))
    p, q = p / p.sum(), q / q.sum()
    found[image, i, j] = np.sum(p * np.log(p / q))
  return found


def rows(x):
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True))


@functools.partial(jax.jit, static_argnames=('softmax_over', 'form'))
def distance(student, teacher, **options):
  return aicsd.similarity_distance(student, teacher, **options).value


def test_divergences_of_classes():
  logits = 2 * normal(0, *SHAPE)
  found = aicsd.class_divergences(logits)
  np.testing.assert_allclose(found, divergences(logits), rtol=1e-5, atol=1e-6)
  assert np.min(found) >= 0
  np.testing.assert_array_equal(np.diagonal(found, axis1=1, axis2=2), 0)


def test_value():
  s, t = 2 * normal(0, *SHAPE), 2 * normal(1, *SHAPE)
  ours, theirs = (rows(divergences(x)) for x in (s, t))
  loss = distance(s, t)
  assert loss.dtype == jnp.float32
  expected = np.mean((ours - theirs) ** 2)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
  # Of one image, and so of each.
  parts = [distance(s[i : i + 1], t[i : i + 1]) for i in range(3)]
  np.testing.assert_allclose(np.mean(parts), loss, rtol=1e-5)


@pytest.mark.parametrize('height', [False, True])
def test_value_of_the_authors_code(height):
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)

  def matrix(logits):
    # [b, k, h, w], as there.
    x = np.exp(logits.astype(np.float64).transpose(0, 3, 1, 2))
    p = x / np.sum(x, 2 if height else (2, 3), keepdims=True)
    found = np.zeros((4, 4))
    for i, j in np.ndindex(4, 4):
      if i <= j:
        # KLDivLoss(p_i, p_j), its first argument not a logarithm.
        found[i, j] = np.mean(p[:, j] * (np.log(p[:, j]) - p[:, i]))
        found[j, i] = found[i, j]
    return found

  expected = np.mean((rows(matrix(s)) - rows(matrix(t))) ** 2)
  over = 'height' if height else 'positions'
  loss = distance(s, t, softmax_over=over, form='code')
  np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-9)
  assert abs(loss - distance(s, t, softmax_over=over)) > 1e-4


def test_a_constant_for_each_map_of_a_class_changes_nothing():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  loss = distance(s, t)
  shift = 5 * normal(2, 3, 1, 1, 4)
  for pair in ((s + shift, t), (s, t + shift)):
    np.testing.assert_allclose(distance(*pair), loss, rtol=1e-4)
  assert abs(distance(s + 5 * normal(2, 3, 5, 6, 1), t) - loss) > 1e-3


@pytest.mark.parametrize('form', ['paper', 'code'])
def test_zero_at_equality_and_finite_for_zeros(form):
  grad_fn = jax.value_and_grad(functools.partial(distance, form=form), (0, 1))
  s, zeros = normal(0, *SHAPE), np.zeros(SHAPE, np.float32)
  loss, (ours, theirs) = grad_fn(s, s)
  # Rounding of rows of length 1, which two programs may do differently.
  np.testing.assert_allclose(loss, 0, rtol=0, atol=1e-12)
  np.testing.assert_allclose(ours, 0, rtol=0, atol=1e-8)
  for pair in ((zeros, s), (s, zeros), (zeros, zeros)):
    loss, (ours, theirs) = grad_fn(*pair)
    assert np.isfinite(loss) and np.isfinite(ours).all()
    np.testing.assert_array_equal(theirs, 0)


def outputs(seed):
  maps = {'logits': normal(seed, 3, 10, 12, 4)}
  return maps | {'coarse_logits': normal(seed + 2, *SHAPE), 'features': {}}


def test_the_method_and_the_division_of_the_authors():
  student, teacher = outputs(0), outputs(1)
  labels = np.full((3, 10, 12), 255, np.uint8)
  arguments = (student, teacher, labels)
  expected = distance(student['coarse_logits'], teacher['coarse_logits'])
  for reduction, divisor in (('mean', 1), ('batchmean', 3)):
    total = distill.make_distiller('aicsd', {'aicsd': {'reduction': reduction}})
    losses, _ = total.apply({}, *arguments, train=True, step=0)
    np.testing.assert_allclose(
      losses['aicsd'].value, expected / divisor, rtol=1e-6
    )


def test_adaptive_weights_are_schedules():
  """alpha (CE + AICSD) + (1 - alpha) KD, alpha the share of the stage."""
  groups = {
    'kd': {'weight': 10.0, 'weight_schedule': 'linear_to_zero'},
    'aicsd': {'weight': 9500.0, 'weight_schedule': 'linear_from_zero'},
  }
  total = distill.make_distiller(
    'kd+aicsd', groups, num_steps=120, task_schedule='linear_from_zero'
  )
  for step, alpha in ((0, 0), (30, 0.25), (120, 1), (130, 1)):
    found = [total.task_weight(step)]
    found += [total.weight(name, step) for name in ('aicsd', 'kd')]
    expected = [alpha, 9500 * alpha, 10 * (1 - alpha)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert distill.make_distiller('kd', {'kd': {}}).task_weight(7) == 1
  with pytest.raises(InputError, match="task_weight_schedule='up' must be one"):
    distill.make_distiller('kd', {'kd': {}}, task_schedule='up')


def test_wrong_options_and_shapes_are_named(no_type_checks):
  student, teacher = outputs(0), outputs(1)
  with pytest.raises(InputError, match="form='paper2' must be one of pap"):
    distill.make_method('aicsd', student, teacher, form='paper2')
  other = {'logits': normal(0, 3, 10, 12, 5), 'features': {}}
  with pytest.raises(InputError, match='need the same classes'):
    distill.make_method('aicsd', student, other)
