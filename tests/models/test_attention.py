# SPDX-License-Identifier: Apache-2.0
"""CBAM against NumPy, and what of it is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.models import layers
from attnfd_jax.models.attention import CBAM


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def channel_gated(variables, x):
  """METHOD 2.5 in float64, up to x'; parameter-free without variables."""
  x = np.asarray(x, np.float64)
  pools = x.mean((1, 2)), x.max((1, 2))
  if not variables:
    gate = pools[0] + pools[1]
  else:
    params, gate = variables['params'], 0
    for pool in pools:
      hidden = pool @ params['mlp_reduce_kernel'] + params['mlp_reduce_bias']
      hidden = np.maximum(hidden, 0)
      gate += hidden @ params['mlp_expand_kernel'] + params['mlp_expand_bias']
  return x * sigmoid(gate)[:, None, None, :]


def spatial_logit(params, x):
  """The 7x7 convolution of [maximum, mean], before its normalization."""
  h, w = x.shape[1:3]
  pooled = np.stack([x.max(-1), x.mean(-1)], -1)
  pooled = np.pad(pooled, ((0, 0), (3, 3), (3, 3), (0, 0)))
  logit = np.zeros((len(x), h, w))
  for i in range(7):
    for j in range(7):
      kernel = params['spatial_conv']['kernel'][i, j, :, 0]
      logit += pooled[:, i : i + h, j : j + w] @ kernel
  return logit


def numpy_cbam(variables, x, *, train=False):
  x = channel_gated(variables, x)
  if not variables:
    return x * sigmoid(x.max(-1) + x.mean(-1))[..., None]
  logit = spatial_logit(variables['params'], x)
  stats = variables['batch_stats']['spatial_bn']
  mean, var = stats['mean'], stats['var']
  if train:
    mean, var = logit.mean(), logit.var()
  bn = variables['params']['spatial_bn']
  logit = (logit - mean) / np.sqrt(var + 1e-5) * bn['scale'] + bn['bias']
  return x * sigmoid(logit)[..., None]


def make(fill, channels=32, **options):
  module = CBAM(**options)
  x = 0.5 + 2 * np.random.default_rng(1).normal(size=(3, 5, 6, channels))
  x = x.astype(options.get('dtype', np.float32))
  init = functools.partial(module.init, train=False)
  return module, fill(jax.eval_shape(init, jax.random.key(0), x)), x


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('free', [False, True], ids=['learned', 'free'])
def test_equals_numpy(fill, free, train):
  module, variables, x = make(fill, parameter_free=free)
  assert bool(variables) == (not free)
  actual = jax.jit(functools.partial(module.apply, train=train))(variables, x)
  # Two sigmoids of sums of up to 98 products.
  np.testing.assert_allclose(
    actual, numpy_cbam(variables, x, train=train), rtol=2e-5, atol=1e-5
  )


def test_running_statistics_decay_by_0_99(fill):
  module, variables, x = make(fill)
  stats = variables['batch_stats']['spatial_bn']

  @jax.jit
  def run(variables):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  new = run(variables)[1]['batch_stats']['spatial_bn']
  logit = spatial_logit(variables['params'], channel_gated(variables, x))
  expected = 0.99 * stats['mean'] + 0.01 * logit.mean()
  # One mean of 90 float32 logits.
  np.testing.assert_allclose(new['mean'], expected, rtol=1e-5, atol=0)
  expected = 0.99 * stats['var'] + 0.01 * logit.var(ddof=1)
  np.testing.assert_allclose(new['var'], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
  ('channels', 'count'),
  [(2048, 526_564), (512, 33_412), (320, 13_240), (256, 8_564)],
)
def test_parameter_counts(key, channels, count):
  x = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
  params = jax.eval_shape(
    lambda x: CBAM().init(key, x, train=False)['params'], x
  )
  assert sum(p.size for p in jax.tree.leaves(params)) == count


def test_narrow_maps_keep_one_hidden_unit(fill):
  _, variables, _ = make(fill, channels=8)
  assert variables['params']['mlp_reduce_kernel'].shape == (8, 1)


def test_mlp_starts_as_in_torch(key):
  x = jnp.zeros((1, 1, 1, 512))
  init = functools.partial(CBAM().init, train=False)
  params = jax.jit(init)(key, x)['params']
  for name, fan_in in (('mlp_reduce', 512), ('mlp_expand', 32)):
    for part in ('kernel', 'bias'):
      largest = np.abs(params[f'{name}_{part}']).max() * fan_in**0.5
      assert 0.85 < largest <= 1


def test_spatial_start_can_be_chosen():
  shapes = []

  def spy(rng, shape, dtype=jnp.float32):
    shapes.append(shape)
    return layers.fan_out_normal(rng, shape, dtype)

  x = jax.ShapeDtypeStruct((1, 3, 3, 16), jnp.float32)
  module = CBAM(spatial_init=spy)
  jax.eval_shape(
    functools.partial(module.init, train=False), jax.random.key(0), x
  )
  assert shapes == [(7, 7, 2, 1)]


def test_freeze_mlp_stops_only_the_gradient_of_the_mlp(fill):
  module, variables, x = make(fill)
  frozen = CBAM(freeze_mlp=True)
  stats = {'batch_stats': variables['batch_stats']}

  def loss(module, params, x):
    y = module.apply({'params': params, **stats}, x, train=True)
    return jnp.sum(jnp.sin(y)), y

  params = variables['params']
  grad_fn = jax.jit(jax.grad(loss, (1, 2), has_aux=True), static_argnums=0)
  (grads, dx), y = grad_fn(module, params, x)
  (frozen_grads, frozen_dx), frozen_y = grad_fn(frozen, params, x)
  # Two programs: the compiler may order sums differently.
  np.testing.assert_allclose(frozen_y, y, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(frozen_dx, dx, rtol=1e-5, atol=1e-5)
  for name, grad in grads.items():
    if name.startswith('mlp_'):
      assert np.abs(grad).max() > 0, name
      np.testing.assert_array_equal(frozen_grads[name], 0)
    else:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        frozen_grads[name],
        grad,
      )


def test_bfloat16_inside_a_network(fill):
  module, variables, x = make(fill, dtype=jnp.bfloat16)

  @jax.jit
  def run(variables, x):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  y, updated = run(variables, x)
  assert y.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((variables, updated)):
    assert leaf.dtype == jnp.float32
  # 8 bits of mantissa through some ten operations.
  np.testing.assert_allclose(
    np.asarray(y, np.float32),
    numpy_cbam(variables, x, train=True),
    rtol=0.1,
    atol=0.1,
  )
