# SPDX-License-Identifier: Apache-2.0
"""What holds for each method of the registry, with its defaults.

Maps are those of DeepLabV3+ at output stride 8, with fewer channels in the
student. A method that needs more says so in EXTRA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.devices import sharding
from attnfd_jax.losses import Mean
from attnfd_jax.models.deeplab import RAW_TAPS

BATCH, HEIGHT, WIDTH, CLASSES = 4, 32, 48, 5
# Tap -> stride, and channels of the student and of the teacher.
TAPS = {'backbone': (8, 6, 10), 'aspp': (8, 4, 8), 'decoder': (4, 5, 8)}


def with_raw_taps(student, teacher):
  """Both with the maps of DeepLabV3Plus.extra_taps, and the teacher's norms."""
  generator = np.random.default_rng(7)
  scale = jnp.max(jnp.abs(student['logits'])) > 0  # Zeros stay zeros.
  found = []
  for outputs, channels in ((student, 5), (teacher, 8)):
    shape = (len(RAW_TAPS), BATCH, 4, 6, channels)
    maps = np.float32(generator.normal(size=shape)) * np.float32(scale)
    raw = dict(zip(RAW_TAPS, maps, strict=True))
    norm = {'scale': np.ones(channels, np.float32)}
    norm['bias'] = np.linspace(-1, 1, channels, dtype=np.float32)
    norms = {tap: dict(norm) for tap in RAW_TAPS}
    features = {**outputs['features'], **raw}
    found.append({**outputs, 'features': features, 'norms': norms})
  return found


# Method -> function of (student, teacher), which returns both with what else
# the method needs, e.g. further taps.
EXTRA = {'ofd': with_raw_taps}
# Method -> options, where it cannot be used by its defaults alone.
OPTIONS = {'pseudo': {'everywhere': True, 'min_confidence': 0.5}}
# Methods that depend on the labels.
LOOK_AT_LABELS = ('cirkd', 'ifv')

each_method = pytest.mark.parametrize('name', sorted(attnfd_jax.METHODS))


def make_outputs(seed, role, draw):
  """Outputs of one network; `draw` is (generator, shape) -> array."""
  generator = np.random.default_rng(seed)
  draw = functools.partial(draw, generator)
  column = ('student', 'teacher').index(role)
  features = {
    tap: draw((BATCH, HEIGHT // stride, WIDTH // stride, channels[column]))
    for tap, (stride, *channels) in TAPS.items()
  }
  return {
    'logits': draw((BATCH, HEIGHT, WIDTH, CLASSES)),
    'coarse_logits': draw((BATCH, HEIGHT // 4, WIDTH // 4, CLASSES)),
    'features': features,
  }


def normal(generator, shape):
  # Images differ in strength, as on no device they should in the mean.
  scale = 1 + np.arange(shape[0]).reshape(-1, 1, 1, 1)
  return (scale * generator.normal(size=shape)).astype(np.float32)


def zeros(generator, shape):
  del generator
  return np.zeros(shape, np.float32)


def make_pair(name, draw=normal, roles=('student', 'teacher'), seeds=(0, 1)):
  pair = [
    make_outputs(seed, role, draw)
    for seed, role in zip(seeds, roles, strict=True)
  ]
  return EXTRA[name](*pair) if name in EXTRA else pair


def make_labels():
  """Blocks of pixels of a class each, some of them ignored."""
  generator = np.random.default_rng(9)
  values = [*range(CLASSES), 255]
  coarse = generator.choice(values, (BATCH, HEIGHT // 8, WIDTH // 8))
  return coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8)


def make(name, student, teacher):
  """The method, its variables, and a jitted function of all that changes.

  (variables, student, teacher, labels, step) -> (loss, other collections),
  gradients of the variables' params, of the student and of the teacher.
  """
  options = OPTIONS.get(name, {})
  method = attnfd_jax.make_method(name, student, teacher, **options)
  rngs = {'params': jax.random.key(0), 'distill': jax.random.key(1)}
  init = functools.partial(method.init, train=True)
  variables = dict(jax.jit(init)(rngs, student, teacher, make_labels(), step=0))
  params = variables.pop('params', {})

  def loss_fn(params, student, teacher, state, labels, step):
    (loss, terms), state = method.apply(
      {'params': params, **state},
      student,
      teacher,
      labels,
      train=True,
      step=step,
      rngs={'distill': jax.random.key(2)},
      mutable=list(state),
    )
    loss = loss.value if isinstance(loss, Mean) else loss
    return loss, (terms, state)

  grad_fn = jax.value_and_grad(loss_fn, (0, 1, 2), has_aux=True, allow_int=True)
  return jax.jit(grad_fn), params, variables


def run(name, student, teacher, labels=None):
  """Loss, terms, and gradients of params, student and teacher."""
  run_fn, params, state = make(name, student, teacher)
  labels = make_labels() if labels is None else labels
  (loss, (terms, _)), grads = run_fn(params, student, teacher, state, labels, 0)
  return loss, terms, grads


def check_finite(tree):
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.isfinite(np.asarray(leaf, np.float32)).all(), path


@each_method
def test_the_teacher_gets_no_gradient_and_the_student_does(name):
  loss, terms, (_, student, teacher) = run(name, *make_pair(name))
  check_finite((loss, terms, student))
  assert loss.shape == () and loss != 0
  assert max(np.abs(x).max() for x in jax.tree.leaves(student)) > 0
  for leaf in jax.tree.leaves(teacher):
    np.testing.assert_array_equal(leaf, 0)


@each_method
def test_equal_outputs(name):
  pair = make_pair(name, roles=('teacher', 'teacher'), seeds=(1, 1))
  check_finite(run(name, *pair))


@each_method
def test_maps_of_zeros(name):
  check_finite(run(name, *make_pair(name, zeros)))
  # On one side alone.
  student, _ = make_pair(name, zeros)
  _, teacher = make_pair(name)
  check_finite(run(name, student, teacher))


@each_method
def test_bfloat16_maps_are_compared_in_float32(name):
  rounded = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), make_pair(name)
  )
  loss, terms, grads = run(name, *rounded)
  check_finite(grads)
  assert loss.dtype == jnp.float32
  assert all(value.dtype == jnp.float32 for value in terms.values())
  # Of the same values; networks of the method may compute in bfloat16.
  again = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
  expected, _, _ = run(name, *again)
  np.testing.assert_allclose(loss, expected, rtol=0.02, atol=1e-3)


@each_method
def test_unlabeled_images(name):
  labels = np.full((BATCH, HEIGHT, WIDTH), 255, np.uint8)
  found = run(name, *make_pair(name), labels)
  check_finite(found)
  if name not in LOOK_AT_LABELS:
    # An unlabeled image teaches as a labeled one does.
    jax.tree.map(
      np.testing.assert_array_equal, found, run(name, *make_pair(name))
    )


@each_method
def test_one_program_and_one_value_on_several_devices(name):
  mesh = sharding.make_mesh()
  assert mesh.size == 4
  pair, labels = make_pair(name), make_labels()
  run_fn, params, state = make(name, *pair)
  expected = run_fn(params, *pair, state, labels, 0)
  run_fn(params, *pair, state, labels, 1)
  assert run_fn._cache_size() == 1
  # What is no batch of images, such as the norms of OFD, is a vector.
  places = sharding.replicated(mesh), sharding.by_batch(mesh)
  params, state = jax.device_put((params, state), places[0])
  student, teacher, labels = jax.tree.map(
    lambda x: jax.device_put(x, places[x.ndim > 1]), (*pair, labels)
  )
  found = run_fn(params, student, teacher, state, labels, 0)

  # Loss, terms, other collections and gradients, summed in another order. What
  # is 0 but for rounding, as the gradient of a scale that a unit length takes
  # away, is small beside the largest of its kind.
  def largest(tree):
    leaves = [np.abs(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)]
    return max((x.max(initial=0) for x in leaves), default=0)

  kinds = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
  for ours, theirs in kinds:
    least = max(0.1 * largest(theirs), 1e-6)
    for (path, a), b in zip(
      jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
      atol = 1e-5 * max(largest(b), least)
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=str(path))


@each_method
def test_parts_of_a_batch_add_up_to_a_mean(name):
  """Of a method that returns a Mean; statistics of the batch are fixed."""
  pair, labels = make_pair(name), make_labels()
  method = attnfd_jax.make_method(name, *pair, **OPTIONS.get(name, {}))
  rngs = {'params': jax.random.key(0), 'distill': jax.random.key(1)}
  init = functools.partial(method.init, train=False)
  variables = jax.jit(init)(rngs, *pair, labels, step=0)
  rngs = {'distill': jax.random.key(2)}
  run_fn = jax.jit(functools.partial(method.apply, train=False, rngs=rngs))
  whole, _ = run_fn(variables, *pair, labels, step=0)
  if not isinstance(whole, Mean):
    return  # It compares images with each other, or the whole batch.
  parts = []
  for rows in (slice(0, 1), slice(1, BATCH)):
    cut = jax.tree.map(
      lambda x, rows=rows: x[rows] if x.ndim > 1 else x, (*pair, labels)
    )
    parts.append(run_fn(variables, *cut, step=0)[0])
  total, count = jax.tree.map(jnp.add, *parts)
  np.testing.assert_allclose(count, whole.count, rtol=1e-6)
  np.testing.assert_allclose(total, whole.total, rtol=1e-5)
