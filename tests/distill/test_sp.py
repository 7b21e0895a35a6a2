# SPDX-License-Identifier: Apache-2.0
"""Similarities of images against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.sp import similarities, similarity_distance


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def maps():
  # Sizes and channels differ.
  return 1 + normal(0, 5, 4, 5, 6), normal(1, 5, 3, 2, 9)


def numpy_similarities(x):
  x = x.astype(np.float64).reshape(len(x), -1)
  gram = x @ x.T
  return gram / np.linalg.norm(gram, axis=1, keepdims=True)


def test_value(maps):
  ours, theirs = (numpy_similarities(x) for x in maps)
  expected = np.sum((ours - theirs) ** 2) / 25
  found = similarity_distance(*maps)
  assert found.shape == ()
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_one_image_has_no_others():
  loss, grads = jax.value_and_grad(similarity_distance)(
    normal(0, 1, 4, 5, 6), normal(1, 1, 4, 5, 6)
  )
  # 1 up to rounding, squared.
  np.testing.assert_allclose(loss, 0, rtol=0, atol=1e-12)
  np.testing.assert_allclose(grads, 0, rtol=0, atol=1e-7)


@pytest.mark.parametrize('factor', [1e-9, 3.0, 1e15])
def test_factors_and_order_of_elements_change_nothing(maps, factor):
  student, teacher = maps
  expected = similarity_distance(student, teacher)
  for changed in (
    np.float32(factor) * student,
    student[..., ::-1],
    student[:, ::-1],
  ):
    found = similarity_distance(changed, teacher)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_another_order_of_images(maps):
  student, _ = maps
  order = [3, 1, 4, 0, 2]
  expected = similarities(student)[np.ix_(order, order)]
  np.testing.assert_allclose(similarities(student[order]), expected, rtol=1e-6)


def test_equal_and_empty_images():
  x = normal(0, 5, 4, 5, 6)
  x[2] = 0
  loss, grads = jax.value_and_grad(similarity_distance)(x, x)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0)
  _, grads = jax.value_and_grad(similarity_distance)(x, normal(1, 5, 2, 2, 3))
  assert np.isfinite(grads).all()


def test_batches_must_be_equal(no_type_checks):
  with pytest.raises(ValueError, match=r'Batches differ: \(2, .*\(3, '):
    similarity_distance(normal(0, 2, 4, 5, 6), normal(0, 3, 4, 5, 6))


def test_the_method_adds_its_taps():
  student, teacher = (
    {
      'logits': normal(seed, 5, 16, 16, 3),
      'features': {
        'aspp': normal(seed, 5, size, size, 4),
        'decoder': normal(seed + 1, 5, 8, 8, 3),
      },
    }
    for seed, size in ((0, 4), (2, 2))
  )
  labels = np.full((5, 16, 16), 255, np.uint8)
  method = attnfd_jax.make_method('sp', student, teacher)
  arguments = student, teacher, labels
  loss, terms = method.apply({}, *arguments, train=True, step=0)
  pair = (side['features']['aspp'] for side in (student, teacher))
  np.testing.assert_allclose(loss, similarity_distance(*pair), rtol=1e-6)
  assert loss.shape == () and not terms
  method = method.clone(taps=('aspp', 'decoder'))
  both, terms = method.apply({}, *arguments, train=True, step=0)
  np.testing.assert_allclose(terms['aspp'], loss, rtol=1e-6)
  np.testing.assert_allclose(both, sum(terms.values()), rtol=1e-6)


def test_the_teacher_is_a_constant():
  s, t = normal(0, 5, 4, 5, 6), normal(1, 5, 4, 5, 6)
  grads = jax.grad(lambda t: similarity_distance(s, t).sum())(t)
  np.testing.assert_array_equal(grads, 0)
