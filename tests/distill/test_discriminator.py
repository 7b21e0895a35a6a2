# SPDX-License-Identifier: Apache-2.0
"""The discriminator against NumPy in float64, and against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.distill import discriminator
from attnfd_jax.distill.discriminator import (
  Discriminator,
  SelfAttention,
  SpectralConv,
)

# All in float64: two orders of the same sums.
CLOSE = {'rtol': 1e-9, 'atol': 1e-11}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def draw(module, x, seed=0, **options):
  """Variables of float64 with unit singular vectors; nothing is compiled."""
  init = functools.partial(module.init, **options)
  x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  shapes = jax.eval_shape(init, jax.random.key(0), x)
  generator = np.random.default_rng(seed)

  def values(path, leaf):
    if path[-1].key == 'var':
      return generator.uniform(0.5, 1.5, leaf.shape)
    x = generator.normal(size=leaf.shape)
    if path[0].key == 'spectral_norm':
      return x / np.linalg.norm(x)
    return 0.5 * x

  return jax.tree_util.tree_map_with_path(values, shapes)


# The same in NumPy, written from the formulas.


def convolve(x, kernel, bias, *, stride, padding):
  size = kernel.shape[0]
  x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
  missing = [max(size - n, 0) for n in x.shape[1:3]]
  x = np.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  windows = windows[:, ::stride, ::stride]
  return np.einsum('bhwcij,ijcf->bhwf', windows, kernel) + bias


def spectral(params, vectors):
  """The normalized kernel and the vectors after one iteration."""
  kernel = params['kernel']
  matrix = kernel.reshape(-1, kernel.shape[-1]).T
  v = matrix.T @ vectors['u']
  v /= np.linalg.norm(v)
  u = matrix @ v
  u /= np.linalg.norm(u)
  return kernel / (u @ matrix @ v), {'u': u, 'v': v}


def attend(x, params):
  b, h, w, c = x.shape
  x = x.reshape(b, h * w, c)
  query, key, value = (
    x @ params[name]['kernel'][0, 0] + params[name]['bias']
    for name in ('query', 'key', 'value')
  )
  energy = np.exp(query @ key.transpose(0, 2, 1))
  weights = energy / energy.sum(-1, keepdims=True)
  return (x + params['gamma'] * (weights @ value)).reshape(b, h, w, c)


def discriminate(x, params, vectors):
  """Scores [b] and the singular vectors, as trained."""
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  x = (x - mean) / np.sqrt(var + 1e-5)
  x = x * params['bn']['scale'] + params['bn']['bias']
  found = {}
  for i in (1, 2, 3, 4):
    own = params[f'conv{i}']
    kernel, found[f'conv{i}'] = spectral(own, vectors[f'conv{i}'])
    x = convolve(x, kernel, own['bias'], stride=2, padding=1)
    x = np.where(x > 0, x, 0.1 * x)
    if i > 2:
      x = attend(x, params[f'attention{i}'])
  last = params['last']
  x = convolve(x, last['kernel'], last['bias'], stride=1, padding=0)
  return x.mean((1, 2, 3)), found


def check_same(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs
  )


@pytest.mark.parametrize('size', [(6, 7), (1, 2)], ids=['plain', 'small'])
def test_spectral_convolution(x64, size):
  x = normal(0, 2, *size, 3)
  module = SpectralConv(5)
  variables = draw(module, x, train=False)
  with x64():
    y, moved = jax.jit(
      functools.partial(module.apply, train=True, mutable=['spectral_norm'])
    )(variables, x)
    params, vectors = variables['params'], variables['spectral_norm']
    kernel, expected = spectral(params, vectors)
    check_same(moved['spectral_norm'], expected)
    bias = params['bias']
    check_same(y, convolve(x, kernel, bias, stride=2, padding=1))
    # Without training the stored vectors are used, and stay.
    y, kept = module.apply(variables, x, train=False, mutable=['spectral_norm'])
    check_same(kept['spectral_norm'], vectors)
    matrix = params['kernel'].reshape(-1, 5)
    kernel = params['kernel'] / (vectors['v'] @ matrix @ vectors['u'])
    check_same(y, convolve(x, kernel, bias, stride=2, padding=1))


def test_the_largest_gain_becomes_one(key):
  module = SpectralConv(6)
  x = np.zeros((1, 4, 4, 3), np.float32)
  variables = module.init(key, x, train=False)
  params, vectors = variables['params'], variables['spectral_norm']
  matrix = np.asarray(params['kernel']).reshape(-1, 6)
  gains = np.linalg.svd(matrix, compute_uv=False)
  found = [vectors['v'] @ matrix @ vectors['u']]
  assert 0 < found[0] < gains[0]
  for _ in range(100):
    _, moved = module.apply(
      {'params': params, 'spectral_norm': vectors},
      x,
      train=True,
      mutable=['spectral_norm'],
    )
    vectors = moved['spectral_norm']
    found.append(vectors['v'] @ matrix @ vectors['u'])
  # Never more than it is; a power iteration only climbs.
  assert (np.diff(found) > -1e-6).all()
  np.testing.assert_allclose(gains[0] / found[-1], 1, rtol=1e-4)


def test_attention(x64):
  x = normal(0, 2, 3, 4, 16)
  module = SelfAttention()
  variables = draw(module, x)
  with x64():
    assert variables['params']['query']['kernel'].shape == (1, 1, 16, 2)
    y = jax.jit(module.apply)(variables, x)
    check_same(y, attend(x, variables['params']))


def test_attention_adds_nothing_at_the_start(key):
  x = normal(0, 1, 3, 3, 8).astype(np.float32)
  variables = SelfAttention().init(key, x)
  y = SelfAttention().apply(variables, x)
  np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
  'size', [(65, 65), (20, 33), (3, 2)], ids=['published', 'odd', 'small']
)
def test_scores(x64, size):
  x = 2 + 3 * normal(0, 2, *size, 3)
  module = Discriminator(2)
  variables = draw(module, x, train=False)
  with x64():
    apply = functools.partial(
      module.apply, train=True, mutable=['spectral_norm', 'batch_stats']
    )
    scores, moved = jax.jit(apply)(variables, x)
    params = variables['params']
    expected, vectors = discriminate(x, params, variables['spectral_norm'])
    check_same(scores, expected)
    check_same(moved['spectral_norm'], vectors)
    statistics = variables['batch_stats']['bn']
    check_same(
      moved['batch_stats']['bn']['mean'],
      0.9 * statistics['mean'] + 0.1 * x.mean((0, 1, 2)),
    )


def test_the_published_size(key):
  """64 channels, 65 x 65 scores of 19 classes: parameters of the layers."""
  x = jax.ShapeDtypeStruct((1, 65, 65, 19), jnp.float32)
  init = functools.partial(Discriminator().init, train=False)
  shapes = jax.eval_shape(init, key, x)
  count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes['params']))
  convolutions = [(19, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
  expected = sum(16 * i * o + o for i, o in convolutions) + 2 * 19
  for c in (256, 512):
    expected += 2 * (c + 1) * (c // 8) + (c + 1) * c + 1
  assert count == expected


@pytest.mark.torch
def test_against_pytorch(x64):
  torch = pytest.importorskip('torch')
  x = normal(0, 2, 67, 65, 3)
  module = Discriminator(4)

  def tensor(value):
    return torch.tensor(np.asarray(value))

  def fill(layer, own):
    for name in ('kernel', 'scale'):
      if name in own:
        value = tensor(own[name])
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value
        layer.weight.data = value.contiguous()
    layer.bias.data = tensor(own['bias'])
    return layer

  variables = draw(module, x, train=False)
  with x64():

    def total(x):
      scores, _ = module.apply(
        variables, x, train=True, mutable=['spectral_norm', 'batch_stats']
      )
      return scores[0] + 2 * scores[1], scores

    grads, scores = jax.jit(jax.grad(total, has_aux=True))(x)
  params, vectors = variables['params'], variables['spectral_norm']
  y = tensor(x).permute(0, 3, 1, 2).requires_grad_()
  start = y
  y = fill(torch.nn.BatchNorm2d(3).double(), params['bn'])(y)
  for i in (1, 2, 3, 4):
    own = params[f'conv{i}']
    c, f = own['kernel'].shape[2:]
    conv = fill(torch.nn.Conv2d(c, f, 4, 2, 1).double(), own)
    conv = torch.nn.utils.spectral_norm(conv)
    conv.weight_u.data = tensor(vectors[f'conv{i}']['u'])
    y = torch.nn.functional.leaky_relu(conv(y), 0.1)
    if i > 2:
      own = params[f'attention{i}']
      query, key, value = (
        fill(torch.nn.Conv2d(f, n, 1).double(), own[name])(y).flatten(2)
        for name, n in (('query', f // 8), ('key', f // 8), ('value', f))
      )
      found = torch.nn.functional.scaled_dot_product_attention(
        query.mT, key.mT, value.mT, scale=1.0
      )
      y = y + tensor(own['gamma']) * found.mT.reshape(y.shape)
  y = fill(torch.nn.Conv2d(f, 1, 4).double(), params['last'])(y)
  y = y.mean((1, 2, 3))
  np.testing.assert_allclose(scores, y.detach().numpy(), rtol=1e-8)
  (y[0] + 2 * y[1]).backward()
  expected = start.grad.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(grads, expected, rtol=1e-6, atol=1e-10)


def test_unit_vectors_of_zeros_are_zeros():
  found, grads = jax.value_and_grad(
    lambda x: jnp.sum(discriminator.unit_vector(x))
  )(jnp.zeros(3))
  assert found == 0 and np.isfinite(grads).all()
