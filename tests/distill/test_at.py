# SPDX-License-Identifier: Apache-2.0
"""Attention transfer against NumPy in float64."""

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill.at import attention_distance
from attnfd_jax.errors import InputError

STUDENT, TEACHER = (3, 4, 5, 6), (3, 4, 5, 9)
PIXELS = 20


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit_attention(x, axes):
  v = np.mean(x.astype(np.float64) ** 2, -1)
  return v / np.sqrt(np.sum(v**2, axes, keepdims=True))


@pytest.fixture
def maps():
  return normal(0, *STUDENT), normal(1, *TEACHER) + 0.5


@pytest.mark.parametrize('scope', ['image', 'column'])
def test_value(maps, scope):
  axes = {'image': (1, 2), 'column': 1}[scope]
  ours, theirs = (unit_attention(x, axes) for x in maps)
  square = (ours - theirs) ** 2
  found = attention_distance(*maps, norm_scope=scope)
  np.testing.assert_allclose(found, square.mean((1, 2)), rtol=1e-6, atol=1e-8)
  found = attention_distance(*maps, norm_scope=scope, distance='norm')
  np.testing.assert_allclose(found, square.sum((1, 2)) ** 0.5, rtol=1e-6)
  if scope == 'image':
    cosine = np.sum(ours * theirs, (1, 2))
    np.testing.assert_allclose(
      attention_distance(*maps), (2 - 2 * cosine) / PIXELS, rtol=1e-5
    )


# Also where squares of float32 vanish or overflow.
@pytest.mark.parametrize('factor', [-3.0, 1e-9, 1e15])
def test_factors_and_rotations_of_channels_change_nothing(maps, factor):
  student, teacher = maps
  expected = attention_distance(student, teacher)
  rotation = np.linalg.qr(normal(2, 6, 6))[0]
  for changed in (
    np.float32(factor) * student,
    student[..., ::-1],
    student @ rotation,
  ):
    found = attention_distance(changed, teacher)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_bound():
  # Each is strong where the other is zero.
  student = np.zeros(STUDENT, np.float32)
  teacher = np.zeros(TEACHER, np.float32)
  student[:, 0], teacher[:, 1] = 1, 2
  found = attention_distance(student, teacher)
  np.testing.assert_allclose(found, 2 / PIXELS, rtol=1e-6)
  found = attention_distance(student, teacher, distance='norm')
  np.testing.assert_allclose(found, 2**0.5, rtol=1e-6)


@pytest.mark.parametrize('distance', ['mean_square', 'norm'])
def test_equal_and_empty_maps(distance):
  def loss(student, teacher):
    return attention_distance(student, teacher, distance=distance).sum()

  x, zeros = normal(0, *STUDENT), np.zeros(STUDENT, np.float32)
  for pair in ((x, x), (zeros, zeros)):
    value, grads = jax.value_and_grad(loss)(*pair)
    assert value == 0
    np.testing.assert_array_equal(grads, 0)
  _, grads = jax.value_and_grad(loss)(zeros, x)
  np.testing.assert_array_equal(grads, 0)


def outputs(seed, **maps):
  features = {
    tap: normal(seed + i, 2, *shape)
    for i, (tap, shape) in enumerate(maps.items())
  }
  return {'logits': normal(seed, 2, 16, 16, 3), 'features': features}


LABELS = np.full((2, 16, 16), 255, np.uint8)


def run(method, student, teacher):
  return method.apply({}, student, teacher, LABELS, train=True, step=0)


def test_the_method_adds_its_taps_and_matches_sizes():
  student = outputs(0, aspp=(4, 4, 5), decoder=(8, 8, 6))
  teacher = outputs(5, aspp=(4, 4, 7), decoder=(4, 4, 3))
  method = attnfd_jax.make_method('at', student, teacher)
  loss, terms = run(method, student, teacher)
  maps = student['features']['aspp'], teacher['features']['aspp']
  expected = attention_distance(*maps)
  assert loss.count == 2 and not terms
  np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-6)
  taps = ('aspp', 'decoder')
  with pytest.raises(InputError, match="'decoder': .*8.*match_size to 'to_te"):
    attnfd_jax.make_method('at', student, teacher, taps=taps)
  for match_size in ('to_teacher', 'to_student'):
    method = attnfd_jax.make_method(
      'at', student, teacher, taps=taps, match_size=match_size
    )
    loss, terms = run(method, student, teacher)
    np.testing.assert_allclose(loss.value, sum(terms.values()), rtol=1e-6)
    np.testing.assert_allclose(terms['aspp'], expected.mean(), rtol=1e-6)
    assert (
      0
      < terms['decoder']
      < 2 / {'to_teacher': 16, 'to_student': 64}[match_size]
    )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'taps': ()}, 'at: taps=.* must be names of maps'),
    ({'taps': 'aspp'}, "at: taps='aspp' must be names of maps"),
    ({'taps': ('encoder',)}, 'student has aspp, the teacher aspp'),
    ({'match_size': 'yes'}, "match_size='yes' must be one of none, to_teacher"),
    ({'distance': 'l1'}, "distance='l1' must be one of mean_square, norm"),
    ({'norm_scope': 'row'}, "norm_scope='row' must be one of image, column"),
  ],
)
def test_wrong_options(options, message):
  sides = outputs(0, aspp=(4, 4, 5)), outputs(1, aspp=(4, 4, 5))
  with pytest.raises(InputError, match=message):
    attnfd_jax.make_method('at', *sides, **options)


def test_the_teacher_is_a_constant():
  s, t = normal(0, *STUDENT), normal(1, *STUDENT)
  grads = jax.grad(lambda t: attention_distance(s, t).sum())(t)
  np.testing.assert_array_equal(grads, 0)
