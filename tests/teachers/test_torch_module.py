# SPDX-License-Identifier: Apache-2.0
"""PyTorch modules as teachers: what they compute, and what is refused."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import tiny_run

import attnfd_jax
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.teachers import sources, torch_module
from attnfd_jax.training import experiment
from attnfd_jax.training import stage as stages

NAMES = ('a', 'b', 'c')
# A module with what trips tracers: a buffer, batch norm, dropout, a resize.
FILE = '''
import torch
from torch import nn


class Net(nn.Module):

  def __init__(self, classes=9, stride=4, returns='tensor'):
    super().__init__()
    self.body = nn.Sequential(
      nn.Conv2d(3, 8, 3, stride=stride // 2, padding=1),
      nn.BatchNorm2d(8),
      nn.ReLU(inplace=True),
      nn.Conv2d(8, 12, 3, stride=2, padding=1),
    )
    self.register_buffer('shift', torch.linspace(-1, 1, 12)[:, None, None])
    self.dropout = nn.Dropout(0.5)
    self.head = nn.Conv2d(12, classes, 1)
    self.unused = nn.Conv2d(3, 3, 1)
    self.returns = returns
    self.held = torch.full((12, 1, 1), 0.5)  # No buffer.

  def forward(self, x):
    y = torch.relu(self.body(x) + self.shift * 2 * self.held)
    # Made in passing, as positions are; on the CPU unless one thinks of it.
    y = y + 0 * torch.arange(y.shape[-1]) + torch.zeros(1, device='cpu')
    y = self.head(self.dropout(y))
    if self.returns == 'whole':
      y = nn.functional.interpolate(y, x.shape[2:], mode='bilinear')
    return {
      'out': {'out': y, 'aux': y[:, :1]},
      'logits': Found(y),
      'tuple': (y, y[:, :1]),
      'text': 'logits',
    }.get(self.returns, y)


class Found:
  def __init__(self, logits):
    self.logits = logits


def seeded(**options):
  torch.manual_seed(0)
  net = Net(**options)
  nn.init.uniform_(net.body[1].running_mean)
  nn.init.uniform_(net.body[1].running_var, 0.5, 2)
  return net


class Patches(nn.Module):
  """Of a fixed patch size, as vision transformers are."""

  def __init__(self, classes=9, prefix=1):
    super().__init__()
    self.patches = nn.Conv2d(3, 16, 14, 14)
    self.token = nn.Parameter(torch.randn(1, prefix, 16))
    self.norm = nn.LayerNorm(16)
    self.head = nn.Conv2d(16, classes, 1)

  def forward(self, x):
    b, _, h, w = x.shape
    if h % 14 or w % 14:
      raise ValueError(f'{h}x{w} is no multiple of 14')
    tokens = self.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([self.token.expand(b, -1, -1), tokens], 1)
    y = self.norm(tokens)[:, self.token.shape[1]:].transpose(1, 2)
    return self.head(y.reshape(b, 16, h // 14, w // 14))


def make():
  return seeded()

def make_other():
  torch.manual_seed(1)
  return Net()

def make_patches():
  return Patches()

def make_resized():
  return Patches(), {'size_multiple': 14}

def make_nan():
  net = seeded()
  net.body[0].weight.data[0] = float('nan')
  return net

def make_overflow():
  net = seeded()
  net.shift[:] = float('inf')
  return net

def make_named():
  return seeded(), {'class_names': tuple('ihgfedcba')}

def make_three():
  return seeded(classes=3)

def make_nothing():
  return None

def make_text():
  return seeded(returns='text')

def make_list():
  return seeded(), ['mean']

def make_unknown():
  return seeded(), {'means': (0, 0, 0)}

def make_dark():
  return seeded(), {'mean': (0, 0), 'std': (1, 1, 1)}

def make_raises():
  raise KeyError('best.pt')

def make_torchvision():
  cause = RuntimeError('operator torchvision::nms does not exist')
  raise ImportError('Could not import module SegFormer') from cause

def make_half():
  return seeded().half()
'''


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('teacher') / 'teacher.py'
  path.write_text(FILE)
  return path


@pytest.fixture(scope='module')
def made(file):
  """The module of FILE; skips without PyTorch and torchax."""
  pytest.importorskip('torch', reason='needs the extra torch')
  pytest.importorskip('torchax', reason='needs the extra torch')
  namespace = {}
  exec(compile(file.read_text(), str(file), 'exec'), namespace)
  return namespace


def images(size=(40, 56), count=2):
  shape = (count, *size, 3)
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def from_config(file, function, **changes):
  config = default_config()
  config.teacher.factory = f'{file}:{function}'
  with config.unlocked():
    config.teacher.taps = changes.pop('taps', {})
  config.update_from_flattened_dict(changes)
  names = tuple('abcdefghi')
  return sources.from_config(
    resolve(config), None, names, sharding.make_mesh(1, 1)
  )


@pytest.mark.torch
@pytest.mark.parametrize(
  'returns', ['tensor', 'out', 'logits', 'tuple', 'whole']
)
def test_it_computes_what_pytorch_does(made, returns):
  torch = sys.modules['torch']
  module = made['seeded'](returns=returns)
  taps = {'backbone': 'body', 'first': 'body.0'}
  teacher = attnfd_jax.from_torch(module, taps)
  image = images()
  out = jax.jit(teacher.apply)(teacher.variables, image)
  with torch.no_grad():
    x = torch.from_numpy(image.transpose(0, 3, 1, 2))
    body = module.body(x)
    logits = module.head(torch.relu(body + module.shift))
    logits = torch.nn.functional.interpolate(
      logits, image.shape[1:3], mode='bilinear'
    )
  # Sums of at most 108 products, in another order.
  np.testing.assert_allclose(
    out['logits'], logits.numpy().transpose(0, 2, 3, 1), rtol=0, atol=2e-6
  )
  np.testing.assert_allclose(
    out['features']['backbone'],
    body.numpy().transpose(0, 2, 3, 1),
    rtol=0,
    atol=2e-6,
  )
  # The first convolution is changed in place by the ReLU after its norm: what
  # it returned is kept.
  assert out['features']['first'].shape == (2, 20, 28, 8)
  differences = teacher.compare(image)
  assert differences.keys() == {'logits', 'backbone', 'first'}
  assert max(differences.values()) < 1e-5


@pytest.mark.torch
def test_normalization_is_that_of_the_module(made):
  module = made['seeded']()
  mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
  plain = attnfd_jax.from_torch(module)
  other = attnfd_jax.from_torch(module, mean=mean, std=std)
  pixels = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)
  ours = attnfd_jax.normalize(pixels)
  theirs = (np.float32(pixels) / 255 - np.float32(mean)) / np.float32(std)
  np.testing.assert_allclose(
    other.apply(other.variables, ours)['logits'],
    plain.apply(plain.variables, theirs)['logits'],
    rtol=0,
    atol=1e-5,
  )


@pytest.mark.torch
def test_bfloat16_is_that_of_the_computation(made):
  module = made['seeded']()
  whole = attnfd_jax.from_torch(module, {'backbone': 'body'})
  half = attnfd_jax.from_torch(module, {'backbone': 'body'}, dtype='bfloat16')
  types = {x.dtype for x in jax.tree.leaves(half.variables)}
  assert types == {jnp.dtype('bfloat16'), jnp.dtype('int32')}
  ours, theirs = (x.apply(x.variables, images()) for x in (half, whole))
  assert ours['features']['backbone'].dtype == jnp.bfloat16
  assert ours['logits'].dtype == jnp.float32
  scale = np.max(np.abs(theirs['logits']))
  assert 0 < np.max(np.abs(ours['logits'] - theirs['logits'])) < 0.03 * scale
  # What is compared before training is exact all the same.
  assert max(half.compare(images()).values()) < 1e-5
  assert half.fingerprint == whole.fingerprint


@pytest.mark.torch
@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_tokens_become_a_map(made, prefix):
  module = made['Patches'](prefix=prefix)
  teacher = attnfd_jax.from_torch(module, {'backbone': 'norm'})
  image = images((28, 70))
  out = jax.jit(teacher.apply)(teacher.variables, image)
  torch = sys.modules['torch']
  with torch.no_grad():
    x = torch.from_numpy(image.transpose(0, 3, 1, 2))
    expected = module.norm(module.patches(x).permute(0, 2, 3, 1))
  assert out['features']['backbone'].shape == (2, 2, 5, 16)
  np.testing.assert_allclose(
    out['features']['backbone'], expected.numpy(), rtol=0, atol=1e-5
  )


@pytest.mark.torch
@pytest.mark.parametrize(
  ('count', 'size', 'grid'),
  [
    (16 * 25, (64, 98), (16, 25)),  # A stride of 4, rounded up.
    (37 * 37 + 1, (518, 518), (37, 37)),
    (37 * 37 + 5, (518, 518), (37, 37)),
    (4, (64, 64), (2, 2)),
    (12, (28, 70), '2x5 after 2 or 2x6 after 0'),
    (11, (64, 64), 'no grid of patches'),
  ],
)
def test_grids_of_tokens(made, count, size, grid):
  """By a module that gives so many tokens, whatever the image."""
  torch = sys.modules['torch']

  class Tokens(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens = torch.nn.Identity()

    def forward(self, x):
      y = torch.arange(count, dtype=torch.float32)[None, :, None]
      self.tokens(y + 0 * x[:, :1, 0, :1])
      return x

  teacher = attnfd_jax.from_torch(Tokens(), {'t': 'tokens'})
  if isinstance(grid, str):
    with pytest.raises(InputError, match=grid):
      teacher.apply({}, images(size, 1))
    return
  found = teacher.apply({}, images(size, 1))['features']['t']
  expected = np.arange(count)[-grid[0] * grid[1] :].reshape(1, *grid, 1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.torch
def test_any_size_is_resized_at_the_door(made):
  torch = sys.modules['torch']
  module = made['Patches']()
  teacher = attnfd_jax.from_torch(
    module, {'backbone': 'norm'}, size_multiple=14
  )
  image = images((33, 41))
  out = jax.jit(teacher.apply)(teacher.variables, image)
  resize = torch.nn.functional.interpolate
  with torch.no_grad():
    x = torch.from_numpy(image.transpose(0, 3, 1, 2))
    y = module(resize(x, (42, 42), mode='bilinear'))
    y = resize(y, (33, 41), mode='bilinear')
  np.testing.assert_allclose(
    out['logits'], y.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-5
  )
  assert out['features']['backbone'].shape == (2, 3, 3, 16)


@pytest.mark.torch
@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('align', [False, True], ids=['half', 'corners'])
@pytest.mark.parametrize(
  'to',
  [{'size': (12, 20)}, {'size': (40, 60)}, {'scale_factor': (0.51, 2.03)}],
  ids=['down', 'up', 'factor'],
)
def test_antialiased_resizes(made, mode, to, align):
  """As of the positions of timm's and DINO's transformers."""
  torch = sys.modules['torch']

  class Resized(torch.nn.Module):
    def forward(self, x):
      resize = torch.nn.functional.interpolate
      return resize(x, **to, mode=mode, antialias=True, align_corners=align)

  teacher = attnfd_jax.from_torch(Resized())
  assert teacher.compare(images((24, 28)))['logits'] < 1e-5


@pytest.mark.torch
def test_a_sharded_step_is_that_of_one_device(made):
  """Loss and gradient of KD and of a hint, on 1 and on 4 devices."""
  teacher = attnfd_jax.from_torch(made['seeded'](), {'backbone': 'body'})
  image, losses = images(count=4), []
  for count in (1, 4):
    mesh = sharding.make_mesh(count, 1)
    everywhere = sharding.replicated(mesh)
    variables = sharding.place(teacher.variables, everywhere)

    @jax.jit
    def step(weight, variables, image):
      def loss(weight):
        target = jax.lax.stop_gradient(teacher.apply(variables, image))
        maps = target['features']['backbone'] * weight
        return jnp.mean(jnp.square(maps)) + jnp.mean(target['logits'] * weight)

      return jax.value_and_grad(loss)(weight)

    batch = jax.device_put(image, sharding.by_batch(mesh))
    losses.append(step(jnp.float32(0.5), variables, batch))
    step(jnp.float32(0.25), variables, batch)
    assert step._cache_size() == 1
  np.testing.assert_allclose(*losses, rtol=1e-5)


SMP = """
import segmentation_models_pytorch as smp
import torch

def make():
  torch.manual_seed(0)
  return smp.DeepLabV3Plus('resnet18', encoder_weights=None, classes=9)
"""


@pytest.mark.torch
@pytest.mark.parametrize('kind', ['plain', 'smp'])
def test_a_training_step_under_it_on_1_and_4_devices(
  made, file, tmp_path, kind
):
  """The same loss; compiled once; the teacher is in no part of the state."""
  taps = {'decoder': 'body'}
  if kind == 'smp':
    try:
      import segmentation_models_pytorch  # noqa: F401
    except (ImportError, RuntimeError) as error:
      pytest.skip(f'segmentation_models_pytorch does not fit: {error}')
    file = tmp_path / 'smp_teacher.py'
    file.write_text(SMP)
    taps = {'decoder': 'decoder.block2'}
  config = small_run.make_config()
  config.teacher.factory = f'{file}:make'
  with config.unlocked():
    config.teacher.taps = taps
  config.distill.attnfd.match_size = 'to_student'
  config = resolve(config)
  dataset, losses = load_dataset(config.data), []
  for count in (1, 4):
    mesh = sharding.make_mesh(count, 1)
    names = dataset.class_names
    teacher = sources.from_config(config, None, names, mesh)
    plan = stages.plan('distill', config, dataset, mesh)
    stage = stages.with_teacher(plan, teacher)
    state = stage.init_state(log=lambda line: None)
    text = str(jax.tree_util.tree_structure(state))
    assert 'module.' not in text and 'encoder' not in text
    step, found = stage.make_train_step(), []
    batches = iter(stage.make_batches(0))
    for _ in range(2):
      state, metrics = step(state, teacher.variables, next(batches), stage.rng)
      found.append([metrics[key] for key in ('loss', 'attnfd', 'grad_norm')])
    assert step._cache_size() == 1
    losses.append(np.array(found))
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
  ('taps', 'message'),
  [
    (
      {'backbone': 'boddy'},
      "backbone='boddy' is not a submodule of Net; .* body",
    ),
    ({'backbone': 'encoder'}, 'choose from .*head'),
    ({'backbone': 'unused'}, "backbone='unused' was not called"),
  ],
)
def test_wrong_taps_are_named(made, taps, message):
  with pytest.raises(InputError, match=message):
    teacher = attnfd_jax.from_torch(made['seeded'](), taps)
    teacher.apply(teacher.variables, images())


@pytest.mark.torch
@pytest.mark.parametrize(
  ('function', 'message'),
  [
    ('make_nan', '1 of its 10 parameters hold NaN or infinity: body.0.weight'),
    ('make_nothing', 'returned NoneType without .*: return a torch.nn.Module'),
    ('make_list', 'must return a module, or a module and a dict'),
    ('make_unknown', "Unknown fact 'means'. Did you mean 'mean'"),
    ('make_dark', r'mean=\(0, 0\) must be three numbers'),
    ('make_raises', "make_raises': it raised KeyError: 'best.pt'"),
    ('gone', 'has no gone'),
    (
      'make_torchvision',
      'torchvision does not fit this torch; .*torch==2.12.1',
    ),
    (
      'make_named',
      r'names fit with .*class_map="\(8, 7, 6, 5, 4, 3, 2, 1, 0\)"',
    ),
  ],
)
def test_makers_that_fail_are_one_line(made, file, function, message):
  with pytest.raises(InputError, match=message) as error:
    from_config(file, function)
  assert '\n' not in str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize(
  ('function', 'size', 'message'),
  [
    ('make_three', (32, 32), 'Net has 3 classes, expected 9; .*class_map'),
    ('make_text', (32, 32), 'returns str without logits'),
    ('make_patches', (32, 32), r'it takes \(42, 42\): size_multiple=14'),
    ('make', (32, 32), None),
    ('make_half', (32, 32), None),
    ('make_resized', (32, 32), None),
  ],
)
def test_outputs_are_checked_without_computing(
  made, file, function, size, message
):
  teacher = from_config(file, function)
  inputs = {'variables': teacher.variables, 'rng': None}
  if message is None:
    networks.checked_outputs(teacher, 9, size, **inputs)
    assert max(teacher.compare(images((32, 32))).values()) < 1e-5
    return
  with pytest.raises(InputError, match=message) as error:
    networks.checked_outputs(teacher, 9, size, **inputs)
  assert '\n' not in str(error.value)


@pytest.mark.torch
def test_numbers_that_are_none_are_found_on_real_images(made, file):
  teacher = from_config(file, 'make_overflow', taps={'backbone': 'body'})
  with pytest.raises(InputError, match='logits has NaN or infinite values'):
    teacher.compare(images())


@pytest.mark.torch
def test_what_differs_between_pytorch_and_jax_is_named(made, file):
  teacher = from_config(file, 'make', taps={'backbone': 'body'})

  def wrong(variables, args):
    out = teacher.function(variables, args)
    return out | {'tap backbone': out['tap backbone'] * 1.01}

  other = dataclasses.replace(teacher, function=wrong)
  with pytest.raises(InputError, match='Net: backbone differs by 1.0e-02'):
    other.compare(images())


@pytest.mark.torch
def test_an_operation_without_a_form_in_jax_names_the_versions(made):
  torchax = sys.modules['torchax']
  teacher = attnfd_jax.from_torch(made['make']())

  def missing(variables, args):
    raise torchax.tensor.OperatorNotFound('aten.some_operation')

  other = dataclasses.replace(teacher, function=missing)
  message = r'some_operation; torchax has no such operation here \(torch \d'
  with pytest.raises(InputError, match=message):
    other.apply(other.variables, images())


@pytest.mark.torch
@pytest.mark.parametrize('function', ['make_named', 'make'])
def test_a_class_map_is_the_order_of_the_logits(made, file, function):
  order = (3, 0, 8, 1, 2, 4, 5, 6, 7)
  plain = from_config(file, 'make')
  mapped = from_config(file, function, **{'teacher.class_map': order})
  logits = plain.apply(plain.variables, images())['logits']
  found = mapped.apply(mapped.variables, images())['logits']
  np.testing.assert_array_equal(found, logits[..., list(order)])
  assert mapped.class_names == tuple('abcdefghi')
  assert mapped.fingerprint == plain.fingerprint
  for wrong, message in (
    ((0, 1), "index for each of the data set's 9 classes, not 2"),
    ((-1,) * 9, 'from 0'),
    ((9,) * 9, 'from 0 to 8' if function == 'make_named' else '0 to 8'),
  ):
    with pytest.raises(InputError, match=message):
      teacher = from_config(file, function, **{'teacher.class_map': wrong})
      teacher.apply(teacher.variables, images())


@pytest.mark.torch
def test_fingerprints_are_of_the_weights(made):
  first, again, other = (
    attnfd_jax.from_torch(module).fingerprint
    for module in (made['make'](), made['make'](), made['make_other']())
  )
  assert first == again != other and len(first) == 64


@pytest.fixture
def distilled(made, file, tmp_path):
  """A finished run under a PyTorch teacher: its config and folder."""
  config = tiny_run.tiny_config()
  config.stages = ('distill',)
  config.teacher.factory = f'{file}:make'
  with config.unlocked():
    config.teacher.taps = {'backbone': 'body'}
  config.distill.attnfd.match_size = 'to_teacher'
  experiment.train(config, tmp_path / 'run')
  return config, tmp_path / 'run'


@pytest.mark.torch
def test_a_run_under_a_pytorch_teacher(distilled, file, capsys):
  config, run = distilled
  result = json.loads((run / 'distill' / 'result.json').read_text())
  assert result['teacher']['name'] == 'Net'
  assert result['teacher']['source'] == f'{file}:make'
  assert 0 <= result['teacher']['miou'] < 1
  # Nothing of it is saved: what is in the checkpoint is the student's.
  network, variables, _ = attnfd_jax.load(run / 'distill')
  shapes = jax.tree.map(jnp.shape, networks.abstract_variables(network))
  assert jax.tree.map(jnp.shape, variables) == shapes
  text = str([*(run / 'distill').rglob('*')])
  assert '.pt' not in text
  # Other weights under the same name are refused where it would go on.
  (run / 'distill' / 'result.json').unlink()
  source = file.read_text()
  config.num_epochs = 1.0
  torch = sys.modules['torch']
  state = torch.random.get_rng_state()
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(torch, 'manual_seed', lambda seed: torch.random.seed())
      with pytest.raises(InputError, match='written with teacher [0-9a-f]{64}'):
        experiment.train(config, run)
  finally:
    torch.random.set_rng_state(state)
  assert file.read_text() == source
  experiment.train(config, run)
  again = json.loads((run / 'distill' / 'result.json').read_text())
  assert again['miou'] == result['miou']


@pytest.mark.torch
def test_the_commands_score_and_show_it(made, file, tmp_path):
  root = pathlib.Path(__file__).parents[2]
  flags = [
    f'--config={root}/configs/quickstart.py',
    f'--config.teacher.factory={file}:make',
    '--config.data.val_scenes=2',
    '--config.data.image_size=(32,48)',
  ]
  out = tmp_path / 'scores.json'
  done = tiny_run.run_verb('evaluate', *flags, f'--output={out}')
  assert done.returncode == 0, done.stderr
  scores = json.loads(out.read_text())
  assert scores['checkpoint'] == f'teacher Net of {file}:make'
  assert scores['images'] == 2 and scores['step'] is None
  from PIL import Image

  Image.new('RGB', (48, 32)).save(tmp_path / 'x.png')
  done = tiny_run.run_verb(
    'predict', *flags, f'--input={tmp_path}/x.png', f'--output={tmp_path}/out'
  )
  assert done.returncode == 0, done.stderr
  ids = np.asarray(Image.open(tmp_path / 'out' / 'x.png'))
  assert ids.shape == (32, 48) and ids.max() < 9


@pytest.mark.parametrize('verb', ['evaluate', 'predict'])
def test_the_commands_need_one_network(verb, tmp_path):
  more = ['--input=x', '--output=y'] if verb == 'predict' else []
  config = '--config=configs/quickstart.py'
  for flags, message in (
    ((config,), 'The config names no teacher'),
    ((config, '--checkpoint=runs/x'), 'name one network, not two'),
    ((config, '--step=3'), '--step goes with --checkpoint'),
  ):
    done = tiny_run.run_verb(verb, *flags, *more)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count('\n') == 1


def test_without_torch_the_remedy_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torchax', None)
  with pytest.raises(InputError, match=r'attnfd_jax\[torch\]'):
    torch_module.from_torch(object())


def test_torch_stays_away_until_it_is_asked_for():
  """Of what is imported by the package and by its commands."""
  code = (
    'import sys; import attnfd_jax; '
    'from attnfd_jax import cli, export, predict, evaluate, main, convert; '
    'from attnfd_jax.teachers import sources, torch_module; '
    'attnfd_jax.from_torch; '
    "found = {'torch', 'torchax', 'torchvision'} & sys.modules.keys(); "
    'assert not found, found'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_a_run_without_such_a_teacher_imports_no_torch(tmp_path):
  code = (
    'import sys; import tiny_run; from attnfd_jax.training import experiment; '
    f"experiment.train(tiny_run.tiny_config(), '{tmp_path}/run'); "
    "assert 'torch' not in sys.modules"
  )
  root = pathlib.Path(__file__).parents[1]
  env = tiny_run.environment() | {'PYTHONPATH': f'{root}:{root.parent}'}
  subprocess.run([sys.executable, '-c', code], check=True, env=env)
