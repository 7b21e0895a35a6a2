# SPDX-License-Identifier: Apache-2.0
"""CIRKD and its memories against NumPy in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from attnfd_jax import distill
from attnfd_jax.devices import sharding
from attnfd_jax.distill import cirkd, memory, pooling
from attnfd_jax.distill import labels as label_maps
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.training import experiment

# Sums of some hundred float32 exponentials of numbers up to 10.
CLOSE = {'rtol': 2e-5, 'atol': 1e-6}
SMALL = {
  'pixel_memory': 40,
  'region_memory': 7,
  'pixels': 3,
  'pixel_samples': 30,
  'region_samples': 12,
}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True))


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def row_divergences(s, t, s_keys, t_keys, temperature):
  q, p = (softmax(x @ y.T / temperature) for x, y in ((s, s_keys), (t, t_keys)))
  return np.sum(p * np.log(p / q), -1)


# The mini-batch.


@functools.partial(jax.jit, static_argnames='temperature')
def batch_distance(s, t, temperature=0.1):
  pair = (cirkd._rows(x) for x in (s, t))
  return cirkd.batch_distance(*pair, temperature=temperature)


@pytest.mark.parametrize('size', [(3, 4, 5), (1, 4, 5), (4, 3, 3)])
def test_batch_value(size):
  s, t = normal(0, *size, 6), normal(1, *size, 9)
  a, b = (unit(x).reshape(size[0], -1, x.shape[-1]) for x in (s, t))
  for temperature in (0.1, 1.0):
    rows = [
      row_divergences(a[i], b[i], a[j], b[j], temperature)
      for i, j in np.ndindex(size[0], size[0])
    ]
    loss = batch_distance(s, t, temperature=temperature)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.mean(rows), **CLOSE)


def test_batch_gradient_is_that_of_the_plain_form():
  s, t = normal(0, 3, 4, 5, 6), normal(1, 3, 4, 5, 6)

  def plain(s, t):
    s, t = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t))
    s, t = (x.reshape(-1, 20, 6) for x in (s, t))
    log_q, log_p = (
      jax.nn.log_softmax(jnp.einsum('ibc,jdc->ijbd', x, x) / 0.1)
      for x in (s, t)
    )
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

  ours, theirs = jax.grad(batch_distance, (0, 1))(s, t)
  np.testing.assert_allclose(ours, jax.grad(plain)(s, t), rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(theirs, 0)


def test_batch_invariances():
  s, t = normal(0, 3, 4, 5, 6), normal(1, 3, 4, 5, 6)
  loss = batch_distance(s, t)
  order = [2, 0, 1]
  np.testing.assert_allclose(batch_distance(s[order], t[order]), loss, **CLOSE)
  rotation, _ = np.linalg.qr(normal(2, 6, 6))
  np.testing.assert_allclose(batch_distance(s, t @ rotation), loss, **CLOSE)
  same, grads = jax.value_and_grad(batch_distance)(s, 3 * s @ rotation)
  # Of logarithms of float32.
  np.testing.assert_allclose(same, 0, rtol=0, atol=1e-6)
  np.testing.assert_allclose(grads, 0, rtol=0, atol=1e-6)


def test_batch_of_zeros_is_finite():
  s, zeros = normal(0, 2, 3, 3, 4), np.zeros((2, 3, 3, 4), np.float32)
  for pair in ((zeros, s), (s, zeros), (zeros, zeros)):
    loss, grads = jax.value_and_grad(batch_distance)(*pair)
    assert np.isfinite(loss) and np.isfinite(grads).all()


def test_pools_average_what_is_there():
  x = normal(0, 2, 5, 6, 3)
  found = pooling.average_pool(x, 4)
  expected = [
    [np.mean(x[:, i : i + 4, j : j + 4], (1, 2)) for j in (0, 4)]
    for i in (0, 4)
  ]
  expected = np.moveaxis(np.array(expected), 2, 0)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert pooling.average_pool(x, 1) is x


# What is remembered.


def test_labels_are_of_the_nearest_pixel():
  labels = np.arange(7 * 9).reshape(1, 7, 9)
  found = label_maps.nearest(labels, 3, 4)
  # floor(i * 7 / 3), floor(j * 9 / 4), as PyTorch's interpolate.
  np.testing.assert_array_equal(found[0], labels[0][[0, 2, 4]][:, [0, 2, 4, 6]])


def test_class_means():
  vectors = unit(normal(0, 2, 6, 4)).astype(np.float32)
  labels = np.array([[0, 0, 2, 255, 2, 0], [1, 255, 255, 255, 255, 255]])
  means, present = memory.class_means(vectors, labels.astype(np.uint8), 3)
  np.testing.assert_array_equal(present, [[1, 0, 1], [0, 1, 0]])
  for image, k in ((0, 0), (0, 2), (1, 1)):
    own = vectors[image][labels[image] == k]
    np.testing.assert_allclose(means[image, k], unit(own.mean(0)), **CLOSE)


@pytest.mark.parametrize('positions', memory.POSITIONS)
def test_class_pixels(positions):
  # The vector of a pixel is its number.
  vectors = np.arange(40, dtype=np.float32).reshape(2, 20, 1)
  labels = np.random.default_rng(0).integers(0, 4, (2, 20)).astype(np.uint8)
  labels[labels == 3] = 255
  labels[1, labels[1] == 2] = 0
  draw = functools.partial(
    memory.class_pixels,
    num_classes=3,
    count=5,
    positions=positions,
  )
  found, there = draw(jax.random.key(0), vectors, labels)
  assert found.shape == (2, 3, 5, 1)
  for image, k in np.ndindex(2, 3):
    own = np.flatnonzero(labels[image] == k)
    assert there[image, k].sum() == min(len(own), 5)
    chosen = np.asarray(found[image, k, :, 0])[there[image, k]] - 20 * image
    assert len(set(chosen)) == len(chosen)
    # The authors' code counts the pixels of the class, and takes others.
    allowed = own if positions == 'class' else range(len(own))
    assert set(chosen) <= {*allowed}
  others = [
    draw(jax.random.key(seed), vectors, labels)[0] for seed in range(1, 9)
  ]
  assert any(np.any(x != found) for x in others)


@pytest.mark.parametrize('overflow', memory.OVERFLOWS)
def test_queues_against_a_loop(overflow):
  generator = np.random.default_rng(0)
  queue = np.zeros((2, 5, 1), np.float32)
  pointers = np.zeros(2, np.int32)
  expected, place = queue.copy(), [0, 0]
  total = [0, 0]
  for _ in range(6):
    counts = generator.integers(0, 4, (3, 2))
    there = np.arange(3) < counts[..., None]
    vectors = generator.normal(size=(3, 2, 3, 1)).astype(np.float32)
    for image, k in np.ndindex(3, 2):
      n = counts[image, k]
      total[k] += n
      if overflow == 'reset' and place[k] + n >= 5:
        rows, place[k] = range(5 - n, 5), 0
      else:
        rows = [(place[k] + i) % 5 for i in range(n)]
        place[k] = (place[k] + n) % 5
      for i, row in enumerate(rows):
        expected[k, row] = vectors[image, k, i]
    queue, pointers = memory.pushed(
      queue, pointers, vectors, there, overflow=overflow
    )
    np.testing.assert_array_equal(queue, expected)
    np.testing.assert_array_equal(pointers, place)
  assert min(total) > 5  # Each has been full.


# The method.


def make_outputs(seed, channels, b=2):
  return {
    'logits': normal(seed, b, 32, 32, 3),
    'features': {'aspp': normal(seed + 10, b, 4, 4, channels)},
  }


def make_labels(b=2):
  labels = np.random.default_rng(5).integers(0, 3, (b, 4, 4)).astype(np.uint8)
  labels[0, 0] = 255
  return labels.repeat(8, 1).repeat(8, 2)


def start(method, outputs, labels):
  rngs = {'params': jax.random.key(0), 'distill': jax.random.key(1)}
  # Also where it trains, init must not add what it is shown.
  return method.init(rngs, *outputs, labels, train=True, step=0)


@functools.partial(jax.jit, static_argnums=0)
def apply(method, variables, outputs, labels, seed=2):
  return method.apply(
    variables,
    *outputs,
    labels,
    train=True,
    step=0,
    rngs={'distill': jax.random.key(seed)},
    mutable=['batch_stats', 'memory'],
  )


def test_memories_after_one_step():
  method, labels = cirkd.CIRKD(**SMALL), make_labels()
  student, teacher = outputs = make_outputs(0, 5), make_outputs(1, 6)
  before = start(method, outputs, labels)
  assert set(before) == {'params', 'batch_stats', 'memory'}
  (loss, terms), after = apply(method, before, outputs, labels)
  assert set(terms) == {'batch', 'pixel', 'region'}
  weighed = terms['batch'] + 0.1 * terms['pixel'] + 0.1 * terms['region']
  np.testing.assert_allclose(loss, weighed, rtol=1e-6)
  coarse = labels[:, ::8, ::8]
  sizes = np.stack([np.sum(coarse == k, (1, 2)) for k in range(3)])  # [k, b]
  old, new = before['memory'], after['memory']
  np.testing.assert_array_equal(old['pixel_pointers'], 0)
  added = np.minimum(sizes, 3).sum(1)
  np.testing.assert_array_equal(new['pixel_pointers'], added)
  np.testing.assert_array_equal(new['region_pointers'], np.sum(sizes > 0, 1))
  maps = unit(teacher['features']['aspp'])
  for name in ('pixel', 'region'):
    assert new[name].shape == (3, SMALL[f'{name}_memory'], 6)
    lengths = np.linalg.norm(new[name], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    for k, count in enumerate(new[f'{name}_pointers']):
      np.testing.assert_array_equal(new[name][k, count:], old[name][k, count:])
  for k in range(3):
    own = maps[coarse == k]
    for row in np.asarray(new['pixel'][k][: added[k]]):
      assert np.min(np.abs(own - row).max(-1)) < 1e-6
    means = [unit(maps[i][coarse[i] == k].mean(0)) for i in range(2)]
    np.testing.assert_allclose(new['region'][k][:2], means, **CLOSE)


def test_memory_terms_against_numpy():
  """All vectors are drawn, so that their order does not matter."""
  options = SMALL | {'pixel_samples': 1000, 'region_samples': 1000}
  method, labels = cirkd.CIRKD(**options), make_labels()
  student, teacher = outputs = make_outputs(0, 5), make_outputs(1, 6)
  variables = start(method, outputs, labels)
  (_, terms), after = apply(method, variables, outputs, labels)
  projection, _ = cirkd.Projection(6).apply(
    {k: variables[k]['projection'] for k in ('params', 'batch_stats')},
    student['features']['aspp'],
    train=True,
    mutable=['batch_stats'],
  )
  valid = labels[:, ::8, ::8] != 255
  s = unit(projection)[valid]
  t = unit(teacher['features']['aspp'])[valid]
  for name in ('pixel', 'region'):
    keys = np.asarray(after['memory'][name], np.float64).reshape(-1, 6)
    expected = np.mean(row_divergences(s, t, keys, keys, 0.1))
    np.testing.assert_allclose(terms[name], expected, **CLOSE)


def test_the_same_rows_of_every_class_are_drawn(monkeypatch):
  seen = []

  def keep(student, teacher, keys, valid, **options):
    seen.append(keys)
    return jnp.zeros(())

  monkeypatch.setattr(cirkd, 'memory_distance', keep)
  method, labels = cirkd.CIRKD(**SMALL), np.full((2, 32, 32), 255, np.uint8)
  outputs = make_outputs(0, 5), make_outputs(1, 6)
  variables = start(method, outputs, labels)
  seen.clear()
  apply.__wrapped__(method, variables, outputs, labels)
  # 30 // 3 + 1 and 12 // 3 + 1 of each class.
  for keys, name, count in zip(seen, ('pixel', 'region'), (11, 5), strict=True):
    keys = np.asarray(keys).reshape(3, count, 6)
    queue = np.asarray(variables['memory'][name])
    rows = [
      [np.flatnonzero((queue[k] == key).all(-1)).item() for key in keys[k]]
      for k in range(3)
    ]
    assert rows[0] == rows[1] == rows[2] and len(set(rows[0])) == count


@nn.nowrap
def identity(module, x, *, train):
  del train
  return x


def test_equal_embeddings_are_at_distance_zero_whatever_is_remembered(
  monkeypatch,
):
  monkeypatch.setattr(cirkd.Projection, '__call__', identity)
  method, labels = cirkd.CIRKD(**SMALL), make_labels()
  outputs = (make_outputs(0, 6),) * 2
  variables = start(method, outputs, labels)
  (loss, terms), _ = apply.__wrapped__(method, variables, outputs, labels)
  for value in terms.values():
    np.testing.assert_allclose(value, 0, rtol=0, atol=1e-6)


def test_without_labels_nothing_is_remembered():
  method = cirkd.CIRKD(**SMALL)
  outputs = make_outputs(0, 5), make_outputs(1, 6)
  labels = np.full((2, 32, 32), 255, np.uint8)
  variables = start(method, outputs, labels)
  (_, terms), after = apply(method, variables, outputs, labels)
  assert terms['pixel'] == terms['region'] == 0 < terms['batch']
  small_run.assert_same_tree(after['memory'], variables['memory'])


@pytest.mark.parametrize('part', ['batch', 'pixel', 'region'])
def test_each_term_may_be_alone(part):
  weights = {f'{x}_weight': float(x == part) for x in ('batch', 'pixel')}
  weights['region_weight'] = float(part == 'region')
  method, labels = cirkd.CIRKD(**SMALL, **weights), make_labels()
  outputs = make_outputs(0, 5), make_outputs(1, 6)
  variables = start(method, outputs, labels)
  expected = set() if part == 'batch' else {part, f'{part}_pointers'}
  assert set(variables.get('memory', {})) == expected
  (loss, terms), _ = apply(method, variables, outputs, labels)
  assert set(terms) == {part} and loss == terms[part] > 0


def test_evaluation_leaves_the_memory_alone():
  method, labels = cirkd.CIRKD(**SMALL), make_labels()
  outputs = make_outputs(0, 5), make_outputs(1, 6)
  variables = start(method, outputs, labels)
  call = functools.partial(method.apply, variables, *outputs, labels, step=0)
  rngs = {'distill': jax.random.key(0)}
  call(train=False, rngs=rngs)
  _, after = call(train=False, rngs=rngs, mutable=['memory'])
  small_run.assert_same_tree(after['memory'], variables['memory'])


def test_four_devices_equal_one():
  mesh = sharding.make_mesh()
  assert mesh.size > 1
  method, labels = cirkd.CIRKD(**SMALL), make_labels(8)
  outputs = make_outputs(0, 5, b=8), make_outputs(1, 6, b=8)
  variables = start(method, outputs, labels)

  @jax.jit
  def run(variables, outputs, labels):
    def loss(student):
      return apply(method, variables, (student, outputs[1]), labels)

    def first(student):
      (value, terms), after = loss(student)
      return value, (terms, after)

    return jax.value_and_grad(first, has_aux=True)(outputs[0])

  expected = run(variables, outputs, labels)
  placed = jax.device_put(variables, sharding.replicated(mesh))
  batch = jax.device_put((outputs, labels), sharding.by_batch(mesh))
  found = run(placed, *batch)
  # Sums in another order.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )


def test_memories_survive_an_interruption(tmp_path, monkeypatch):
  """Bit for bit: 4 steps equal 2, a checkpoint, and 2."""
  # A stage scores twice, and once more at its end.
  interrupt = small_run.interrupting(evaluation.evaluate, 5)

  def config():
    config = small_run.make_config()
    config.stages = ('teacher', 'distill')
    config.distill.method = 'kd+cirkd'
    config.distill.cirkd.tap = 'decoder'
    for key, value in SMALL.items():
      config.distill.cirkd[key] = value
    return config

  with small_run.kept_programs(tmp_path / 'programs'):
    experiment.train(config(), tmp_path / 'whole')
    monkeypatch.setattr(evaluation, 'evaluate', interrupt)
    with pytest.raises(KeyboardInterrupt):
      experiment.train(config(), tmp_path / 'parts')
    experiment.train(config(), tmp_path / 'parts')
  ours, theirs = (tmp_path / x / 'distill' for x in ('parts', 'whole'))
  assert 'resumed from step 2' in (ours / 'log.txt').read_text()
  small_run.assert_same_run(ours, theirs)
  state = small_run.stored_states(ours)[4]
  memories = state['collections']['distiller']['memory']['methods_cirkd']
  assert max(memories['pixel_pointers']) > 0


def test_options_and_maps_that_do_not_fit_are_named():
  student, teacher = make_outputs(0, 5), make_outputs(1, 6)
  make = functools.partial(distill.make_method, 'cirkd', student)
  with pytest.raises(InputError, match='pixel_memory=3 must be from 16'):
    make(teacher, pixel_memory=3)
  with pytest.raises(InputError, match="positions='all' must be one of class"):
    make(teacher, positions='all')
  other = teacher | {'features': {'aspp': normal(0, 2, 8, 8, 6)}}
  with pytest.raises(InputError, match="Sizes differ at 'aspp'.*output_stride"):
    make(other)
