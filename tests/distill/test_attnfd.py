# SPDX-License-Identifier: Apache-2.0
"""AttnFD: the closed form, its gradient, and who gets one."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.devices import sharding
from attnfd_jax.distill.attnfd import AttnFD, attnfd_loss, direction_distance
from attnfd_jax.models.attention import CBAM

# Sums of some hundred float32 products.
CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
# METHOD section 1: what the reference computes.
REFERENCE = {'norm_scope': 'batch', 'reduction': 'batchmean'}
SHAPE = (3, 4, 5, 6)
AXES = ('batch', 'image', 'pixel', 'channel')


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cosine(a, b):
  a, b = (x.astype(np.float64).reshape(-1) for x in (a, b))
  return a @ b / np.sqrt((a @ a) * (b @ b))


def distance(student, teacher, **options):
  return direction_distance(student, teacher, **(REFERENCE | options))


# The distance of two maps.


def test_closed_form():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  t = t + 0.5 * s
  loss = distance(s, t)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, (2 - 2 * cosine(s, t)) / 3, **CLOSE)


def test_the_second_map_is_a_constant():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  np.testing.assert_array_equal(jax.grad(distance, argnums=1)(s, t), 0)


def test_gradient_formula():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  grads = np.asarray(jax.grad(distance)(s, t), np.float64)
  length = np.sqrt(np.sum(s.astype(np.float64) ** 2))
  cos = cosine(s, t)
  unit_s, unit_t = s / length, t / np.sqrt(np.sum(t**2))
  expected = -2 / (3 * length) * (unit_t - cos * unit_s)
  np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-7)
  # Orthogonal to the map, of length 2 sin / (b |s|).
  np.testing.assert_allclose(np.sum(grads * unit_s), 0, rtol=0, atol=1e-7)
  expected = 2 * np.sqrt(1 - cos**2) / (3 * length)
  np.testing.assert_allclose(np.sqrt(np.sum(grads**2)), expected, **CLOSE)


@pytest.mark.parametrize('scope', AXES)
def test_positive_scaling_changes_nothing(scope):
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  f = jax.jit(functools.partial(distance, norm_scope=scope))
  loss = f(s, t)
  for factor in (1e-4, 0.3, 1e4):
    np.testing.assert_allclose(f(factor * s, t), loss, **CLOSE)
    np.testing.assert_allclose(f(s, factor * t), loss, **CLOSE)


def test_bounds():
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  # Squared rounding of some hundred elements.
  np.testing.assert_allclose(distance(s, 3 * s), 0, rtol=0, atol=1e-12)
  np.testing.assert_allclose(distance(s, -3 * s), 4 / 3, **CLOSE)
  assert 0.01 < distance(s, t) < 4 / 3
  # Parallel pixel by pixel is not parallel as a whole.
  uneven = s * (1 + np.arange(3, dtype=np.float32))[:, None, None, None]
  assert distance(s, uneven) > 0.01


@pytest.mark.parametrize('reduction', ['batchmean', 'unitmean', 'mean'])
@pytest.mark.parametrize('scope', AXES)
def test_scopes_and_reductions(scope, reduction):
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  s, t = s + 1, t - np.arange(6, dtype=np.float32)
  b, h, w, c = SHAPE
  cosines = {
    'batch': [cosine(s, t)],
    'image': [cosine(s[i], t[i]) for i in range(b)],
    'pixel': [cosine(s[i], t[i]) for i in np.ndindex(b, h, w)],
    'channel': [
      cosine(s[i, ..., j], t[i, ..., j]) for i, j in np.ndindex(b, c)
    ],
  }[scope]
  total = sum(2 - 2 * cos for cos in cosines)
  expected = {
    'batchmean': total / b,
    'unitmean': total / len(cosines),
    'mean': total / s.size,
  }[reduction]
  actual = distance(s, t, norm_scope=scope, reduction=reduction)
  np.testing.assert_allclose(actual, expected, **CLOSE)


@pytest.mark.parametrize('scope', AXES)
def test_maps_of_zeros_are_finite(scope):
  grad_fn = jax.jit(
    jax.value_and_grad(
      functools.partial(distance, norm_scope=scope, reduction='unitmean')
    )
  )
  s, t = normal(0, *SHAPE), normal(1, *SHAPE)
  zeros = np.zeros_like(s)
  # A map without direction is at distance 1 from every direction.
  for pair in ((zeros, t), (s, zeros)):
    loss, grads = grad_fn(*pair)
    np.testing.assert_allclose(loss, 1, **CLOSE)
    # Up to rounding no direction is nearer to it than another.
    np.testing.assert_allclose(grads, 0, rtol=0, atol=1e-6)
  loss, grads = grad_fn(zeros, zeros)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0)
  s[1] = 0
  loss, grads = grad_fn(s, t)
  assert np.isfinite(loss) and np.isfinite(grads).all()
  if scope != 'batch':
    np.testing.assert_array_equal(grads[1], 0)


def test_distance_derivative_is_that_of_finite_differences(x64):
  s, t = (
    normal(0, 2, 2, 3, 2).astype(float),
    normal(1, 2, 2, 3, 2).astype(float),
  )
  with x64():
    for scope in AXES:
      f = jax.jit(lambda s, scope=scope: distance(s, t, norm_scope=scope))
      # Central differences in float64; short pixels bend most.
      check_grads(f, (s,), 1, ('rev',), rtol=1e-5, atol=1e-7)


# The module.

# Any taps will do; two compile faster than three.
STUDENT = {'aspp': 4, 'decoder': 5}
TEACHER = {'aspp': 7, 'decoder': 5}
SIZES = {'aspp': (3, 4), 'decoder': (5, 6)}


def make_maps(seed, channels, batch=4, sizes=SIZES):
  # Away from zero: a map of zero mean hides its gates.
  return {
    tap: 0.3 + normal(seed + i, batch, *sizes[tap], channels[tap])
    for i, tap in enumerate(sorted(channels))
  }


def make(fill, batch=4, student=STUDENT, teacher=TEACHER, **options):
  """Module, params, state and both sets of maps."""
  module = AttnFD(student, teacher, **options)
  maps = make_maps(10, student, batch), make_maps(20, teacher, batch)
  init = functools.partial(module.init, train=False)
  variables = dict(fill(jax.eval_shape(init, jax.random.key(0), *maps)))
  params = variables.pop('params')
  return module, params, variables, *maps


def loss_fn(module, train, params, student, teacher, state):
  return attnfd_loss(
    params, state, student, teacher, distiller=module, train=train
  )


# Compiled once per module and mode: tests with equal modules share it.
_loss = jax.jit(loss_fn, static_argnums=(0, 1))
_grad = jax.jit(
  jax.value_and_grad(loss_fn, (2, 3, 4), has_aux=True), static_argnums=(0, 1)
)


def run(module, params, state, student, teacher, *, train=True):
  """loss and aux."""
  return _loss(module, train, params, student, teacher, state)


def run_grad(module, params, state, student, teacher):
  """(loss, aux), gradients of params, student maps and teacher maps."""
  return _grad(module, True, params, student, teacher, state)


# Compared with NumPy in tests/models/test_attention.py.
refine = jax.jit(CBAM().apply, static_argnames='train')


def check_same(actual, expected, rtol=1e-4, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )


def numpy_norm(x, params):
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']


def test_loss_by_hand(fill):
  module, params, state, student, teacher = make(
    fill, student_attention='learnable', teacher_attention='random', **REFERENCE
  )
  loss, aux = run(module, params, state, student, teacher)
  assert loss.dtype == jnp.float32
  terms = {}
  for tap in STUDENT:
    gate = {
      'params': params[f'student_gates_{tap}'],
      'batch_stats': state['batch_stats'][f'student_gates_{tap}'],
    }
    s = np.asarray(refine(gate, student[tap], train=True))
    connector = params[f'connectors_{tap}']['conv_norm']
    s = numpy_norm(s @ connector['conv']['kernel'][0, 0], connector['bn'])
    gate = {part: state['teacher'][part][tap] for part in state['teacher']}
    t = np.asarray(refine(gate, teacher[tap], train=False))
    terms[tap] = (2 - 2 * cosine(s, t)) / 4
  assert set(aux['terms']) == set(terms)
  for tap, expected in terms.items():
    np.testing.assert_allclose(aux['terms'][tap], expected, **CLOSE)
  np.testing.assert_allclose(loss, sum(terms.values()), **CLOSE)


def test_random_maps_start_at_half_the_largest_value(key):
  taps = ('backbone', 'aspp', 'decoder')
  ours, theirs = dict.fromkeys(taps, 32), dict.fromkeys(taps, 64)
  module = AttnFD(ours, theirs, teacher_attention='parameter_free', **REFERENCE)
  sizes = dict.fromkeys(taps, (9, 9))
  student = make_maps(0, ours, 6, sizes)
  teacher = make_maps(5, theirs, 6, sizes)

  @jax.jit
  def loss(key):
    variables = dict(module.init(key, student, teacher, train=False))
    params = variables.pop('params')
    return attnfd_loss(
      params, variables, student, teacher, distiller=module, train=True
    )[0]

  # METHOD section 1: 2.0 with lambda 2 and 6 images. A cosine of 3 times 31104
  # independent pairs deviates by about 0.004.
  np.testing.assert_allclose(2 * loss(key), 2, rtol=0.02, atol=0)


@pytest.mark.parametrize(
  'attention', ['checkpoint', 'random', 'parameter_free']
)
def test_teacher_has_no_gradient_and_never_changes(fill, attention):
  module, params, state, student, teacher = make(
    fill, teacher_attention=attention, teacher_bn='batch'
  )
  assert ('teacher' in state) == (attention != 'parameter_free')
  assert not any('teacher' in name for name in params)
  (_, aux), (_, student_grads, teacher_grads) = run_grad(
    module, params, state, student, teacher
  )
  for tap in TEACHER:
    np.testing.assert_array_equal(teacher_grads[tap], 0)
    assert np.abs(student_grads[tap]).max() > 0
  assert set(aux['state']) == set(state)
  for name in set(state) - {'batch_stats'}:
    jax.tree.map(np.testing.assert_array_equal, aux['state'][name], state[name])


def test_fresh_teacher_gates_differ_by_tap(key):
  channels = dict.fromkeys(('aspp', 'decoder'), 16)
  module = AttnFD(channels, channels, teacher_attention='random')
  maps = {tap: jnp.zeros((1, 2, 2, 16)) for tap in channels}
  init = jax.jit(functools.partial(module.init, train=False))
  gates = init(key, maps, maps)['teacher']['params']
  kernels = [gates[tap]['spatial_conv']['kernel'] for tap in channels]
  assert np.abs(kernels[0]).max() > 0
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_stored_gates_replace_the_teachers(fill):
  module, params, state, student, teacher = make(
    fill, teacher_attention='checkpoint'
  )
  gates = fill(state['teacher'], seed=9)
  expected = {
    tap: refine(
      {part: gates[part][tap] for part in gates}, teacher[tap], train=False
    )
    for tap in TEACHER
  }
  variables = {'params': params, **state, 'teacher': gates}
  _, refined = jax.jit(
    functools.partial(module.apply, train=False, method='refined_maps')
  )(variables, student, teacher)
  check_same(refined, expected)
  before, _ = run(module, params, state, student, teacher)
  state = state | {'teacher': gates}
  after, _ = run(module, params, state, student, teacher)
  assert abs(after - before) > 1e-4


def test_teacher_statistics(fill):
  options = {'teacher_attention': 'random', 'student_attention': 'none'}
  losses = {}
  for bn in ('running', 'batch'):
    module, *arguments = make(fill, teacher_bn=bn, **options)
    for train in (False, True):
      losses[bn, train], _ = run(module, *arguments, train=train)
  # In evaluation the running ones are used whatever teacher_bn says.
  np.testing.assert_allclose(
    losses['batch', False], losses['running', False], **CLOSE
  )
  assert abs(losses['batch', True] - losses['running', True]) > 1e-5


@pytest.mark.parametrize('attention', ['in_path', 'none'])
def test_maps_can_go_in_as_they_are(fill, attention):
  module, params, state, student, teacher = make(
    fill, teacher_attention=attention, student_attention='none'
  )
  assert all(name.startswith('connectors_') for name in params)
  ours, theirs = module.apply(
    {'params': params, **state},
    student,
    teacher,
    train=False,
    method='refined_maps',
  )
  jax.tree.map(np.testing.assert_array_equal, ours, student)
  jax.tree.map(np.testing.assert_array_equal, theirs, teacher)


@pytest.mark.parametrize(
  'frozen', [False, True], ids=['learnable', 'mlp_frozen']
)
def test_gradients_of_the_student_gates(fill, frozen):
  module, *arguments = make(
    fill, student_attention='mlp_frozen' if frozen else 'learnable'
  )
  _, (grads, _, _) = run_grad(module, *arguments)
  for tap in STUDENT:
    assert (
      np.abs(grads[f'connectors_{tap}']['conv_norm']['bn']['scale']).max() > 0
    )
    gate = dict(grads[f'student_gates_{tap}'])
    assert np.abs(gate['spatial_conv']['kernel']).max() > 0
    mlp = {name: gate[name] for name in gate if name.startswith('mlp_')}
    assert len(mlp) == 4
    for name, grad in mlp.items():
      if frozen:
        np.testing.assert_array_equal(grad, 0)
      elif name == 'mlp_expand_bias':
        assert np.abs(grad).max() > 0


def test_derivative_is_that_of_finite_differences(fill, x64):
  channels = {'aspp': 3}
  module, params, state, student, teacher = make(
    fill, 2, channels, {'aspp': 2}, teacher_attention='random', **REFERENCE
  )
  params, state, student, teacher = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, state, student, teacher)
  )

  @jax.jit
  def loss(params, student):
    return attnfd_loss(
      params, state, student, teacher, distiller=module, train=True
    )[0]

  with x64():
    # Only by bad luck would a maximum or ReLU change sides within a step.
    check_grads(loss, (params, student), 1, ('rev',), rtol=1e-5, atol=1e-7)


def test_only_training_moves_running_statistics(fill):
  module, params, state, student, teacher = make(fill)
  _, aux = run(module, params, state, student, teacher, train=False)
  jax.tree.map(np.testing.assert_array_equal, aux['state'], state)
  _, aux = run(module, params, state, student, teacher, train=True)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0,
    aux['state']['batch_stats'],
    state['batch_stats'],
  )
  assert jax.tree.all(moved)


def test_batch_over_devices_equals_one_device(fill):
  mesh = sharding.make_mesh()
  assert mesh.size > 1
  module, params, state, student, teacher = make(
    fill, 2 * mesh.size, teacher_attention='random', teacher_bn='batch'
  )
  # Devices with other lengths and means than their neighbors.
  scale = 1 + np.arange(2 * mesh.size, dtype=np.float32)[:, None, None, None]
  student, teacher = jax.tree.map(lambda x: x * scale, (student, teacher))
  expected = run_grad(module, params, state, student, teacher)
  placed = jax.device_put((params, state), sharding.replicated(mesh))
  maps = jax.device_put((student, teacher), sharding.by_batch(mesh))
  assert len(maps[0]['aspp'].sharding.device_set) == mesh.size
  # Value, gradients and running statistics, summed in another order.
  check_same(run_grad(module, *placed, *maps), expected, rtol=1e-4, atol=1e-5)


def test_vmap_equals_a_loop(fill):
  module, params, state, student, teacher = make(fill)
  students = jax.tree.map(lambda x: np.stack([x, 2 - x[::-1]]), student)
  teachers = jax.tree.map(lambda x: np.stack([x, x * x]), teacher)

  @jax.jit
  def loss(student, teacher):
    return attnfd_loss(
      params, state, student, teacher, distiller=module, train=True
    )

  values, aux = jax.jit(jax.vmap(loss))(students, teachers)
  assert values.shape == (2,)
  for i in range(2):
    pair = jax.tree.map(lambda x, i=i: x[i], (students, teachers))
    expected = loss(*pair)
    actual = jax.tree.map(lambda x, i=i: x[i], (values, aux['terms']))
    check_same(actual, (expected[0], expected[1]['terms']), rtol=1e-5)


def test_bfloat16_maps_give_a_float32_loss(fill):
  module, params, state, student, teacher = make(
    fill, teacher_attention='random'
  )
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teacher))
  (loss, aux), (grads, student_grads, _) = run_grad(
    module, params, state, *rounded
  )
  assert loss.dtype == jnp.float32
  for leaf in jax.tree.leaves((aux, grads)):
    assert leaf.dtype == jnp.float32
  for leaf in student_grads.values():
    assert leaf.dtype == jnp.bfloat16
  # Maps between the gates are rounded, too; lengths and sums are not.
  exact = jax.tree.map(lambda x: x.astype(np.float32), rounded)
  expected, _ = run(module, params, state, *exact)
  np.testing.assert_allclose(loss, expected, rtol=2e-3)


@pytest.mark.parametrize('match', ['to_teacher', 'to_student'])
def test_match_size(fill, match):
  # One channel and no gates: the connector is an affine map, which commutes
  # with interpolation, and a large map is resized to the corners of its cells.
  channels = {'aspp': 3}
  module = AttnFD(
    channels,
    channels,
    teacher_attention='none',
    student_attention='none',
    match_size=match,
    **REFERENCE,
  )
  small, large = normal(0, 2, 3, 4, 3), normal(1, 2, 5, 7, 3)
  student, teacher = {'aspp': small}, {'aspp': large}
  init = functools.partial(module.init, train=False)
  variables = fill(jax.eval_shape(init, jax.random.key(0), student, teacher))
  loss, _ = jax.jit(functools.partial(module.apply, train=True))(
    variables, student, teacher
  )
  connector = variables['params']['connectors_aspp']['conv_norm']
  s = numpy_norm(small @ connector['conv']['kernel'][0, 0], connector['bn'])
  if match == 'to_student':
    t = large[:, ::2, ::2]
  else:
    # Rows, then columns; every second pixel is the mean of its neighbors.
    t, wide = large, np.zeros((2, 5, 7, 3))
    wide[:, ::2, ::2] = s
    wide[:, 1::2] = (wide[:, :-1:2] + wide[:, 2::2]) / 2
    wide[:, :, 1::2] = (wide[:, :, :-1:2] + wide[:, :, 2::2]) / 2
    s = wide
  np.testing.assert_allclose(loss, (2 - 2 * cosine(s, t)) / 2, **CLOSE)


def drop(maps, tap):
  return {k: v for k, v in maps.items() if k != tap}


WRONG_MAPS = {
  'size': (
    lambda s, t: (s, t | {'aspp': t['aspp'][:, :2]}),
    r"Sizes differ at 'aspp': student \(4, 3, 4, 4\), teacher \(4, 2, 4, 7\)."
    r".*match_size='to_teacher'",
  ),
  'batch': (
    lambda s, t: (s, t | {'aspp': t['aspp'][:2]}),
    r"Batches differ at 'aspp': \(4, 3, 4, 4\) and \(2, 3, 4, 7\)",
  ),
  'channels': (
    lambda s, t: (s | {'decoder': s['decoder'][..., :2]}, t),
    r"student map 'decoder' has shape \(4, 5, 6, 2\); expected \[b, h, w, 5\]",
  ),
  'rank': (
    lambda s, t: (s, t | {'aspp': t['aspp'][0]}),
    r"teacher map 'aspp' has shape \(3, 4, 7\)",
  ),
  'missing': (
    lambda s, t: (drop(s, 'aspp'), t),
    r"student has no map 'aspp', only \['decoder'\]",
  ),
}


@pytest.mark.parametrize(
  ('change', 'message'), WRONG_MAPS.values(), ids=WRONG_MAPS
)
def test_wrong_maps(fill, change, message, no_type_checks):
  module, params, state, student, teacher = make(fill)
  student, teacher = change(student, teacher)
  with pytest.raises(ValueError, match=message):
    attnfd_loss(params, state, student, teacher, distiller=module, train=True)


@pytest.mark.parametrize(
  'name',
  [
    'teacher_attention',
    'student_attention',
    'norm_scope',
    'reduction',
    'teacher_bn',
    'match_size',
  ],
)
def test_wrong_options(name):
  with pytest.raises(ValueError, match=f"{name}='nearest' must be one of \\w"):
    AttnFD({'aspp': 2}, {'aspp': 2}, **{name: 'nearest'})


def test_taps_must_be_the_same():
  with pytest.raises(ValueError, match=r"student \['aspp'\].*\['decoder'\]"):
    AttnFD({'aspp': 2}, {'decoder': 2})


def test_public_names():
  assert attnfd_jax.AttnFD is AttnFD
  assert attnfd_jax.attnfd_loss is attnfd_loss


def test_connector_sizes():
  # METHOD 2.6, for ResNet-101.
  student = {'backbone': 512, 'aspp': 256, 'decoder': 256}
  teacher = {'backbone': 2048, 'aspp': 256, 'decoder': 256}
  module = AttnFD(student, teacher)
  maps = [
    {
      tap: jax.ShapeDtypeStruct((1, 2, 2, c), jnp.float32)
      for tap, c in x.items()
    }
    for x in (student, teacher)
  ]
  init = functools.partial(module.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), *maps)['params']
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name, tree in params.items()
  }
  assert sizes == {
    'connectors_backbone': 1_052_672,
    'connectors_aspp': 66_048,
    'connectors_decoder': 66_048,
    'student_gates_backbone': 33_412,
    'student_gates_aspp': 8_564,
    'student_gates_decoder': 8_564,
  }
