# SPDX-License-Identifier: Apache-2.0
"""Recipe `reference`, row by row: METHOD sections 4 and 5, and what tests it.

Files are in tests/; those without one are below.

4.1 groups, phases
  tensors and values of each group     training/test_optim.py::
                                         test_groups_of_the_reference
  epoch 0 trains connectors alone, then
  all but them; the MLPs of gates never  test_what_moves_in_each_epoch
                                         training/test_optim.py::
                                         test_what_rests_is_bit_identical
  rates: connectors at that of the
  backbone (quirk of epoch 0), head 10x,
  momentum empty when a phase begins     test_updates_of_the_first_steps
                                         training/test_optim.py::test_phases
  no gradient for MLPs and teacher       test_golden.py::
                                         test_gradients_of_a_step
                                         distill/test_attnfd.py::
                                  test_teacher_has_no_gradient_and_never_changes
  statistics move in epoch 0, those of
  fixed connectors after it              test_statistics_move_in_each_epoch
  gradient of fixed connectors reaches
  the student                            test_golden.py::
                                         test_gradients_of_a_step
  teacher fixed, its statistics unused   test_the_teacher_stays_as_it_is
4.2 optimizer, schedule
  SGD with nesterov, decay of all        test_updates_of_the_first_steps
                                         training/test_optim.py::
                                         test_sgd_is_that_of_torch
  power 0.9, no warm-up, no clipping     test_optimizer_of_the_three_configs
                                         training/test_optim.py::
                                         test_poly_schedule
  rates, epochs, batch of the data sets  test_optimizer_of_the_three_configs
  steps of an epoch and of a run         test_number_of_steps
4.3 one step
  teacher in train mode                  test_the_teacher_stays_as_it_is
  its dropout, but not in ASPP           test_the_teacher_drops
                                         test_dropout_rates
  masks of their own                     test_student_and_teacher_drop_apart
  student's dropout, not in ASPP         test_dropout_rates
                                         models/test_deeplab.py::test_dropouts
  attention over all pixels              test_ignored_pixels_are_distilled
  cross-entropy over valid pixels, at the
  size of the label, divided by b        test_loss_of_a_step
                                         test_losses.py::test_mask_equals_subset
                                         test_golden.py::test_losses_of_a_step
  baseline: all groups at once, ASPP
  dropout, the same division             test_the_baseline
4.5 data
  flip, scale, crop, blur                test_augmentation
                                         data/test_transforms.py
  label of padding                       test_padding_of_the_data_sets
4.6 evaluation
  short side 513, labels too             test_evaluation
                                         data/test_pipeline.py::
                               test_resized_labels_have_the_size_of_the_image
  every epoch, the best on val is kept   test_optimizer_of_the_three_configs
                                         training/test_stages.py::
                                         test_every_step_is_logged_once
5 switches
  all values                             test_switches
  they reach the loss                    test_switches_reach_the_loss
  teacher_attention                      test_gates_are_those_of_the_checkpoint
                                         distill/test_attnfd.py::
                                         test_stored_gates_replace_the_teachers
  student_attention                      distill/test_attnfd.py::
                                         test_gradients_of_the_student_gates
  norm_scope, reduction                  distill/test_attnfd.py::
                                         test_scopes_and_reductions
  attn_lambda, ce_batch_division         test_loss_of_a_step
  update_norms_twice                     test_norms_are_updated_twice
                                         models/test_deeplab.py::
                                         test_update_norms_twice_moves_three_norms
                                         test_golden.py::
                                         test_statistics_after_a_step

Not as the authors': batches run across the ends of epochs, where they end an
epoch with a smaller one; and the rate does not scale with the batch.
"""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.config import RECIPES, resolve
from attnfd_jax.data import classes, pipeline
from attnfd_jax.data.sources import Dataset
from attnfd_jax.data.transforms import Augment
from attnfd_jax.devices import sharding
from attnfd_jax.inference import evaluation
from attnfd_jax.losses import Mean, softmax_cross_entropy
from attnfd_jax.models import layers, resizing
from attnfd_jax.models import network as networks
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.teachers.teacher import FrozenNetwork
from attnfd_jax.training import stage as stages
from attnfd_jax.training.step import make_train_step

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
BATCH, RECORDS = 4, 7  # Two steps an epoch.
LR, STEPS = 0.007, 120 * RECORDS // BATCH


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


# One layer in each part, under the names of the real ones.


class Part(nn.Module):
  name_of_layer: str
  channels: int
  strides: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    return layers.ConvNorm(
      self.channels, 1, self.strides, name=self.name_of_layer
    )(x, train=train)


class Small(DeepLabV3Plus):
  """The taps and the dropouts of DeepLabV3+, which compile fast."""

  @nn.compact
  def __call__(self, image, *, train, dropout=None):
    dropout = train if dropout is None else dropout

    def drop(rate, x):
      return nn.Dropout(rate)(x, deterministic=not dropout)

    features = {}
    x = Part('stem', self.aspp_channels, 8, name='backbone')(image, train=train)
    features['backbone'] = x
    x = Part('point', self.aspp_channels, name='aspp')(x, train=train)
    features['aspp'] = x = nn.relu(x)
    x = drop(self.decoder_dropout, drop(self.aspp_dropout, x))
    x = Part('conv2', self.decoder_channels, name='decoder')(x, train=train)
    features['decoder'] = x = nn.relu(x)
    if self.in_path_attention:  # For their variables.
      for tap, y in features.items():
        CBAM(name=f'attention_{tap}')(y, train=train)
    x = drop(self.head_dropout, x)
    head = layers.Conv(self.num_classes, 1, use_bias=True, name='classifier')
    coarse = head(x)
    logits = resizing.resize(coarse, *image.shape[1:3])
    return {'logits': logits, 'coarse_logits': coarse, 'features': features}


class Source:
  def __init__(self, length):
    self._length = length

  def __len__(self):
    return self._length


def make_dataset(length=RECORDS):
  source = Source(length)
  palette = np.zeros((len(classes.VOC), 3), np.uint8)
  splits = {'train': source, 'val': source}
  return Dataset('pascal_voc', tuple(classes.VOC), palette, splits)


@pytest.fixture(scope='module', autouse=True)
def small():
  networks.NETWORKS['reference'] = Small
  # Programs that run a few times are not worth optimizing.
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  del networks.NETWORKS['reference']
  jax.config.update('jax_disable_most_optimizations', False)


def draw(tree, seed):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: generator.uniform(0.2, 1, x.shape).astype(np.float32), tree
  )


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """Path of a teacher in the authors' format, and its gates."""
  network = Small('resnet18', 21, aspp_channels=6, decoder_channels=5)
  gated = networks.abstract_variables(network.clone(in_path_attention=True))
  gates = draw(torch_models.split_gates(gated)[1], 1)
  tensors = torch_models.export_torch(
    draw(networks.abstract_variables(network), 0), gates, backbone='resnet18'
  )
  path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
  torch_files.write_torch(path, {'state_dict': tensors})
  return path, gates


def make_stage(checkpoint, name='distill', **changes):
  """A stage of configs/pascal_voc.py with small images and networks."""
  config = load('pascal_voc')
  config.batch_size = BATCH
  config.data.crop_size = (32, 48)
  config.teacher.checkpoint = str(checkpoint)
  config.teacher.backbone = 'resnet18'
  for role, (aspp, decoder) in (('teacher', (6, 5)), ('student', (4, 3))):
    config[role].network = 'reference'
    config[role].aspp_channels, config[role].decoder_channels = aspp, decoder
  config.update_from_flattened_dict(changes)
  mesh = sharding.make_mesh(1)
  return stages.make_stage(
    name, resolve(config), make_dataset(), mesh, checkpoint.parent
  )


def make_batch(seed=0):
  generator = np.random.default_rng(seed)
  image = generator.integers(0, 256, (BATCH, 32, 48, 3), np.uint8)
  label = generator.integers(0, 21, (BATCH, 32, 48), np.uint8)
  label[:, :5] = 255
  return {'image': image, 'label': label}


class Run:
  """A stage with its first state; `step` leaves it as it is."""

  def __init__(self, stage, start=None):
    self.stage = stage
    self.start = start or jax.device_get(stage.init_state())
    self.teacher_variables = stage.teacher.variables if stage.teacher else {}
    self._step = stage.make_train_step()

  def step(self, state, batch, *, seed=0, teacher_variables=None):
    state, metrics = self._step(
      jax.tree.map(jnp.array, state),
      teacher_variables or self.teacher_variables,
      batch,
      jax.random.key(seed),
    )
    assert np.isfinite(metrics['grad_norm'])
    return jax.device_get((state, metrics))


@pytest.fixture(scope='module')
def distilled(checkpoint):
  return Run(make_stage(checkpoint[0]))


@pytest.fixture(scope='module')
def history(distilled):
  """States at the start and after each of four steps, two an epoch."""
  states = [distilled.start]
  for seed in range(4):
    states.append(distilled.step(states[-1], make_batch(seed))[0])
  return states


def flat(tree):
  return {
    '/'.join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def kind(path):
  """Role of a parameter, told without the rules under test."""
  if path.startswith('student/'):
    return 'backbone' if '/backbone/' in path else 'head'
  if 'connectors_' in path:
    return 'connectors'
  if '/mlp_' in path:
    return 'mlp'
  return 'backbone' if 'gates_backbone' in path else 'head'


def moved(before, after):
  """Paths of arrays that changed in any bit."""
  before, after = flat(before), flat(after)
  return {path for path in before if np.any(before[path] != after[path])}


def test_what_moves_in_each_epoch(history):
  paths = flat(history[0].params)
  assert sum(kind(path) == 'mlp' for path in paths) == 12
  for step in range(4):
    trained = ('connectors',) if step < 2 else ('backbone', 'head')
    # Decay moves even a tensor without gradient.
    expected = {path for path in paths if kind(path) in trained}
    found = moved(history[step].params, history[step + 1].params)
    assert found == expected, step


def test_updates_of_the_first_steps(distilled):
  """Of the stage's own optimizer, for gradients and weights of one value."""
  stage, gradient, weight = distilled.stage, 0.25, 2.0
  assert (stage.epoch_steps, stage.num_steps) == (2, STEPS)
  params, grads = (
    jax.tree.map(lambda x, v=v: np.full_like(x, v), distilled.start.params)
    for v in (weight, gradient)
  )
  tx = stage.make_optimizer()
  update, state = jax.jit(tx.update), tx.init(params)
  d = gradient + 5e-4 * weight
  # Momentum is empty at the first step of a phase.
  buffers = [d, d + 0.9 * d] * 2
  for step in range(4):
    updates, state = update(grads, state, params)
    rate = LR * (1 - step / STEPS) ** 0.9
    change = -rate * (d + 0.9 * buffers[step])
    expected = dict.fromkeys(('backbone', 'head', 'connectors', 'mlp'), 0.0)
    if step < 2:
      expected['connectors'] = change  # Not ten times as much.
    else:
      expected |= {'backbone': change, 'head': 10 * change}
    for path, value in flat(updates).items():
      # Some float32 products.
      np.testing.assert_allclose(
        value, expected[kind(path)], rtol=1e-5, atol=1e-12, err_msg=path
      )


def test_statistics_move_in_each_epoch(history):
  def statistics(state):
    return {k: v['batch_stats'] for k, v in state.collections.items()}

  paths = set(flat(statistics(history[0])))
  for part in ('student/backbone', 'student_gates_', 'connectors_'):
    assert any(part in path for path in paths)
  for before, after in zip(history[:-1], history[1:], strict=True):
    # Connectors, too, when they are fixed.
    assert moved(statistics(before), statistics(after)) == paths


def test_the_teacher_stays_as_it_is(distilled, history):
  """In train mode: its running statistics are not read, and do not move."""
  before, after = (
    state.collections['distiller']['teacher']
    for state in (history[0], history[-1])
  )
  assert not moved(before, after)
  variables = distilled.teacher_variables
  other = variables | {
    'batch_stats': jax.tree.map(lambda x: 2 * x + 1, variables['batch_stats'])
  }
  _, first = distilled.step(history[2], make_batch())
  _, second = distilled.step(history[2], make_batch(), teacher_variables=other)
  assert first['attnfd'] == second['attnfd']
  state = history[2]
  gates = jax.tree.map(np.copy, before)
  for tap in gates['methods_attnfd']['batch_stats'].values():
    tap['spatial_bn']['mean'] += 3
  collections = state.collections | {
    'distiller': state.collections['distiller'] | {'teacher': gates}
  }
  _, third = distilled.step(
    state.replace(collections=collections), make_batch()
  )
  assert first['attnfd'] == third['attnfd']


def test_gates_are_those_of_the_checkpoint(distilled, checkpoint):
  found = distilled.start.collections['distiller']['teacher']['methods_attnfd']
  assert not moved(found, checkpoint[1])
  assert flat(found).keys() == flat(checkpoint[1]).keys()


def test_loss_of_a_step(distilled, history):
  _, metrics = distilled.step(history[2], make_batch())
  taps = [metrics[f'attnfd_{tap}'] for tap in ('backbone', 'aspp', 'decoder')]
  # Rounding of short sums.
  np.testing.assert_allclose(metrics['attnfd'], sum(taps), rtol=1e-6, atol=0)
  np.testing.assert_allclose(
    metrics['loss'],
    metrics['ce'] / BATCH + 2 * metrics['attnfd'],
    rtol=1e-6,
    atol=0,
  )
  # A mean over pixels: near log 21 for a head of random weights.
  assert 2 < metrics['ce'] < 6


def test_ignored_pixels_are_distilled(distilled, history):
  batch = make_batch()
  _, metrics = distilled.step(history[2], batch)
  unlabeled = batch | {'label': np.full_like(batch['label'], 255)}
  _, other = distilled.step(history[2], unlabeled)
  assert metrics['attnfd'] == other['attnfd'] > 0
  assert other['ce'] == 0 < metrics['ce']


def rates(network):
  return network.aspp_dropout, network.decoder_dropout, network.head_dropout


def test_dropout_rates(distilled):
  """Where each drops: models/test_deeplab.py."""
  assert rates(distilled.stage.network) == (0.0, 0.5, 0.1)
  assert rates(distilled.stage.teacher.network) == (0.0, 0.5, 0.1)


def test_the_teacher_drops(checkpoint, distilled):
  """The student does not, here: its maps are the same for every seed."""
  stage = make_stage(checkpoint[0], **{'student.decoder_dropout': 0.0})
  run = Run(stage, distilled.start)
  first, second = (
    run.step(run.start, make_batch(), seed=seed)[1] for seed in (0, 1)
  )
  same = {tap: first[tap] == second[tap] for tap in first if 'attnfd_' in tap}
  assert same == {
    'attnfd_backbone': True,
    'attnfd_aspp': True,
    'attnfd_decoder': False,  # Downstream of the inner dropout.
  }


class Noise:
  """A network whose map is its own noise."""

  def apply(self, variables, image, *, train, rngs, mutable=None, **options):
    del variables, options
    assert train
    noise = jax.random.uniform(rngs['dropout'], (64,))
    out = {'logits': jnp.zeros((*image.shape[:3], 21)), 'map': noise}
    return out if mutable is None else (out, {})


class Difference:
  """A distiller of two noises."""

  def apply(self, variables, student, teacher, labels, **options):
    del variables, labels, options
    mean = jnp.mean(jnp.abs(student['map'] - teacher['map']))
    return ({'noise': Mean(mean, jnp.ones(()))}, {}), {}

  def weight(self, name, step):
    return 1.0

  def task_weight(self, step):
    return 1.0


def test_student_and_teacher_drop_apart(distilled):
  noise = Noise()
  train_step = make_train_step(
    noise,
    distilled.stage.make_optimizer(),
    task_loss=lambda *x: {'ce': softmax_cross_entropy(*x)},
    teacher=FrozenNetwork(noise, {}, 'noise', (), True, True),
    distiller=Difference(),
    schedule=lambda step: 0.0,
    mesh=sharding.make_mesh(1),
  )
  state = distilled.start.replace(collections={'student': {}, 'distiller': {}})
  _, metrics = train_step(
    jax.tree.map(jnp.array, state), {}, make_batch(), jax.random.key(0)
  )
  # Two independent uniform numbers differ by a third.
  distance = metrics['loss'] - metrics['ce']
  np.testing.assert_allclose(distance, 1 / 3, rtol=0, atol=0.15)


def test_the_baseline(checkpoint):
  run = Run(make_stage(checkpoint[0], 'student'))
  assert run.stage.distiller is run.stage.teacher is None
  assert rates(run.stage.network) == (0.5, 0.5, 0.1)
  assert not run.stage.network.update_norms_twice
  state, metrics = run.step(run.start, make_batch())
  np.testing.assert_allclose(
    metrics['loss'], metrics['ce'] / BATCH, rtol=1e-6, atol=0
  )
  assert moved(run.start.params, state.params) == set(flat(state.params))


def test_norms_are_updated_twice():
  config = load('pascal_voc')
  config.student.backbone = 'mobilenet_v2'
  config = resolve(config)
  found = [
    stages.make_network(name, config, 21).update_norms_twice
    for name in ('distill', 'student')
  ]
  assert found == [True, False]


def test_switches():
  assert RECIPES['reference'] == {
    'data.label_pad': 'dataset',
    'distill.aspp_dropout': 0.0,
    'distill.ce_batch_division': True,
    'distill.aicsd.reduction': 'batchmean',
    'distill.attnfd.connector_schedule': 'first_epoch',
    'distill.attnfd.norm_scope': 'batch',
    'distill.attnfd.reduction': 'batchmean',
    'distill.attnfd.student_attention': 'mlp_frozen',
    'distill.attnfd.teacher_attention': 'checkpoint',
    'distill.attnfd.teacher_bn': 'batch',
    'distill.lad.reduction': 'batchmean',
    'distill.teacher_bn': 'batch',
    'distill.teacher_dropout': True,
    'distill.update_norms_twice': True,
    'eval.protocol': 'reference',
  }


def test_switches_reach_the_loss(distilled):
  method = distilled.stage.distiller.methods['attnfd']
  assert set(method.taps) == {'backbone', 'aspp', 'decoder'}
  assert {
    'norm_scope': method.norm_scope,
    'reduction': method.reduction,
    'teacher_attention': method.teacher_attention,
    'student_attention': method.student_attention,
    'teacher_bn': method.teacher_bn,
    'fan_out_taps': method.fan_out_taps,
  } == {
    'norm_scope': 'batch',
    'reduction': 'batchmean',
    'teacher_attention': 'checkpoint',
    'student_attention': 'mlp_frozen',
    'teacher_bn': 'batch',
    'fan_out_taps': ('backbone',),
  }
  assert dict(distilled.stage.distiller.weights) == {'attnfd': 2.0}


# Name: learning rate, epochs, label of padding.
PUBLISHED = {
  'pascal_voc': (0.007, 120, 0),
  'cityscapes': (0.01, 200, 255),
  'coco': (0.1, 30, 0),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_optimizer_of_the_three_configs(name):
  config = resolve(load(name))
  assert config.recipe == 'reference'
  assert (config.teacher.backbone, config.student.backbone) == (
    'resnet101',
    'resnet18',
  )
  for network in (config.teacher, config.student):
    found = network.lr, network.num_epochs, network.output_stride
    assert found == (*PUBLISHED[name][:2], 16)
  options = config.optim
  assert config.batch_size == 6
  assert (options.name, options.momentum, options.nesterov) == (
    'sgd',
    0.9,
    True,
  )
  assert (options.power, options.weight_decay) == (0.9, 5e-4)
  assert (options.head_lr_scale, options.warmup_epochs) == (10.0, 0.0)
  assert options.clip_norm is None
  assert options.accumulate == 1 and options.ema_decay == 0
  assert (config.loss.name, config.loss.weighting) == ('ce', 'none')
  assert config.distill.method == 'attnfd'
  assert config.eval.every_epochs == 1 and config.checkpoint.keep_best == 1


@pytest.mark.parametrize(
  ('name', 'images', 'epoch', 'total'),
  [
    ('pascal_voc', 1464, 244, 29_280),
    # The authors take 496 a epoch, the last of 5 images: 99,200.
    ('cityscapes', 2975, 496, 99_167),
  ],
  ids=['pascal_voc', 'cityscapes'],
)
def test_number_of_steps(name, images, epoch, total):
  stage = stages.make_stage(
    'student',
    resolve(load(name)),
    make_dataset(images),
    sharding.make_mesh(1),
    pathlib.Path(),
  )
  assert (stage.epoch_steps, stage.num_steps) == (epoch, total)


@pytest.mark.parametrize('name', PUBLISHED)
def test_padding_of_the_data_sets(name):
  augment = pipeline.make_augment(resolve(load(name)))
  assert augment.label_fill == PUBLISHED[name][2]


class Recorder:
  """A generator that remembers which integers it was asked for."""

  def __init__(self):
    self.asked = []
    self._generator = np.random.default_rng(0)

  def integers(self, *bounds):
    self.asked.append(bounds)
    return self._generator.integers(*bounds)

  def random(self):
    return self._generator.random()


@pytest.mark.parametrize('name', PUBLISHED)
def test_augmentation(name):
  config = resolve(load(name))
  assert pipeline.make_augment(config) == Augment(
    base_size=513,
    crop_size=(513, 513),
    scale_range=(0.5, 2.0),
    label_fill=PUBLISHED[name][2],
    flip=0.5,
    blur=0.5,
    photometric=0.0,
  )
  assert config.data.balanced == 0
  record = {
    'image': np.zeros((40, 50, 3), np.uint8),
    'label': np.zeros((40, 50), np.uint8),
  }
  rng = Recorder()
  pipeline.make_augment(config).random_map(record, rng)
  # The short side is 256 to 1026, both included.
  assert rng.asked[0] == (256, 1027)


def test_evaluation(distilled, monkeypatch):
  seen = {}

  def spy(*arguments, **options):
    seen.update(options)
    return np.eye(21, dtype=np.int64)

  monkeypatch.setattr(evaluation, 'evaluate', spy)
  distilled.stage.evaluate({})
  assert seen['protocol'] == 'reference'
  batches = {}

  def batch_spy(*arguments, **options):
    batches.update(options)
    return ()

  monkeypatch.undo()
  monkeypatch.setattr(pipeline, 'eval_batches', batch_spy)
  distilled.stage.evaluate({})
  assert batches['short_side'] == 513 and batches['resize_labels']
