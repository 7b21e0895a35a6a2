# SPDX-License-Identifier: Apache-2.0
"""DSD against NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax import distill
from attnfd_jax.distill import dsd
from attnfd_jax.errors import InputError
from attnfd_jax.models import resizing

EXACT = {'rtol': 1e-9, 'atol': 1e-14}
CLOSE = {'rtol': 2e-5, 'atol': 1e-9}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def make_maps(seed, channels=(3, 4, 5), size=(5, 6)):
  return [normal(seed + 100 * i, 2, *size, c) for i, c in enumerate(channels)]


def direction(x):
  return x / np.linalg.norm(x)


def plain_residuals(maps):
  """[b, pairs, n]."""
  found = []
  for images in zip(*maps, strict=True):
    a = [direction((x**2).mean(-1).reshape(-1)) for x in images]
    pairs = [(n, m) for m in range(len(a)) for n in range(m)]
    found.append([direction(a[m] - a[n]) for n, m in pairs])
  return np.array(found)


@pytest.mark.parametrize('count', [2, 3, 4])
def test_pixels_against_numpy(x64, count):
  students = make_maps(0, (3, 4, 5, 2)[:count])
  teachers = make_maps(1, (7, 4, 2, 3)[:count])
  with x64():
    found = dsd.pixel_distance(students, teachers)
  difference = plain_residuals(students) - plain_residuals(teachers)
  assert difference.shape == (2, count * (count - 1) // 2, 30)
  np.testing.assert_allclose(found, (difference**2).mean((1, 2)), **EXACT)


def test_smaller_maps_are_resized_to_the_largest(x64):
  students = [normal(0, 2, 3, 3, 4), normal(1, 2, 5, 6, 4)]
  teachers = [normal(2, 2, 3, 3, 2), normal(3, 2, 5, 6, 2)]

  def enlarged(maps):
    energy = (maps[0] ** 2).mean(-1, keepdims=True)
    # Back to a map of one channel, whose energy it is.
    return [np.sqrt(resizing.resize(energy, 5, 6)), maps[1]]

  with x64():
    found = dsd.pixel_distance(students, teachers)
    sides = [enlarged(maps) for maps in (students, teachers)]
  difference = plain_residuals(sides[0]) - plain_residuals(sides[1])
  np.testing.assert_allclose(found, (difference**2).mean((1, 2)), **EXACT)


def plain_similarity(logits, temperature, pool):
  found = []
  for image in logits:
    h, w, k = image.shape
    cells = [
      image[i : i + pool, j : j + pool].mean((0, 1)) / temperature
      for i in range(0, h, pool)
      for j in range(0, w, pool)
    ]
    p = np.exp(np.array(cells))
    p /= p.sum(0)
    found.append([[p[:, i] @ p[:, j] for j in range(k)] for i in range(k)])
  return np.array(found)


@pytest.mark.parametrize(
  ('size', 'temperature', 'pool'),
  [((5, 6), 4.0, 2), ((4, 4), 1.0, 1), ((7, 5), 2.0, 3), ((2, 3), 4.0, 5)],
)
def test_categories_against_numpy(x64, size, temperature, pool):
  s, t = (3 * normal(i, 2, *size, 4) for i in (0, 1))
  with x64():
    found = dsd.category_distance(s, t, temperature=temperature, pool=pool)
  difference = plain_similarity(s, temperature, pool)
  difference -= plain_similarity(t, temperature, pool)
  np.testing.assert_allclose(found, (difference**2).mean((1, 2)), **EXACT)


def test_what_changes_nothing(x64):
  students, teachers = make_maps(0), make_maps(1)
  s, t = (3 * normal(i, 2, 5, 6, 4) for i in (0, 1))
  options = {'temperature': 4.0, 'pool': 2}
  with x64():
    expected = dsd.pixel_distance(students, teachers)
    assert (expected > 1e-4).all()
    for i in range(3):
      scaled = [*students]
      scaled[i] = -2.5 * scaled[i]
      found = dsd.pixel_distance(scaled, teachers)
      np.testing.assert_allclose(found, expected, **EXACT)
    expected = dsd.category_distance(s, t, **options)
    assert (expected > 1e-9).all()
    shifted = s + normal(5, 2, 1, 1, 4)
    found = dsd.category_distance(shifted, t, **options)
    np.testing.assert_allclose(found, expected, **EXACT)
    # Both are 0 at equality, also up to what changes nothing.
    found = dsd.pixel_distance(students, [2 * x for x in students])
    np.testing.assert_allclose(found, 0, atol=1e-20)
    found = dsd.category_distance(shifted, s, **options)
    np.testing.assert_allclose(found, 0, atol=1e-20)


def test_equal_attention_has_no_direction():
  """0 / 0 of the published form: finite, and no gradient where all are 0."""
  x = normal(0, 2, 4, 4, 3).astype(np.float32)
  teachers = [y.astype(np.float32) for y in make_maps(1, (3, 3), (4, 4))]
  for students in ([x, x], [x, 3 * x], [0 * x, 0 * x], [0 * x, x]):
    for targets in (teachers, students):
      value, grads = jax.value_and_grad(
        lambda maps, t=targets: jnp.sum(dsd.pixel_distance(maps, t))
      )(students)
      assert np.isfinite(value)
      if students[1] is not x:
        # Of one direction up to rounding, which is none.
        for leaf in (*grads, *dsd.residual_attention(students)):
          np.testing.assert_array_equal(leaf, 0)
      assert all(np.isfinite(g).all() for g in grads)


# The method.


def make_outputs(seed, channels=5, dtype=np.float32):
  maps = {'aspp': (3, 3), 'decoder': (5, 5)}
  return {
    'logits': normal(seed, 2, 17, 17, 4).astype(dtype),
    'coarse_logits': normal(seed + 50, 2, 5, 5, 4).astype(dtype),
    'features': {
      tap: normal(seed + len(tap), 2, *size, channels).astype(dtype)
      for tap, size in maps.items()
    },
  }


LABELS = np.full((2, 17, 17), 255, np.uint8)


def run(method, *outputs):
  labels = LABELS[: len(outputs[0]['logits'])]
  apply = functools.partial(method.apply, {}, train=True, step=0)
  return jax.jit(apply)(*outputs, labels)


def test_the_method():
  assert distill.WEIGHTS['dsd'] == 1
  outputs = make_outputs(0), make_outputs(1, 7)
  method = distill.make_method('dsd', *outputs)
  (total, count), terms = run(method, *outputs)
  maps = [
    [*(x['features'][tap] for tap in ('aspp', 'decoder')), x['coarse_logits']]
    for x in outputs
  ]
  expected = {
    'pixel': np.mean(dsd.pixel_distance(*maps)),
    'category': np.mean(
      dsd.category_distance(maps[0][2], maps[1][2], temperature=4.0, pool=2)
    ),
  }
  assert count == 2 and set(terms) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, **CLOSE)
  expected = 1000 * expected['pixel'] + 10 * expected['category']
  np.testing.assert_allclose(total / count, expected, **CLOSE)


def test_a_weight_of_zero_leaves_a_term_out():
  outputs = make_outputs(0), make_outputs(1)
  loss, terms = run(dsd.DSD(category_weight=0.0), *outputs)
  assert set(terms) == {'pixel'}
  np.testing.assert_allclose(loss.value, 1000 * terms['pixel'], **CLOSE)
  # Logits alone need no map.
  bare = [x | {'features': {}} for x in outputs]
  loss, terms = run(dsd.DSD(pixel_weight=0.0), *bare)
  assert set(terms) == {'category'}
  np.testing.assert_allclose(loss.value, 10 * terms['category'], **CLOSE)


def test_parts_of_a_batch_add_up():
  outputs = make_outputs(0), make_outputs(1)
  whole, _ = run(dsd.DSD(), *outputs)
  parts = [
    run(dsd.DSD(), *jax.tree.map(lambda x, i=i: x[i : i + 1], outputs))[0]
    for i in range(2)
  ]
  found = sum(x.total for x in parts) / sum(x.count for x in parts)
  np.testing.assert_allclose(found, whole.value, **CLOSE)


def test_bfloat16_and_the_teacher():
  outputs = [make_outputs(i, dtype=jnp.bfloat16) for i in (0, 1)]

  def loss_fn(*outputs):
    return run(dsd.DSD(), *outputs)[0].value

  value, grads = jax.value_and_grad(loss_fn, (0, 1))(*outputs)
  assert value.dtype == jnp.float32
  assert all((x == 0).all() for x in jax.tree.leaves(grads[1]))
  for tap in ('aspp', 'decoder'):
    assert np.abs(grads[0]['features'][tap]).max() > 0


def test_what_is_refused():
  student, teacher = make_outputs(0), make_outputs(1)
  other = teacher | {'features': {'aspp': np.ones((2, 4, 4, 5), np.float32)}}
  with pytest.raises(InputError, match="differ in size at 'aspp'.*match_size"):
    distill.make_method('dsd', student, other)
  other = {'logits': teacher['logits'][..., :2], 'features': {}}
  with pytest.raises(InputError, match='Logits differ.*the same classes'):
    distill.make_method('dsd', student, other)
  other = teacher | {'features': {}}
  with pytest.raises(InputError, match='No tap of aspp, decoder is in both'):
    distill.make_method('dsd', student, other)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'pixel_weight': -1.0}, 'pixel_weight=-1.0 must be 0 or more'),
    ({'temperature': 0.0}, 'temperature=0.0 must be from'),
    ({'pool': 0}, 'pool=0 must be from 1'),
    ({'match_size': 'both'}, "match_size='both' must be one of none, to_t"),
    (
      {'pixel_weight': 0.0, 'category_weight': 0.0},
      'pixel_weight or category_weight must be above 0',
    ),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(InputError, match=message):
    dsd.DSD(**options)
