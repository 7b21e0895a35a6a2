# SPDX-License-Identifier: Apache-2.0
"""Layers against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from plain import normal, plain_convolution
import pytest

from attnfd_jax.devices import sharding
from attnfd_jax.models import layers, resizing

# Sums of at most some hundred products, in another order than NumPy's.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


@pytest.mark.parametrize(
  ('size', 'strides', 'dilation'),
  [(1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 2, 2), (7, 2, 1)],
)
def test_conv_pads_symmetrically(fill, size, strides, dilation):
  module = layers.Conv(3, size, strides, dilation, use_bias=True)
  x = normal(0, 1, 8, 9, 2)
  variables = fill(jax.eval_shape(module.init, jax.random.key(0), x))
  params = variables['params']
  padding = dilation * (size - 1) // 2
  kernel = params['kernel']
  expected = plain_convolution(x, kernel, strides, dilation, padding)
  actual = module.apply(variables, x)
  assert actual.shape[1:3] == (-(-8 // strides), -(-9 // strides))
  np.testing.assert_allclose(actual, expected + params['bias'], **CLOSE)


def test_conv_of_joined_maps(fill):
  coarse, x = normal(0, 1, 2, 3, 4), normal(1, 1, 5, 9, 2)
  module = layers.Conv(3)
  init = functools.partial(module.init, coarse=coarse)
  variables = fill(jax.eval_shape(init, jax.random.key(0), x))
  joined = jnp.concatenate([resizing.resize(coarse, 5, 9), x], -1)
  expected = module.apply(variables, joined)
  actual = module.apply(variables, x, coarse=coarse)
  np.testing.assert_allclose(actual, expected, **CLOSE)
  affine = normal(2, 3), normal(3, 3)
  expected = module.apply(variables, joined, affine)
  actual = module.apply(variables, x, affine, coarse=coarse)
  np.testing.assert_allclose(actual, expected, **CLOSE)


def test_conv_norm_leaves_its_weights_alone(fill):
  module, x = layers.ConvNorm(3), normal(0, 1, 5, 9, 2)
  init = functools.partial(module.init, train=False)
  variables = fill(jax.eval_shape(init, jax.random.key(0), x))
  first, second = (module.apply(variables, x, train=False) for _ in range(2))
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
  'options',
  [{'strides': 2}, {'kernel_size': 2}, {'padding': 0}, {'depthwise': True}],
)
def test_conv_of_joined_maps_keeps_the_size(key, options):
  coarse, x = normal(0, 1, 2, 3, 4), normal(1, 1, 5, 9, 2)
  with pytest.raises(ValueError, match='coarse needs a dense kernel'):
    layers.Conv(3, **options).init(key, x, coarse=coarse)


@pytest.mark.parametrize(
  ('init', 'shape', 'fan'),
  [
    (layers.fan_in_normal, (3, 3, 64, 16), 9 * 64),
    (layers.fan_in_normal, (3, 3, 1, 1024), 9),
    (layers.fan_out_normal, (3, 3, 64, 16), 9 * 16),
    (layers.fan_out_normal, (1, 1, 64, 128), 128),
  ],
  ids=['fan_in', 'depthwise', 'fan_out', 'connector'],
)
def test_starts_are_untruncated_normals(key, init, shape, fan):
  x = np.asarray(init(key, shape, jnp.float32)) * (fan / 2) ** 0.5
  # Four standard errors of 8192 or more samples.
  np.testing.assert_allclose(x.std(), 1, rtol=0, atol=0.032)
  np.testing.assert_allclose(x.mean(), 0, rtol=0, atol=0.045)
  # A truncated normal of the same deviation ends at 2.28.
  assert np.abs(x).max() > 3


def test_bias_starts_as_in_torch(key):
  params = layers.Conv(4000, 1, use_bias=True).init(
    key, jnp.zeros((1, 1, 1, 256))
  )['params']
  bias = params['bias']
  assert 0.99 / 16 < np.abs(bias).max() <= 1 / 16
  assert bias.min() < -0.9 / 16


def test_batch_norm_in_training(key):
  module = layers.BatchNorm(momentum=0.8)
  x = 3 + 2 * normal(0, 2, 3, 1, 4)
  variables = {
    'params': {'scale': normal(1, 4), 'bias': normal(2, 4)},
    'batch_stats': {'mean': normal(3, 4), 'var': 1 + normal(4, 4) ** 2},
  }
  y, updated = module.apply(variables, x, train=True, mutable=['batch_stats'])
  wide = x.astype(np.float64).reshape(6, 4)
  mean, var = wide.mean(0), wide.var(0)
  scale, bias = variables['params'].values()
  expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
  np.testing.assert_allclose(y, expected, **CLOSE)
  old, new = variables['batch_stats'], updated['batch_stats']
  expected = 0.8 * old['mean'] + 0.2 * mean
  np.testing.assert_allclose(new['mean'], expected, **CLOSE)
  # PyTorch keeps the unbiased variance: 6 / 5 of the batch's.
  expected = 0.8 * old['var'] + 0.2 * var * 6 / 5
  np.testing.assert_allclose(new['var'], expected, **CLOSE)


def test_batch_norm_in_evaluation():
  x = normal(0, 2, 3, 2, 4)
  stats = {'mean': normal(3, 4), 'var': 1 + normal(4, 4) ** 2}
  params = {'scale': normal(1, 4), 'bias': normal(2, 4)}
  y, updated = layers.BatchNorm().apply(
    {'params': params, 'batch_stats': stats},
    x,
    train=False,
    mutable=['batch_stats'],
  )
  expected = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  expected = expected * params['scale'] + params['bias']
  np.testing.assert_allclose(y, expected, **CLOSE)
  jax.tree.map(np.testing.assert_array_equal, updated['batch_stats'], stats)


def test_batch_norm_can_discard_its_update(key):
  module = layers.BatchNorm()
  x = 5 + normal(0, 4, 3, 3, 2)
  variables = module.init(key, x, train=True)
  y = module.apply(variables, x, train=True)
  # 36 values to zero mean, up to the rounding of 5.
  np.testing.assert_allclose(np.mean(y, (0, 1, 2)), 0, rtol=0, atol=1e-5)
  # Neither init nor apply moved the start.
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  np.testing.assert_array_equal(variables['batch_stats']['var'], 1)


def test_batch_norm_far_from_zero(key):
  x = 1000 + normal(0, 8, 8, 8, 1)
  y = layers.BatchNorm().apply(
    layers.BatchNorm().init(key, x, train=False), x, train=True
  )
  # 1000 has 6e-5 between neighbors; E[x^2] - E[x]^2 would be off by 0.06.
  np.testing.assert_allclose(np.std(y), 1, rtol=1e-3, atol=0)


def test_batch_norm_of_a_single_value_is_finite(key):
  x = jnp.full((1, 1, 1, 2), 3.0)
  variables = layers.BatchNorm().init(key, x, train=False)
  y, updated = layers.BatchNorm().apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  np.testing.assert_array_equal(y, 0)
  # 0.9 of the start, and no variance to add.
  np.testing.assert_allclose(
    updated['batch_stats']['var'], 0.9, rtol=1e-6, atol=0
  )


def test_batch_norm_in_bfloat16(key):
  x = (100 + normal(0, 4, 8, 8, 2)).astype(jnp.bfloat16)
  module = layers.BatchNorm()
  variables = module.init(key, x, train=False)
  y, updated = module.apply(variables, x, train=True, mutable=['batch_stats'])
  assert y.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((variables, updated)):
    assert leaf.dtype == jnp.float32
  exact = np.asarray(x, np.float64)
  # Of the rounded input, the statistics are those of float32.
  np.testing.assert_allclose(
    updated['batch_stats']['mean'],
    0.1 * exact.mean((0, 1, 2)),
    rtol=1e-6,
    atol=0,
  )


def test_batch_norm_is_global_on_a_sharded_batch(key):
  mesh = sharding.make_mesh()
  assert mesh.size > 1
  module = layers.BatchNorm()
  # Each device alone would see another mean.
  x = (
    normal(0, 8, 3, 3, 2) + np.arange(8, dtype=np.float32)[:, None, None, None]
  )
  variables = module.init(key, x, train=False)

  def run(x):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  everywhere, by_batch = sharding.replicated(mesh), sharding.by_batch(mesh)
  sharded = jax.jit(run, in_shardings=by_batch, out_shardings=everywhere)(x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), sharded, run(x)
  )


def test_a_chain_of_blocks_is_computed_once():
  def operations(blocks):
    def chain(x, weight):
      for _ in range(blocks):
        x = layers.computed_once(
          jax.nn.relu(x) + jax.nn.relu(x) @ weight, weight[0, 0]
        )
      return x

    x, weight = normal(0, 64, 8), normal(1, 8, 8)
    cost = jax.jit(chain).lower(x, weight).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)['flops']

  first, second, fourth = operations(4), operations(8), operations(16)
  assert fourth - second < 2.1 * (second - first)


def test_finished_changes_nothing():
  x, known = normal(0, 3, 4), jnp.float32(-2)
  value, vjp = jax.vjp(jax.jit(layers.computed_once), x, known)
  np.testing.assert_array_equal(value, x)
  gradient, of_known = vjp(x + 1)
  np.testing.assert_array_equal(gradient, x + 1)
  assert of_known == 0
  broken = layers.computed_once(x, jnp.float32(np.nan))
  assert np.all(np.isnan(broken))


@pytest.mark.parametrize('size', [(6, 7), (9, 4)], ids=['even_odd', 'odd_even'])
def test_max_pool_pads_with_minus_infinity(size):
  x = -1 - np.abs(normal(0, 2, *size, 3))  # Padding by 0 would win.
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  rows, columns = range(0, size[0], 2), range(0, size[1], 2)
  expected = [
    [padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns] for i in rows
  ]
  expected = np.transpose(expected, (2, 0, 1, 3))
  np.testing.assert_array_equal(layers.max_pool(x), expected)
