# SPDX-License-Identifier: Apache-2.0
"""SKD: the pair-wise term, the game, and who trains whom."""

import functools

from distill.test_discriminator import discriminate
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from attnfd_jax import distill
from attnfd_jax.devices import sharding
from attnfd_jax.distill import adversarial, pooling, skd
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.training import experiment, optim

# In float64: two orders of the same sums.
EXACT = {'rtol': 1e-9, 'atol': 1e-11}
CLOSE = {'rtol': 2e-5, 'atol': 2e-6}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed, size):
  return np.linalg.qr(normal(seed, size, size))[0]


# The pair-wise term.


def plain_cosines(x, kernel):
  """[b, m, m], window by window."""
  found = []
  for image in x:
    places = [
      image[i : i + kernel[0], j : j + kernel[1]].max((0, 1))
      for i in range(0, image.shape[0], kernel[0])
      for j in range(0, image.shape[1], kernel[1])
    ]
    places = [place / np.linalg.norm(place) for place in places]
    found.append(np.array([[p @ q for q in places] for p in places]))
  return np.array(found)


@pytest.mark.parametrize('kernel', [(1, 1), (2, 3), (2, 2), (5, 7)])
def test_pairs_against_numpy(x64, kernel):
  s, t = normal(0, 3, 5, 7, 4), normal(1, 3, 5, 7, 6)
  with x64():
    found = skd.pair_distance(s, t, kernel)
  difference = plain_cosines(s, kernel) - plain_cosines(t, kernel)
  expected = (difference**2).mean((1, 2))
  np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.parametrize(
  ('size', 'options', 'places'),
  [
    ((8, 6), {}, 4),
    ((33, 65), {}, 9),
    ((1, 5), {}, 3),
    ((33, 65), {'pool_scale': 1.0}, 1),
    ((64, 128), {'pool_size': 2}, 32 * 64),
    ((3, 1), {'pool_size': 2}, 2),
  ],
)
def test_places(size, options, places, monkeypatch):
  """2 x 2 for even sizes, 3 x 3 for odd ones; CIRKD's windows are of 2 x 2."""
  found = []
  cosines = skd.place_cosines

  def note(*arguments, **options):
    found.append(cosines(*arguments, **options))
    return found[-1]

  monkeypatch.setattr(skd, 'place_cosines', note)
  outputs = make_outputs(0, size=size), make_outputs(1, size=size)
  method = skd.SKD(**PAIRS, **options)
  jax.eval_shape(functools.partial(apply, method), {}, *outputs)
  assert [x.shape for x in found] == [(2, places, places)] * 2


def test_the_gradient_of_a_maximum():
  """That of one largest value, also where several are."""
  x = normal(0, 1, 5, 7, 2).round().astype(np.float32)
  y, grads = jax.value_and_grad(lambda x: jnp.sum(pooling.max_pool(x, 3, 4)))(x)
  windows = [x[:, i : i + 3, j : j + 4] for i in (0, 3) for j in (0, 4)]
  np.testing.assert_allclose(y, sum(w.max((1, 2)).sum() for w in windows))
  for i in (0, 3):
    for j in (0, 4):
      part = np.asarray(grads[:, i : i + 3, j : j + 4])
      window = x[:, i : i + 3, j : j + 4]
      np.testing.assert_array_equal(part.sum((1, 2)), 1)
      assert (part[window < window.max((1, 2), keepdims=True)] == 0).all()


def test_what_changes_no_pairs():
  s = normal(0, 2, 4, 4, 5).astype(np.float32)
  t = normal(1, 2, 4, 4, 5).astype(np.float32)
  distance = functools.partial(skd.pair_distance, kernel=(1, 1))
  expected = distance(s, t)
  assert (expected > 0.01).all() and (expected < 4).all()
  mixing = orthogonal(2, 5).astype(np.float32)
  lengths = np.exp(normal(3, 2, 4, 4, 1)).astype(np.float32)
  np.testing.assert_allclose(distance(s @ mixing, t), expected, **CLOSE)
  np.testing.assert_allclose(distance(lengths * s, t), expected, **CLOSE)
  # A maximum commutes with a positive factor.
  found = skd.pair_distance(s, 3 * s, (2, 2))
  np.testing.assert_allclose(found, 0, atol=1e-12)
  # Against the opposite cosine: 2^2 off the diagonal, which adds nothing.
  x = np.ones((1, 1, 2, 1), np.float32)
  y = np.array([1, -1], np.float32).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(distance(x, y), 2.0)


def test_lengths_as_constants_change_the_gradient_alone():
  s, t = (normal(i, 2, 4, 4, 5).astype(np.float32) for i in (0, 1))
  (plain, plain_grads), (fixed, fixed_grads) = (
    jax.value_and_grad(
      lambda s, x=x: jnp.sum(skd.pair_distance(s, t, (1, 1), detach_norm=x))
    )(s)
    for x in (False, True)
  )
  np.testing.assert_allclose(plain, fixed, rtol=1e-6)
  # Longer features change nothing: their gradient is across them, place by
  # place; that of the authors is not.
  for grads, across in ((plain_grads, True), (fixed_grads, False)):
    along = np.abs(np.sum(s * grads, -1)).max()
    assert (along < 1e-6) == across


@pytest.mark.parametrize('detach', [False, True])
def test_pairs_of_zeros_are_finite(detach):
  zeros, t = np.zeros((2, 3, 3, 4), np.float32), normal(0, 2, 3, 3, 4)
  for target in (t.astype(np.float32), zeros):
    value, grads = jax.value_and_grad(
      lambda s, t=target: jnp.sum(
        skd.pair_distance(s, t, (1, 1), detach_norm=detach)
      )
    )(zeros)
    assert np.isfinite(value) and np.isfinite(grads).all()


# The players' terms.


def test_hinge():
  two = jnp.full(3, 2.0)
  loss = functools.partial(adversarial.discriminator_loss, game='hinge')
  assert loss(two, -two) == 0
  for score in (-3.0, -0.5, 0.0, 0.7, 4.0):
    assert loss(score * two, score * two) >= 2
  np.testing.assert_allclose(
    loss(jnp.array([0.5, 3.0]), jnp.array([-0.5])), 0.75
  )


def test_wgan():
  loss = functools.partial(adversarial.discriminator_loss, game='wgan_gp')
  scores = jnp.array([1.0, -2.0])
  assert loss(scores, scores) == 0
  np.testing.assert_allclose(loss(jnp.array([1.0, 3.0]), scores), -2.5)


def test_penalty():
  slopes = np.zeros((2, 1, 2, 2), np.float32)
  slopes[0, 0, 0] = 3, 4
  value, grads = jax.value_and_grad(adversarial.gradient_penalty)(slopes)
  np.testing.assert_allclose(value, (16 + 1) / 2)
  # (5 - 1) (3, 4) / 5 of two images; a slope of zero has no direction.
  np.testing.assert_allclose(grads[0, 0, 0], (2.4, 3.2), rtol=1e-6)
  np.testing.assert_array_equal(grads[1], 0)


def test_mixtures():
  real, fake = (normal(i, 3, 2, 2, 2).astype(np.float32) for i in (0, 1))
  found = adversarial.mixed(real, fake, jnp.array([1.0, 0.0, 0.25]))
  np.testing.assert_array_equal(found[:2], [real[0], fake[1]])
  expected = 0.25 * real[2] + 0.75 * fake[2]
  np.testing.assert_allclose(found[2], expected, rtol=1e-6)


# The method.

# Two channels: the whole discriminator compiles fast.
SMALL = {'discriminator_channels': 2}
PAIRS = {'adversarial_weight': 0.0, 'discriminator_weight': 0.0}
LABELS = np.full((2, 9, 11), 255, np.uint8)


def make_outputs(seed, channels=5, size=(5, 6), dtype=np.float32):
  return {
    'logits': normal(seed, 2, 9, 11, 3).astype(dtype),
    'features': {'aspp': normal(seed + 9, 2, *size, channels).astype(dtype)},
  }


def apply(method, variables, student, teacher, *, train=True):
  return method.apply(
    variables,
    student,
    teacher,
    LABELS,
    train=train,
    step=0,
    rngs={'distill': jax.random.key(7)},
    mutable=[name for name in variables if name != 'params'],
  )


def draw(method, student, teacher, seed=0):
  """Variables in which no part is neutral, of the type of the outputs."""
  outputs = jax.tree.map(lambda x: x.astype(np.float32), (student, teacher))
  shapes = distill.abstract_variables(method, *outputs)
  generator = np.random.default_rng(seed)

  def values(path, leaf):
    if path[-1].key == 'var':
      x = generator.uniform(0.5, 1.5, leaf.shape)
    else:
      x = generator.normal(size=leaf.shape)
    if path[0].key == 'spectral_norm':
      x = x / np.linalg.norm(x)
    return x.astype(student['logits'].dtype)

  return jax.tree_util.tree_map_with_path(values, shapes)


def losses(method, variables, student, teacher):
  """The loss, its gradients of params, student and teacher, the terms."""

  def loss_fn(params, student, teacher):
    variables_ = {**variables, 'params': params}
    (loss, terms), updated = apply(method, variables_, student, teacher)
    return loss.value, (terms, updated)

  grad_fn = jax.jit(jax.value_and_grad(loss_fn, (0, 1, 2), has_aux=True))
  return grad_fn(variables.get('params', {}), student, teacher)


def largest(tree):
  return max(np.abs(x).max() for x in jax.tree.leaves(tree))


def test_weights_of_the_terms():
  assert distill.WEIGHTS['skd'] == 1
  outputs = make_outputs(0), make_outputs(1, 7)
  method = skd.SKD(**SMALL)
  variables = draw(method, *outputs)
  run = jax.jit(functools.partial(apply, method))
  ((total, count), terms), _ = run(variables, *outputs)
  names = {'pair', 'adversarial', 'discriminator', 'penalty', 'teacher_score'}
  assert set(terms) == names
  expected = 0.5 * terms['pair'] + 0.1 * terms['adversarial']
  expected += 0.1 * terms['discriminator']
  assert count == 2
  np.testing.assert_allclose(total, 2 * expected, rtol=1e-5)
  (alone, (terms, _)), _ = losses(skd.SKD(**PAIRS), {}, *outputs)
  assert set(terms) == {'pair'}
  np.testing.assert_allclose(alone, 0.5 * terms['pair'], rtol=1e-6)


def test_without_the_game_there_is_no_discriminator():
  outputs = make_outputs(0), make_outputs(1)
  assert not jax.tree.leaves(
    distill.abstract_variables(skd.SKD(**PAIRS), *outputs)
  )


@pytest.mark.parametrize('game', adversarial.GAMES)
def test_each_player_sees_the_other_as_a_constant(game):
  student, teacher = make_outputs(0), make_outputs(1)
  make = functools.partial(skd.SKD, game=game, pair_weight=0.0, **SMALL)
  deceives = make(adversarial_weight=1.0, discriminator_weight=0.0)
  judges = make(adversarial_weight=0.0, discriminator_weight=1.0)
  variables = draw(deceives, student, teacher)
  _, (params, ours, theirs) = losses(deceives, variables, student, teacher)
  assert largest(params) == largest(theirs) == 0
  assert largest(ours['logits']) > 1e-6 and largest(ours['features']) == 0
  _, (alone, ours_alone, theirs) = losses(judges, variables, student, teacher)
  assert largest(ours_alone) == largest(theirs) == 0
  for leaf in jax.tree.leaves(alone['discriminator']['conv1']):
    assert np.abs(leaf).max() > 1e-6
  # One gradient of the sum is that of each for its own player.
  both = make(adversarial_weight=1.0, discriminator_weight=1.0)
  _, (params, together, _) = losses(both, variables, student, teacher)
  np.testing.assert_allclose(together['logits'], ours['logits'], **CLOSE)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    params,
    alone,
  )


def test_passes_in_the_order_of_the_authors(x64):
  """Against NumPy: scores, penalty by finite differences, statistics."""
  student, teacher = (make_outputs(i, dtype=np.float64) for i in (0, 1))
  method = skd.SKD(pair_weight=0.0, **SMALL)
  variables = draw(method, student, teacher)
  with x64():
    (_, terms), moved = jax.jit(functools.partial(apply, method))(
      variables, student, teacher
    )
    share = jax.jit(
      lambda: method.apply(
        {},
        rngs={'distill': jax.random.key(7)},
        method=lambda module: jax.random.uniform(
          module.make_rng('distill'), (2,), jnp.float64
        ),
      )
    )()
  s, t = student['logits'], teacher['logits']
  params = variables['params']['discriminator']
  vectors = variables['spectral_norm']['discriminator']
  deceived, vectors = discriminate(s, params, vectors)
  real, vectors = discriminate(t, params, vectors)
  fake, vectors = discriminate(s, params, vectors)
  np.testing.assert_allclose(terms['adversarial'], -deceived.mean(), **EXACT)
  np.testing.assert_allclose(terms['teacher_score'], real.mean(), **EXACT)
  expected = fake.mean() - real.mean() + 10 * float(terms['penalty'])
  np.testing.assert_allclose(terms['discriminator'], expected, **EXACT)
  share = np.asarray(share).reshape(2, 1, 1, 1)
  assert 0 < share.min() < share.max() < 1
  x = share * t + (1 - share) * s
  _, final = discriminate(x, params, vectors)
  found = moved['spectral_norm']['discriminator']
  for name, vector in final.items():
    np.testing.assert_allclose(found[name]['u'], vector['u'], **EXACT)
  slopes, tiny = np.zeros_like(x), 1e-6
  for index in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[index] = tiny
    up, down = (
      discriminate(x + sign * step, params, vectors)[0].sum()
      for sign in (1, -1)
    )
    slopes[index] = (up - down) / (2 * tiny)
  lengths = np.sqrt((slopes**2).sum((1, 2, 3)))
  # Kinks of the leaky ReLU are rarely within a millionth.
  expected = ((lengths - 1) ** 2).mean()
  np.testing.assert_allclose(terms['penalty'], expected, rtol=1e-5)
  mean = variables['batch_stats']['discriminator']['bn']['mean']
  for logits in (s, t, s, x):
    mean = 0.9 * mean + 0.1 * logits.mean((0, 1, 2))
  found = moved['batch_stats']['discriminator']['bn']['mean']
  np.testing.assert_allclose(found, mean, **EXACT)


def test_nothing_moves_in_evaluation():
  outputs = make_outputs(0), make_outputs(1)
  method = skd.SKD(**SMALL)
  variables = distill.init_distiller(method, outputs)
  run = jax.jit(functools.partial(apply, method, train=False))
  (loss, _), kept = run(variables, *outputs)
  assert np.isfinite(loss.value)
  for name, tree in kept.items():
    jax.tree.map(np.testing.assert_array_equal, tree, variables[name])
  # Nothing is drawn either: images count by themselves.
  parts = [
    run(variables, *jax.tree.map(lambda x, i=i: x[i : i + 1], outputs))[0][0]
    for i in range(2)
  ]
  np.testing.assert_allclose(sum(x.total for x in parts), loss.total, rtol=1e-5)


@pytest.mark.parametrize('game', adversarial.GAMES)
@pytest.mark.parametrize('same', [0.0, 1.0], ids=['zeros', 'equal'])
def test_equal_outputs_are_finite(game, same):
  outputs = jax.tree.map(lambda x: x * np.float32(same), make_outputs(0))
  method = skd.SKD(game=game, **SMALL)
  variables = distill.init_distiller(method, (outputs, outputs))
  (loss, (terms, _)), grads = losses(method, variables, outputs, outputs)
  leaves = jax.tree.leaves((loss, terms, grads))
  assert all(np.isfinite(x).all() for x in leaves)
  assert terms['pair'] == 0
  if game == 'wgan_gp':
    # Between the two passes singular vectors have moved: nearly equal.
    np.testing.assert_allclose(
      terms['teacher_score'], -terms['adversarial'], atol=0.1
    )
  else:
    assert terms['discriminator'] > 1.5


def test_bfloat16_outputs():
  outputs = [make_outputs(i, dtype=jnp.bfloat16) for i in (0, 1)]
  method = skd.SKD(**SMALL)
  variables = distill.init_distiller(method, outputs)
  (loss, (terms, _)), (_, ours, _) = losses(method, variables, *outputs)
  assert loss.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in terms.values())
  assert ours['logits'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  'game', [pytest.param('wgan_gp', marks=pytest.mark.slow), 'hinge']
)
def test_one_device_equals_four(game):
  outputs = [
    jax.tree.map(lambda x: np.concatenate([x, x[::-1] + 1]), make_outputs(i))
    for i in (0, 1)
  ]
  method = skd.SKD(game=game, **SMALL)
  variables = jax.tree.map(np.asarray, distill.init_distiller(method, outputs))
  found = []
  for devices in (1, 4):
    mesh = sharding.make_mesh(devices)
    placed = jax.device_put(outputs, sharding.by_batch(mesh))
    everywhere = jax.device_put(variables, sharding.replicated(mesh))
    (loss, (_, state)), grads = losses(method, everywhere, *placed)
    found.append(jax.device_get((loss, state, grads)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), *found
  )
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'game': 'gan'}, "game='gan' must be one of wgan_gp, hinge"),
    ({'pair_weight': -1.0}, 'pair_weight=-1.0 must be 0 or more'),
    ({**PAIRS, 'pair_weight': 0.0}, 'One of pair_weight, adversarial_weight'),
    ({'pool_scale': 2.0}, 'pool_scale=2.0 must be from 0 to 1'),
    (
      {'discriminator_optimizer': 'lion'},
      "discriminator_optimizer='lion' must be one of adam, sgd",
    ),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(InputError, match=message):
    skd.SKD(**options)


def test_wrong_outputs():
  student, teacher = make_outputs(0), make_outputs(1)
  other = teacher | {'features': {'aspp': np.ones((2, 3, 3, 4), np.float32)}}
  with pytest.raises(InputError, match="differ in size at 'aspp'.*match_size"):
    distill.make_method('skd', student, other)
  other = teacher | {'logits': teacher['logits'][..., :2]}
  with pytest.raises(InputError, match='Logits differ.*the same classes'):
    distill.make_method('skd', student, other)
  other = teacher | {'features': {}}
  with pytest.raises(InputError, match='student has aspp, the teacher none'):
    distill.make_method('skd', student, other)
  # The game alone needs no map.
  distill.make_method('skd', student, other, pair_weight=0.0)


# Training.


def make_tx(**options):
  methods = {'skd': skd.SKD(**SMALL, **options)}
  method = distill.WeightedSum(methods, {'skd': 1}, num_steps=10)
  return optim.make_optimizer(
    lambda step: 0.5,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.1,
    groups=method.parameter_groups(),
    optimizers=method.optimizers(),
  )


def moved_by(tx, steps=1):
  """What student and discriminator move by in the last step; gradients 1."""
  params = {
    'student': {'classifier': jnp.full(2, 3.0)},
    'distiller': {
      'methods_skd': {'discriminator': {'conv1': jnp.full(2, 3.0)}}
    },
  }
  state = tx.init(params)
  for _ in range(steps):
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
  return (
    updates['student']['classifier'],
    updates['distiller']['methods_skd']['discriminator']['conv1'],
  )


@pytest.mark.usefixtures('standard_promotion')
def test_the_optimizer_of_the_discriminator():
  student, own = moved_by(make_tx())
  np.testing.assert_allclose(student, -5 * (1 + 0.1 * 3), rtol=1e-6)
  # Adam's first step is the rate; no decay, no tenfold rate.
  np.testing.assert_allclose(own, -4e-4, rtol=1e-5)
  _, own = moved_by(make_tx(discriminator_schedule='constant'), steps=5)
  np.testing.assert_allclose(own, -4e-4, rtol=1e-5)
  _, own = moved_by(make_tx(), steps=6)
  np.testing.assert_allclose(own, -4e-4 * 0.5**0.9, rtol=1e-5)
  constant = {'discriminator_schedule': 'constant', 'discriminator_lr': 0.1}
  sgd = make_tx(discriminator_optimizer='sgd', **constant)
  _, own = moved_by(sgd, steps=2)
  gradient = 1 + 5e-4 * 3
  np.testing.assert_allclose(own, -0.1 * 1.9 * gradient, rtol=1e-5)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Two epochs of two steps with a teacher that is trained before."""
  folder = tmp_path_factory.mktemp('skd')
  with small_run.kept_programs(folder / 'programs'):
    with jax.numpy_dtype_promotion('standard'):
      experiment.train(make_config(), folder / 'run')
    yield folder / 'run'


def make_config():
  config = small_run.make_config()
  config.stages = ('teacher', 'distill')
  config.distill.method = 'kd+skd'
  config.distill.skd.taps = ('decoder',)
  config.distill.skd.discriminator_channels = 2
  return config


def test_both_players_learn(finished):
  states = small_run.stored_states(finished / 'distill')
  first, last = states[2], states[4]

  def moved(part, name):
    """{path: whether it did}."""
    before, after = (
      flax.traverse_util.flatten_dict(x[part][name], sep='/')
      for x in (first, last)
    )
    return {path: (after[path] != x).any() for path, x in before.items()}

  assert all(moved('params', 'student').values())
  assert all(moved('collections', 'distiller').values())
  own = moved('params', 'distiller')
  # Maps of 8 x 8 leave one pixel to attention, no choice to learn; what shifts
  # all scores cancels in this game.
  still = {path.split('/', 2)[2] for path, x in own.items() if not x}
  assert still <= {
    'attention4/value/bias',
    'last/bias',
    *(
      f'attention{i}/{name}/{part}'
      for i in (3, 4)
      for name in ('query', 'key')
      for part in ('kernel', 'bias')
    ),
  }
  assert {path.split('/')[1] for path in own} == {'discriminator'}
  parts = moved('collections', 'distiller')
  assert {path.split('/')[-1] for path in parts} == {'u', 'v', 'mean', 'var'}
  records = small_run.read_lines(finished / 'distill')
  records = [record for record in records if record['kind'] == 'train']
  assert [record['step'] for record in records] == [1, 2, 3, 4]
  for record in records:
    total = record['ce'] + record['kd'] + record['skd']
    assert record['loss'] == pytest.approx(total, rel=1e-5)
    for term in ('pair', 'adversarial', 'discriminator', 'penalty'):
      assert np.isfinite(record[f'skd_{term}'])
  assert records[0]['skd_penalty'] != records[3]['skd_penalty']


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')
def test_an_interrupted_game_ends_as_the_whole_one(
  finished, tmp_path, monkeypatch
):
  """Bit for bit, with singular vectors, statistics and Adam's moments."""
  # The teacher is scored three times, the student after two steps and four.
  interrupt = small_run.interrupting(evaluation.evaluate, 5)
  monkeypatch.setattr(evaluation, 'evaluate', interrupt)
  workdir = tmp_path / 'run'
  with pytest.raises(KeyboardInterrupt):
    experiment.train(make_config(), workdir)
  assert not (workdir / 'distill' / 'result.json').exists()
  experiment.train(make_config(), workdir)
  log = (workdir / 'distill' / 'log.txt').read_text()
  assert 'resumed from step 2' in log
  small_run.assert_same_run(workdir / 'distill', finished / 'distill')
