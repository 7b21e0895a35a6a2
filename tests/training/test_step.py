# SPDX-License-Identifier: Apache-2.0
"""The training step of a network that compiles fast, alone and distilled."""

import functools

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.devices import sharding
from attnfd_jax.distill import init_distiller, make_distiller, METHODS
from attnfd_jax.inference import evaluation
from attnfd_jax.losses import softmax_cross_entropy
from attnfd_jax.models import layers, resizing
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.teachers.teacher import FrozenNetwork
from attnfd_jax.training import mixing, optim
from attnfd_jax.training import step as steps

NUM_CLASSES = 3
DISTILL = {'weight': 2.0, 'norm_scope': 'batch', 'reduction': 'unitmean'}
# Without gates: they take as long to compile as all the rest.
CLEAN = DISTILL | {'teacher_attention': 'none', 'student_attention': 'none'}
REFERENCE = DISTILL | {
  'teacher_attention': 'random',
  'student_attention': 'mlp_frozen',
  'teacher_bn': 'batch',
}
REFERENCE_TEACHER = {'batch_statistics': True, 'dropout': True}


class Small(nn.Module):
  """One tap, with all that couples the images of a batch and all noise."""

  channels: int = 4
  norm: bool = True
  dropout_rate: float = 0.5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, image, *, train, dropout=None):
    dropout = train if dropout is None else dropout

    def block(name, x):
      if self.norm:
        module = layers.ConvNorm(
          self.channels, strides=2, dtype=self.dtype, name=name
        )
        x = module(x, train=train)
      else:
        x = layers.Conv(self.channels, strides=2, name=name)(x)
      return checkpoint_name(x, 'block')

    x = tap = block('backbone', image)
    x = block('decoder', nn.relu(x))
    x = nn.Dropout(self.dropout_rate)(nn.relu(x), deterministic=not dropout)
    head = layers.Conv(
      NUM_CLASSES, 1, use_bias=True, dtype=self.dtype, name='classifier'
    )
    coarse = head(x).astype(jnp.float32)
    logits = jnp.repeat(jnp.repeat(coarse, 4, 1), 4, 2)
    return {
      'logits': logits,
      'coarse_logits': coarse,
      'features': {'backbone': tap},
    }


def schedule(step):
  return 0.05 / (1.0 + step.astype(jnp.float32))


def make_batch(seed=0, size=8):
  generator = np.random.default_rng(seed)
  label = generator.integers(0, NUM_CLASSES, (size, 16, 12), np.uint8)
  label[:, -3:] = 255
  image = generator.integers(0, 256, (size, 16, 12, 3), np.uint8)
  return {'image': image, 'label': label}


def cross_entropy(logits, labels):
  return {'ce': softmax_cross_entropy(logits, labels)}


def draw(tree, seed):
  generator = np.random.default_rng(seed)

  def values(path, leaf):
    if path[-1].key == 'var':
      return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return generator.normal(size=leaf.shape).astype(np.float32) * 0.5

  return jax.tree_util.tree_map_with_path(values, tree)


class Setting:
  """A step with a fresh state; `run` gives states and metrics on the host."""

  def __init__(
    self,
    *,
    student=None,
    distill=None,
    method='attnfd',
    teacher_options=None,
    devices=1,
    task_loss=cross_entropy,
    ema_decay=0.0,
    **options,
  ):
    student = student or Small()
    self.mesh = sharding.make_mesh(devices)
    variables = {'student': draw(networks.abstract_variables(student), 0)}
    self.teacher_variables, teacher, distiller = {}, None, None
    if distill:
      network = Small(6)
      self.teacher_variables = draw(networks.abstract_variables(network), 2)
      teacher = FrozenNetwork(
        network,
        self.teacher_variables,
        name='small',
        class_names=('a', 'b', 'c'),
        **(teacher_options or {}),
      )
      distiller = make_distiller(method, {method: distill})
      outputs = [
        networks.abstract_outputs(x, (16, 12)) for x in (student, network)
      ]
      init = functools.partial(init_distiller, distiller, outputs)
      variables['distiller'] = draw(jax.eval_shape(init), 1)
    tx = optim.make_optimizer(schedule, weight_decay=0.0, nesterov=False)
    self.step = steps.make_train_step(
      student,
      tx,
      task_loss=task_loss,
      teacher=teacher,
      distiller=distiller,
      schedule=schedule,
      mesh=self.mesh,
      ema_decay=ema_decay,
      **options,
    )
    everywhere = sharding.replicated(self.mesh)
    self.rng = jax.device_put(jax.random.key(0), everywhere)
    self.teacher_variables = jax.device_put(self.teacher_variables, everywhere)
    state = steps.make_state(variables, tx, ema=ema_decay > 0)
    self.state = jax.device_put(state, everywhere)

  def run(self, *batches, teacher_variables=None):
    # A copy: the state is donated.
    state, history = jax.tree.map(jnp.copy, self.state), []
    for batch in batches:
      batch = jax.device_put(batch, sharding.by_batch(self.mesh))
      state, metrics = self.step(
        state, teacher_variables or self.teacher_variables, batch, self.rng
      )
      history.append(jax.device_get((state, metrics)))
    return history


@pytest.fixture(scope='module')
def alone():
  return Setting()


@pytest.fixture(scope='module')
def clean():
  return Setting(distill=CLEAN)


@pytest.fixture(scope='module')
def reference():
  return make_reference()


def make_reference(**options):
  return Setting(
    distill=REFERENCE,
    teacher_options=REFERENCE_TEACHER,
    ce_batch_division=True,
    **options,
  )


def assert_close(ours, theirs, *, rtol, atol):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree.leaves(theirs),
    strict=True,
  ):
    np.testing.assert_allclose(
      a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
    )


def any_differs(ours, theirs):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  return any(np.any(a != b) for a, b in pairs)


@pytest.mark.slow
def test_one_device_equals_four(reference):
  """Statistics, norms and noise are those of the global batch."""
  four = make_reference(devices=4)
  assert len(four.rng.sharding.device_set) == 4
  batches = make_batch(0), make_batch(1)
  for (ours, our_metrics), (theirs, their_metrics) in zip(
    reference.run(*batches), four.run(*batches), strict=True
  ):
    # Float32 sums over the batch in two orders; a part's own statistics
    # would differ by percents.
    assert_close(our_metrics, their_metrics, rtol=2e-5, atol=1e-6)
    assert_close(ours.params, theirs.params, rtol=1e-4, atol=2e-6)
    assert_close(ours.collections, theirs.collections, rtol=2e-5, atol=2e-6)
  assert any_differs(ours.params, jax.device_get(reference.state.params))


def test_metrics_of_a_step(clean):
  (_, first), (_, second) = clean.run(make_batch(0), make_batch(1))
  names = ('loss', 'ce', 'attnfd', 'attnfd_backbone')
  assert set(first) == {*names, 'grad_norm', 'learning_rate'}
  # Rounding of one sum.
  np.testing.assert_allclose(
    first['loss'], first['ce'] + 2 * first['attnfd'], rtol=1e-6, atol=0
  )
  assert first['grad_norm'] > 0
  np.testing.assert_allclose(
    [first['learning_rate'], second['learning_rate']],
    [0.05, 0.025],
    rtol=1e-6,
    atol=0,
  )


def test_the_first_update_is_the_gradient(alone):
  """SGD without decay: the norm of the update over the rate is reported."""
  ((state, metrics),) = alone.run(make_batch())
  start = jax.device_get(alone.state.params)
  total = 0.0
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(state.params),
    jax.tree.leaves(start),
    strict=True,
  ):
    scale = 1 if path[1].key == 'backbone' else 10
    total += np.sum(np.square((old - new) / (0.05 * scale)))
  # Differences of float32 weights.
  np.testing.assert_allclose(
    np.sqrt(total), metrics['grad_norm'], rtol=1e-4, atol=0
  )


def test_compiles_once_and_donates(reference):
  setting = reference
  state, old = jax.tree.map(jnp.copy, setting.state), []
  for seed in range(3):
    old.append(state)
    batch = jax.device_put(make_batch(seed), sharding.by_batch(setting.mesh))
    with jax.transfer_guard('disallow'):
      state, _ = setting.step(
        state, setting.teacher_variables, batch, setting.rng
      )
  # All tests of this file that share the step share one program.
  assert setting.step._cache_size() == 1
  assert int(state.step) == 3
  for stale in old:
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stale.params))
  leaves = jax.tree.leaves(setting.teacher_variables)
  assert not any(leaf.is_deleted() for leaf in leaves)


def test_ema(alone):
  decay, batches = 0.26, [make_batch(seed) for seed in range(4)]
  setting = Setting(ema_decay=decay)
  start = jax.device_get(setting.state)
  average = start.variables('student')['params']
  decays = []
  for n, (state, _) in enumerate(setting.run(*batches), 1):
    d = min(decay, (1 + n) / (10 + n))
    decays.append(d)
    average = jax.tree.map(
      lambda a, w, d=d: d * a + (1 - d) * w, average, state.params['student']
    )
    # Statistics are averages already.
    expected = {'params': average, **state.collections['student']}
    assert_close(state.variables('student'), expected, rtol=1e-5, atol=1e-6)
  assert decays[0] < decays[1] < decays[-1] == decay
  # Training does not see it.
  (*_, (plain, _)) = alone.run(*batches)
  assert_close(state.params, plain.params, rtol=1e-5, atol=1e-6)


def test_noise_is_new_in_each_step(alone):
  batch = make_batch()
  (first, first_metrics), _ = alone.run(batch, batch)
  ((again, again_metrics),) = alone.run(batch)
  assert not any_differs(first, again)
  assert not any_differs(first_metrics, again_metrics)
  original, later = alone.state, alone.state.step + 7
  try:
    alone.state = original.replace(step=later)
    ((_, other_metrics),) = alone.run(batch)
  finally:
    alone.state = original
  assert other_metrics['ce'] != first_metrics['ce']


def test_cutmix(clean):
  """A step as on images that were mixed before, for teacher and student."""
  setting, batch = Setting(distill=CLEAN, cutmix=0.9), make_batch()
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)
  mixed = jax.device_get(mixing.cutmix(batch, key, probability=0.9))
  ((ours, metrics),) = setting.run(batch)
  ((theirs, their_metrics),) = clean.run(mixed)
  # Two programs.
  assert_close(metrics, their_metrics, rtol=1e-5, atol=1e-6)
  assert_close(ours.params, theirs.params, rtol=1e-4, atol=2e-6)
  ((_, plain),) = clean.run(batch)
  for name in ('ce', 'attnfd'):
    assert abs(plain[name] - metrics[name]) > 1e-3


@pytest.mark.parametrize('mode', ['clean', 'reference'])
def test_the_teacher_stays(request, mode):
  setting = request.getfixturevalue(mode)
  before = jax.device_get(setting.teacher_variables)
  start = jax.device_get(setting.state)
  ((state, _),) = setting.run(make_batch())
  assert not any_differs(setting.teacher_variables, before)
  if mode == 'reference':
    # Neither do its gates, a constant collection of the distiller.
    gates = state.collections['distiller']['teacher']
    assert not any_differs(gates, start.collections['distiller']['teacher'])
  assert any_differs(
    state.collections['distiller']['batch_stats'],
    start.collections['distiller']['batch_stats'],
  )
  assert set(state.params) == {'student', 'distiller'}


@pytest.mark.parametrize('mode', ['clean', 'reference'])
def test_statistics_of_the_teacher(request, mode):
  """'batch' neither reads nor writes the running ones."""
  setting = request.getfixturevalue(mode)
  ((_, first),) = setting.run(make_batch())
  other = setting.teacher_variables | {
    'batch_stats': jax.tree.map(
      lambda x: 2 * x, setting.teacher_variables['batch_stats']
    )
  }
  ((_, second),) = setting.run(make_batch(), teacher_variables=other)
  assert (first['attnfd'] == second['attnfd']) == (mode == 'reference')


def test_another_task_loss_takes_the_place_of_cross_entropy(alone):
  def terms(logits, labels):
    loss = softmax_cross_entropy(logits, labels)
    return {'once': loss, 'thrice': loss._replace(total=3 * loss.total)}

  ((state, metrics),) = Setting(task_loss=terms).run(make_batch())
  ((plain_state, plain),) = alone.run(make_batch())
  assert 'ce' in plain and 'ce' not in metrics
  np.testing.assert_allclose(metrics['once'], plain['ce'], rtol=1e-6)
  np.testing.assert_allclose(metrics['thrice'], 3 * plain['ce'], rtol=1e-6)
  # The step of SGD without decay is linear in the loss.
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics[name], 4 * plain[name], rtol=1e-5)
  assert any_differs(state.params, plain_state.params)


def test_ce_batch_division(reference):
  ((_, metrics),) = reference.run(make_batch())
  # Rounding of one sum; 8 images.
  np.testing.assert_allclose(
    metrics['loss'],
    metrics['ce'] / 8 + 2 * metrics['attnfd'],
    rtol=1e-6,
    atol=0,
  )


def test_frozen_gates_get_no_gradient(reference):
  start = jax.device_get(reference.state.params['distiller'])
  ((state, _),) = reference.run(make_batch())
  moved = {
    path[-1].key
    for (path, new), old in zip(
      jax.tree_util.tree_leaves_with_path(state.params['distiller']),
      jax.tree.leaves(start),
      strict=True,
    )
    if np.any(new != old)
  }
  # No weight decay here: what stays has no gradient.
  assert moved == {'kernel', 'scale', 'bias'}


def test_parts_add_up_without_coupling():
  """Without norms and noise, parts of equal size average to the whole."""
  student = Small(norm=False, dropout_rate=0.0)
  batch = make_batch()
  results = [
    Setting(student=student, accumulate=parts).run(batch)[0] for parts in (1, 2)
  ]
  (whole, whole_metrics), (parts, part_metrics) = results
  # Float32 sums in another order.
  assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
  assert_close(part_metrics, whole_metrics, rtol=1e-5, atol=1e-6)


def test_parts_take_less_memory_and_no_loop():
  """On a CPU, where convolutions in a loop run on one core and are plain."""
  batch = {
    'image': jax.ShapeDtypeStruct((8, 128, 96, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((8, 128, 96), jnp.uint8),
  }
  found = []
  for parts in (1, 4):
    setting = Setting(accumulate=parts)
    program = setting.step.lower(
      setting.state, setting.teacher_variables, batch, setting.rng
    ).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    found.append((memory, program.as_text().count(' convolution(')))
  (whole, convolutions), (parts, in_parts) = found
  assert in_parts == 4 * convolutions > 0
  assert parts < 0.5 * whole


def test_remat_changes_nothing(alone):
  setting = Setting(remat=True)
  batches = make_batch(0), make_batch(1)
  for ours, theirs in zip(
    setting.run(*batches), alone.run(*batches), strict=True
  ):
    # The same operations, fused otherwise.
    assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
  arguments = setting.state, setting.teacher_variables, batches[0], setting.rng
  texts = [str(s.step.trace(*arguments).jaxpr) for s in (setting, alone)]
  assert ['remat' in t or 'checkpoint[' in t for t in texts] == [True, False]


def test_bfloat16_keeps_float32_weights(alone):
  setting = Setting(student=Small(dtype=jnp.dtype('bfloat16')))
  (_, (state, metrics)) = setting.run(make_batch(0), make_batch(1))
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    np.dtype('float32')
  }
  assert {x.dtype for x in jax.tree.leaves(state.collections)} == {
    np.dtype('float32')
  }
  (_, (_, plain)) = alone.run(make_batch(0), make_batch(1))
  # Eight bits of mantissa, twice.
  np.testing.assert_allclose(metrics['loss'], plain['loss'], rtol=0.05, atol=0)
  assert metrics['loss'] != plain['loss']


def test_a_batch_without_labels_is_harmless(reference, alone):
  batch = make_batch()
  batch['label'][:] = 255
  ((state, metrics),) = alone.run(batch)
  assert metrics['loss'] == metrics['grad_norm'] == 0
  assert not any_differs(state.params, jax.device_get(alone.state.params))
  ((state, metrics),) = reference.run(batch)
  assert metrics['ce'] == 0 and np.isfinite(metrics['loss'])
  assert metrics['attnfd'] > 0  # The maps are compared all the same.
  for leaf in jax.tree.leaves(state.params):
    assert np.all(np.isfinite(leaf))


def test_eval_step_counts_pixels():
  mesh, network = sharding.make_mesh(4), Small()
  variables = Setting().state.variables('student')
  variables = jax.device_put(variables, sharding.replicated(mesh))
  batch = make_batch(size=4)
  # Labels larger than what the network sees.
  batch['label'] = np.repeat(batch['label'], 2, 1)
  count = evaluation.make_eval_step(network, NUM_CLASSES, mesh)
  assert evaluation.make_eval_step(Small(), NUM_CLASSES, mesh) is count
  counts = np.asarray(
    count(variables, jax.device_put(batch, sharding.by_batch(mesh)))
  )
  out = jax.jit(functools.partial(network.apply, train=False))(
    jax.device_get(variables), normalize(batch['image'])
  )
  scores = resizing.resize(out['coarse_logits'], 32, 12)
  predictions = np.argmax(np.asarray(scores), -1)
  expected = np.zeros((3, 3), int)
  valid = batch['label'] != 255
  np.add.at(expected, (batch['label'][valid], predictions[valid]), 1)
  assert counts.sum() == valid.sum()
  # Ties may round to either side.
  assert np.abs(counts - expected).sum() <= 4


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize(('sign', 'cosine'), [(2.0, 1.0), (-1.0, -1.0)])
def test_gradients_are_compared(monkeypatch, sign, cosine, accumulate):
  """A method that is the loss of the task, or against it."""

  def distance(self, student, teacher, labels, *, train, step):
    loss = softmax_cross_entropy(student['logits'], labels)
    return loss._replace(total=sign * loss.total), {}

  monkeypatch.setattr(METHODS['kd'], '__call__', nn.compact(distance))
  options = {'distill': {'weight': 0.5}, 'method': 'kd'}
  options |= {'student': Small(norm=False, dropout_rate=0.0)}
  options['accumulate'] = accumulate
  (plain,) = Setting(**options).run(make_batch())
  ((state, metrics),) = Setting(log_gradients=True, **options).run(make_batch())
  np.testing.assert_allclose(metrics['cosine'], cosine, rtol=1e-5)
  ratio = metrics['distill_norm'] / metrics['task_norm']
  np.testing.assert_allclose(ratio, 0.5 * abs(sign), rtol=1e-5)
  whole = metrics['task_norm'] * (1 + 0.5 * sign)
  np.testing.assert_allclose(metrics['grad_norm'], whole, rtol=1e-5)
  # It only looks.
  assert_close(state.params, plain[0].params, rtol=1e-6, atol=1e-7)
  assert not {'cosine', 'task_norm', 'distill_norm'} & set(plain[1])


def test_gradients_of_one_loss_are_not_compared():
  setting = Setting(log_gradients=True)
  ((_, metrics),) = setting.run(make_batch())
  assert 'cosine' not in metrics
