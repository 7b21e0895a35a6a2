# SPDX-License-Identifier: Apache-2.0
"""LAD, PAD and CAD against NumPy, and against AttnFD's switches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax import distill
from attnfd_jax.distill.raw_features import CAD, LAD, PAD
from attnfd_jax.errors import InputError

TAPS = {'backbone': (4, 5, 6, 7), 'aspp': (4, 5, 6, 8), 'decoder': (4, 8, 9, 8)}
METHODS = {'lad': LAD, 'pad': PAD, 'cad': CAD}
# Axes of [b, h, w, c] along which a vector has length 1, by hand.
AXES = {'lad': (0, 1, 2, 3), 'pad': (3,), 'cad': (1, 2)}
LABELS = np.full((4, 16, 16), 255, np.uint8)
# Running statistics of 0 and 1, and a kernel of 1: all but epsilon.
IDENTITY = (1 + 1e-5) ** 0.5


def make_outputs(seed, dtype=np.float32):
  generator = np.random.default_rng(seed)
  maps = {tap: generator.normal(size=shape) for tap, shape in TAPS.items()}
  logits = np.zeros((4, 16, 16, 3), np.float32)
  features = {tap: x.astype(dtype) for tap, x in maps.items()}
  return {'logits': logits, 'features': features}


def identity(method, student, teacher):
  """Variables whose connectors change nothing when they do not train."""
  init = functools.partial(method.init, train=False, step=0)
  shapes = jax.eval_shape(init, jax.random.key(0), student, teacher, LABELS)

  def fill(path, leaf):
    if leaf.ndim == 4:
      return np.eye(leaf.shape[2], leaf.shape[3], dtype=np.float32)[None, None]
    value = {'scale': IDENTITY, 'var': 1.0}.get(path[-1].key, 0.0)
    return np.full(leaf.shape, value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def run(method, student, teacher, variables=None):
  variables = variables or identity(method, student, teacher)
  call = functools.partial(method.apply, train=False, step=0)
  return jax.jit(call)(variables, student, teacher, LABELS)


def cosines(s, t, axes):
  s, t = s.astype(np.float64), t.astype(np.float64)
  lengths = np.sqrt(np.sum(s * s, axes) * np.sum(t * t, axes))
  return np.sum(s * t, axes) / lengths


@pytest.mark.parametrize('name', METHODS)
def test_closed_form(name, x64):
  loss32, terms32 = run(METHODS[name](), make_outputs(0), make_outputs(1))
  student, teacher = (make_outputs(i, np.float64) for i in range(2))
  with x64():  # Else the order of a CPU's float32 sums would be compared.
    variables = identity(METHODS[name](), student, teacher)
    variables = jax.tree.map(np.float64, variables)
    loss, terms = run(METHODS[name](), student, teacher, variables)
  expected = {
    tap: np.mean(2 - 2 * cosines(x, teacher['features'][tap], AXES[name]))
    for tap, x in student['features'].items()
  }
  assert loss.dtype == jnp.float64 and set(terms) == set(expected)
  for tap, value in expected.items():
    np.testing.assert_allclose(terms[tap], value, rtol=1e-6)
    np.testing.assert_allclose(terms32[tap], value, rtol=1e-5)
  np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-6)
  # What users get; the order of the sums depends on the CPU.
  assert loss32.dtype == jnp.float32
  np.testing.assert_allclose(loss32, loss, rtol=1e-5)


@pytest.mark.parametrize('name', METHODS)
def test_only_its_own_units_may_be_scaled(name):
  student, teacher = make_outputs(0), make_outputs(1)
  before, _ = run(METHODS[name](), student, teacher)
  generator = np.random.default_rng(2)

  def scaled(axes):
    def scale(x):
      shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
      return x * generator.uniform(0.5, 3, shape).astype(np.float32)

    features = jax.tree.map(scale, teacher['features'])
    return run(METHODS[name](), student, teacher | {'features': features})[0]

  for other, axes in AXES.items():
    # One factor for the whole batch changes none of them.
    if set(axes) >= set(AXES[name]):
      np.testing.assert_allclose(scaled(axes), before, rtol=1e-5)
    else:
      assert abs(scaled(axes) - before) > 1e-3, other


@pytest.mark.parametrize('name', METHODS)
def test_bounds(name):
  student = make_outputs(0)
  for factor, expected in ((2.0, 0.0), (-2.0, 12.0)):
    features = {k: factor * x for k, x in student['features'].items()}
    teacher = student | {'features': features}
    loss, _ = run(METHODS[name](), student, teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize('name', METHODS)
def test_it_is_attnfd_without_attention(name, fill):
  student, teacher = make_outputs(0), make_outputs(1)
  features = {
    tap: np.concatenate([x, x[..., :2] ** 2], -1)
    for tap, x in teacher['features'].items()
  }
  teacher = teacher | {'features': features}  # Other channels.
  scope = {'lad': 'batch', 'pad': 'pixel', 'cad': 'channel'}[name]
  switches = {
    'norm_scope': scope,
    'teacher_attention': 'none',
    'student_attention': 'none',
  }
  ours = METHODS[name]()
  theirs = distill.METHODS['attnfd'](**switches)
  init = functools.partial(ours.init, train=True, step=0)
  shapes = jax.eval_shape(init, jax.random.key(0), student, teacher, LABELS)
  variables = fill(shapes)

  def call(method):
    return jax.jit(
      functools.partial(
        method.apply, train=True, step=0, mutable=['batch_stats']
      )
    )(variables, student, teacher, LABELS)

  jax.tree.map(np.testing.assert_array_equal, call(ours), call(theirs))


def test_the_authors_divide_by_the_images_of_the_whole_batch():
  student, teacher = make_outputs(0), make_outputs(1)
  groups = {'lad': {'reduction': 'batchmean'}}
  whole = distill.make_distiller('lad', groups)
  variables = identity(LAD(), student, teacher)
  variables = {k: {'methods_lad': x} for k, x in variables.items()}
  losses, _ = whole.apply(
    variables, student, teacher, LABELS, train=False, step=0
  )
  plain, _ = run(LAD(), student, teacher)
  np.testing.assert_allclose(losses['lad'].value, plain / 4, rtol=1e-6)


def test_connectors_have_their_group():
  total = distill.make_distiller('kd+lad', {'lad': {}, 'kd': {}})
  regex, group = total.parameter_groups()[0]
  assert group == 'connectors' and regex.startswith('methods_lad/')
  assert total.connector_schedule == 'always'


def test_what_cannot_be_compared_is_named():
  student, teacher = make_outputs(0), make_outputs(1)
  smaller = {k: x[:, ::2, ::2] for k, x in teacher['features'].items()}
  teacher = teacher | {'features': smaller}
  with pytest.raises(InputError, match="'backbone'.*match_size='to_teacher'"):
    distill.make_method('pad', student, teacher)
  distill.make_method('pad', student, teacher, match_size='to_student')
  with pytest.raises(InputError, match="distill.lad: reduction='mean' must be"):
    distill.make_method('lad', student, teacher, reduction='mean')
