# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from attnfd_jax.devices import sharding
from attnfd_jax.training import mixing


def make_batch(b, h, w):
  """Every pixel says which image it is of, and where."""
  label = np.broadcast_to(
    np.arange(b, dtype=np.uint8)[:, None, None], (b, h, w)
  )
  rows, columns = np.mgrid[:h, :w].astype(np.uint8)
  image = [label, *(np.broadcast_to(x, (b, h, w)) for x in (rows, columns))]
  return {'image': np.stack(image, -1), 'label': label}


def mixed(batch, *, probability=1.0, seed=0):
  key = jax.random.key(seed)
  return jax.device_get(mixing.cutmix(batch, key, probability=probability))


def test_a_box_of_the_next_image_and_its_label():
  batch = make_batch(64, 24, 40)
  out = mixed(batch)
  assert out['image'].dtype == out['label'].dtype == np.uint8
  # What is pasted stays at its place, and its label comes with it.
  np.testing.assert_array_equal(out['image'][..., 0], out['label'])
  np.testing.assert_array_equal(out['image'][..., 1:], batch['image'][..., 1:])
  changed = 0
  for index, label in enumerate(out['label']):
    pasted = label != index
    assert set(label[pasted]) <= {(index + 1) % 64}
    rows, columns = pasted.any(1), pasted.any(0)
    np.testing.assert_array_equal(pasted, rows[:, None] & columns[None])
    for inside in (rows, columns):  # Without a gap.
      assert np.count_nonzero(np.diff(inside.astype(int), prepend=0)) <= 2
    changed += pasted.any()
  assert changed > 55


def test_share_of_pixels():
  """That of an independent draw of boxes, cut off at the edges."""
  generator = np.random.default_rng(0)
  side = np.sqrt(generator.uniform(size=200_000))

  def covered():
    center = generator.uniform(size=side.size)
    low, high = center - side / 2, center + side / 2
    return np.minimum(high, 1) - np.maximum(low, 0)

  expected = np.mean(covered() * covered())
  label = mixed(make_batch(250, 32, 32))['label']
  share = np.mean(label != np.arange(250)[:, None, None])
  # The standard deviation of a box's share is about a quarter.
  np.testing.assert_allclose(share, expected, rtol=0, atol=4 * 0.25 / 250**0.5)


@pytest.mark.parametrize(
  ('probability', 'low', 'high'), [(0.0, 0, 0), (0.5, 90, 160)]
)
def test_probability(probability, low, high):
  label = mixed(make_batch(250, 16, 16), probability=probability)['label']
  changed = (label != np.arange(250)[:, None, None]).any((1, 2)).sum()
  assert low <= changed <= high


def test_each_key_draws_anew():
  batch = make_batch(8, 16, 16)
  first, again, other = (mixed(batch, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first['image'], again['image'])
  assert (first['image'] != other['image']).any()


@pytest.mark.parametrize('spatial', [1, 2])
def test_one_device_equals_four(spatial):
  batch = make_batch(8, 16, 12)
  mesh = sharding.make_mesh(4 // spatial, spatial)
  key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

  def mix(batch, key):
    out = mixing.cutmix(batch, key, probability=0.7)
    return {name: sharding.split_height(x, mesh) for name, x in out.items()}

  place = sharding.by_batch(mesh), sharding.replicated(mesh)
  out = jax.jit(mix, in_shardings=place)(
    jax.device_put(batch, sharding.by_batch(mesh)), key
  )
  alone = mixed(batch, probability=0.7)
  for name in batch:
    np.testing.assert_array_equal(out[name], alone[name])
