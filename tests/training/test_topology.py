# SPDX-License-Identifier: Apache-2.0
"""One device, four, a split height and a split state: the same numbers."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import process_run
import pytest
import tiny_run

from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.models import deeplab
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.runs import checkpoints
from attnfd_jax.training.step import make_state

PATH = tiny_run.ROOT / 'experiments' / 'topology' / 'compare.py'
MESH = {'data': 2, 'spatial': 2, 'fsdp': True}  # All at once.


@functools.cache
def load_compare():
  spec = importlib.util.spec_from_file_location('compare', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(autouse=True, scope='module')
def one_block_a_stage():
  """Half the time of a compilation, and all kinds of operations."""
  with pytest.MonkeyPatch.context() as patch:
    short = functools.partial(ResNet, (1, 1, 1, 1), False)
    patch.setitem(deeplab.BACKBONES, 'resnet18', short)
    yield


def train(**mesh):
  """Of a narrow DeepLabV3+, distilled: (losses of two steps, whole state after
  the first, its shardings)."""
  compare = load_compare()
  config = compare.make_config(**mesh).copy_and_resolve_references()
  with config.unlocked():
    # Maps of 25, 13, 7 and 4 rows: two devices do not share them evenly.
    config.data.crop_size = (50, 48)
  stage = compare.make_stage(config)
  losses, states = [], []
  with jax.default_matmul_precision('highest'):
    for loss, state in compare.train(stage, stage.init_state(), 2):
      losses.append(loss)
      states.append(compare.flatten(state))
  places = [x.sharding for x in jax.tree.leaves(state)]
  return losses, states[0], places


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  losses, state, places = train(**MESH)
  expected_losses, expected, _ = train(data=1)
  difference = load_compare().difference
  # Sums over the batch in another order.
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=0)
  assert state.keys() == expected.keys()
  for key, value in state.items():
    # Weights and momentum are the gradient here, where biases start at zero.
    # Not so after the second step: see experiments/topology.
    assert difference(value, expected[key]) < 2e-4, key
  assert not all(place.is_fully_replicated for place in places)
  for place in places:
    assert all(MESH[axis] == n for axis, n in place.mesh.shape.items())


class Source:
  """Images of several heights, odd ones too."""

  SIZES = ((33, 40), (30, 40), (33, 40), (31, 24), (48, 32))

  def __len__(self):
    return len(self.SIZES)

  def size(self, index):
    return self.SIZES[index]

  def __getitem__(self, index):
    generator = np.random.default_rng(index)
    size = self.SIZES[index]
    return {
      'image': generator.integers(0, 256, (*size, 3), np.uint8),
      'label': generator.integers(0, 5, size, np.uint8),
    }


@pytest.fixture
def small(fill):
  """A network that compiles fast, and its variables."""
  network = process_run.Small('resnet18', 5)
  init = functools.partial(network.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return network, fill(shapes)


@pytest.mark.parametrize('shape', [(4, 1), (2, 2), (1, 4)], ids=str)
def test_evaluation_on_a_mesh(small, shape):
  """Any height, any number of images, no matter how they are split."""
  count = functools.partial(
    evaluation.evaluate, *small, Source(), num_classes=5, batch_size=2
  )
  expected = count(mesh=sharding.make_mesh(1))
  found = count(mesh=sharding.make_mesh(*shape))
  pixels = sum(h * w for h, w in Source.SIZES)
  assert found.sum() == expected.sum() == pixels
  np.testing.assert_array_equal(found.sum(1), expected.sum(1))
  # Ties may round to either side.
  assert np.abs(found - expected).sum() <= 1e-3 * pixels


def memory(small, *shape):
  """Bytes per device that evaluating two images of 512 x 64 needs."""
  network, variables = small
  mesh = sharding.make_mesh(*shape)
  batch = {
    'image': jax.ShapeDtypeStruct((2, 512, 64, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((2, 512, 64), jnp.uint8),
  }
  program = evaluation.make_eval_step(network, 5, mesh).lower(variables, batch)
  return program.compile().memory_analysis().temp_size_in_bytes


def test_height_is_split_in_memory(small):
  # Maps are split, the bytes of the image and the seams are not.
  assert memory(small, 1, 4) < 0.4 * memory(small, 1, 1)


def example_state(seed):
  generator = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(generator.normal(size=shape), jnp.float32)

  variables = {
    'student': {
      'params': {
        'kernel': draw(3, 3, 32, 64),
        'odd': draw(3, 3, 31, 33),
        'tied': draw(64, 64),
        'bias': draw(64),
      },
      'batch_stats': {'mean': draw(8192)},
    }
  }
  return make_state(variables, optax.trace(0.9), ema=True)


def test_large_arrays_are_split():
  places = sharding.split_state(example_state(0), sharding.make_mesh(4))
  params = {
    'kernel': P(None, None, None, 'data'),
    'odd': P(),  # Nothing divides.
    'tied': P('data', None),
    'bias': P(),  # Small.
  }
  for tree in (
    places.params['student'],
    places.ema['student'],
    places.opt_state.trace['student'],
  ):
    assert {name: place.spec for name, place in tree.items()} == params
  # What training does not change by gradients stays whole.
  assert places.collections['student']['batch_stats']['mean'].spec == P()
  assert places.step.spec == P()


MESH_SHAPES = {
  'one': ((1, 1), False),
  'four': ((4, 1), False),
  'spatial': ((2, 2), False),
  'fsdp': ((4, 1), True),
  'fsdp_spatial': ((2, 2), True),
}


def places_on(name):
  shape, fsdp = MESH_SHAPES[name]
  mesh = sharding.make_mesh(*shape)
  if fsdp:
    return sharding.split_state(example_state(0), mesh)
  return jax.tree.map(lambda _: sharding.replicated(mesh), example_state(0))


@pytest.mark.parametrize(
  'before, after',
  [
    ('one', 'fsdp'),
    ('fsdp', 'one'),
    ('four', 'fsdp_spatial'),
    ('fsdp', 'spatial'),
    ('fsdp_spatial', 'fsdp'),
  ],
)
def test_a_checkpoint_goes_to_another_mesh(tmp_path, before, after):
  state = jax.device_put(example_state(1), places_on(before))
  with checkpoints.managed(tmp_path) as manager:
    checkpoints.save(manager, 3, state, {'seed': 0}, miou=0.5)
  target = jax.device_put(example_state(2), places_on(after))
  found, _ = checkpoints.restore(tmp_path, target)
  for new, wanted, old in zip(
    *map(jax.tree.leaves, (found, target, state)), strict=True
  ):
    assert new.sharding == wanted.sharding
    np.testing.assert_array_equal(new, old)


def test_what_is_split_comes_back_whole():
  state = example_state(0)
  placed = jax.device_put(state, places_on('fsdp'))
  whole = sharding.to_host(placed)
  for ours, theirs in zip(*map(jax.tree.leaves, (whole, state)), strict=True):
    assert isinstance(ours, np.ndarray | np.generic)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  'arguments, words',
  [
    ((5, 1), r'data=5 times config\.mesh\.spatial=1, but there are 4 devices'),
    ((0, 1), r'config\.mesh\.data=0'),
    ((4, 2), r'data=4 times config\.mesh\.spatial=2'),
    ((-1, 3), r'config\.mesh\.spatial=3 must divide the 4 devices'),
    ((-1, 0), r'config\.mesh\.spatial=0'),
  ],
)
def test_meshes_that_do_not_exist(arguments, words):
  with pytest.raises(InputError, match=words):
    sharding.make_mesh(*arguments)


def test_no_process_stays_idle(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert sharding.make_mesh(-1, 2).shape_tuple == (('data', 2), ('spatial', 2))
  with pytest.raises(InputError, match='leaves devices idle'):
    sharding.make_mesh(2)


def test_the_step_for_a_gpu_has_no_scatter():
  """--deterministic: XLA has no kernel for one that repeats its bits."""
  compare = load_compare()
  stage = compare.make_stage(compare.make_config(data=1))
  state = stage.abstract_state()
  batch = {
    'image': jax.ShapeDtypeStruct((8, 64, 64, 3), np.uint8),
    'label': jax.ShapeDtypeStruct((8, 64, 64), np.uint8),
  }
  rng = jax.eval_shape(lambda: jax.random.key(0))
  step = stage.make_train_step().trace(
    state, stage.teacher.variables, batch, rng
  )
  found = {
    platform: step.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cuda', 'cpu')
  }
  assert 'scatter' not in found['cuda']
  assert 'scatter' in found['cpu']  # So it would have been seen.
