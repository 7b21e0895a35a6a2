# SPDX-License-Identifier: Apache-2.0
"""Tiles: every pixel is covered, and averages are weighted means."""

import collections
import dataclasses
import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.devices import sharding
from attnfd_jax.inference import evaluation, predictor, tiling
from attnfd_jax.inference.predictor import Averaged
from attnfd_jax.models import resizing


def draw(*shape):
  generator = np.random.default_rng(0)
  return generator.integers(0, 256, shape, np.uint8)


def tiled(apply, image, **options):
  """All bands, one below the other."""
  return np.concatenate(list(tiling.bands(apply, image, **options)))


def edges(part):
  """Sees its neighbors: another result at every edge of a tile."""
  x = part.astype(np.float32)
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  return x + padded[1:-1, 2:] + padded[2:, 1:-1]


@pytest.mark.parametrize('overlap', [0.0, 0.25, 0.5, 0.9], ids=str)
@pytest.mark.parametrize(
  ('length', 'tile'),
  [(100, 32), (97, 33), (33, 32), (32, 32), (5, 32)],
  ids=str,
)
def test_starts(length, tile, overlap):
  starts = tiling.starts(length, tile, overlap)
  assert starts[0] == 0
  if length <= tile:
    assert starts == [0]
    return
  assert starts[-1] + tile == length
  steps = np.diff(starts)
  assert np.all(steps > 0)
  # The share asked for, and no more tiles than it takes.
  assert steps.max() <= max(tile * (1 - overlap), 1)
  assert (len(starts) - 2) * int(tile * (1 - overlap)) < length - tile


def test_weights_fall_to_the_edge():
  for length in (1, 2, 7, 64):
    weights = tiling.falling_weights(length)
    assert weights.dtype == np.float32 and weights.min() > 0
    np.testing.assert_array_equal(weights, weights[::-1])
    assert np.all(np.diff(weights[: (length + 1) // 2]) > 0)
    assert weights.max() <= 1


@pytest.mark.parametrize('tile', [(20, 31), (64, 31), (99, 99)], ids=str)
def test_a_tile_that_covers_the_image_is_the_image(tile):
  image, calls = draw(20, 31, 3), []

  def apply(part):
    calls.append(part.shape)
    return np.sqrt(part.astype(np.float32))

  (found,) = tiling.bands(apply, image, tile=tile)
  np.testing.assert_array_equal(found, apply(image))
  assert calls == [(20, 31, 3)] * 2


@pytest.mark.parametrize('overlap', [0.0, 0.25, 0.6], ids=str)
@pytest.mark.parametrize('tile', [(8, 12), (8, 99), (7, 1)], ids=str)
def test_pixels_that_need_no_context_agree_with_the_whole(tile, overlap):
  image, shapes = draw(37, 31, 3), collections.Counter()

  def apply(part):
    shapes[part.shape[:2]] += 1
    return part.astype(np.float32) - 99

  whole = tiled(apply, image, tile=tile, overlap=overlap)
  assert whole.dtype == np.float32 and whole.shape == (37, 31, 3)
  # A weighted mean of equal numbers.
  np.testing.assert_allclose(whole, image - 99.0, rtol=1e-5, atol=1e-5)
  # One shape is one compilation.
  assert list(shapes) == [(tile[0], min(tile[1], 31))]


def test_averages_are_weighted_by_the_distance_to_the_edge():
  image, made = np.zeros((9, 6, 1), np.uint8), []

  def apply(part):
    made.append(len(made))
    return np.full((*part.shape[:2], 2), made[-1], np.float32)

  found = tiled(apply, image, tile=(6, 6), overlap=0.5)
  assert made == [0, 1]
  np.testing.assert_allclose(found[:3], 0)
  np.testing.assert_allclose(found[6:], 1)
  # Rows 3 to 5 are the last three of tile 0 and the first three of tile 1.
  own, other = np.array([2.5, 1.5, 0.5]), np.array([0.5, 1.5, 2.5])
  np.testing.assert_allclose(found[3:6, 2, 0], other / (own + other), rtol=1e-6)


def test_mirrored_images_have_mirrored_scores():
  image = draw(20, 31, 3)

  def mirrored(part):
    return edges(part[:, ::-1])[:, ::-1]

  options = {'tile': (9, 11), 'overlap': 0.3}
  found = tiled(edges, image, **options)
  np.testing.assert_allclose(
    tiled(mirrored, image[:, ::-1], **options)[:, ::-1],
    found,
    rtol=1e-5,
    atol=1e-4,
  )
  assert np.max(np.abs(found - edges(image))) > 1


@pytest.mark.parametrize('overlap', [0.0, 0.25, 0.6, 0.9], ids=str)
@pytest.mark.parametrize('tile', [(9, 11), (40, 7), (7, 40)], ids=str)
def test_bands_are_the_weighted_mean_of_all_tiles(tile, overlap):
  image = draw(37, 31, 3)
  bands = list(tiling.bands(edges, image, tile=tile, overlap=overlap))
  th, tw = min(tile[0], 37), min(tile[1], 31)
  total, weights = np.zeros((37, 31, 3)), np.zeros((37, 31, 1))
  rows, columns = tiling.starts(37, th, overlap), tiling.starts(31, tw, overlap)
  for y, x in itertools.product(rows, columns):
    window = slice(y, y + th), slice(x, x + tw)
    weight = np.minimum(np.arange(th) + 0.5, th - 0.5 - np.arange(th))[:, None]
    weight = weight * np.minimum(np.arange(tw) + 0.5, tw - 0.5 - np.arange(tw))
    total[window] += edges(image[window]) * weight[..., None]
    weights[window] += weight[..., None]
  np.testing.assert_allclose(
    np.concatenate(bands), total / weights, rtol=1e-5, atol=1e-4
  )
  assert [len(band) for band in bands] == np.diff([*rows, 37]).tolist()


@pytest.mark.parametrize('size', [(2000, 64), (3000, 96)], ids=str)
def test_memory_is_that_of_one_row_of_tiles(size):
  image = np.zeros((2000, 64, 1), np.uint8)

  def apply(part):
    return np.zeros((*part.shape[:2], 16), np.float32)

  tracemalloc.start()
  found = tiling.bands(apply, image, tile=(64, 64), overlap=0.5)
  if size != image.shape[:2]:
    found = tiling.resized(np.concatenate(list(found)), size)
  height = sum(len(band) for band in found)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert height == size[0]
  whole = image.size * 16 * 4
  # Resized: those of the image as parts and as one, not those of the result.
  limit = 0.2 if size == (2000, 64) else 4
  assert peak < limit * whole


@pytest.mark.parametrize(
  'size', [(20, 33), (5, 7), (10, 3), (1, 1), (10, 14)], ids=str
)
def test_resized_bands_are_those_of_the_layers(monkeypatch, size):
  monkeypatch.setattr(tiling, '_ROWS', 7)

  def resize_on_host(x):
    return np.concatenate(list(tiling.resized(x, size)))

  x = np.random.default_rng(0).normal(size=(10, 14, 3)).astype(np.float32)
  found = resize_on_host(x)
  assert found.dtype == np.float32
  np.testing.assert_allclose(
    found, resizing.resize(x[None], *size)[0], rtol=1e-4, atol=1e-5
  )
  one = resize_on_host(x[:1, :1])
  np.testing.assert_array_equal(one, np.broadcast_to(x[:1, :1], one.shape))


class Source:
  """Records of several sizes; the image tells the label."""

  def __init__(self, sizes):
    generator = np.random.default_rng(1)
    self._records = []
    for size in sizes:
      image = generator.integers(0, 256, (*size, 3), np.uint8)
      label = np.argmax(image, -1).astype(np.uint8)
      label[generator.random(size) < 0.3] = 1
      label[:2] = 255
      self._records.append({'image': image, 'label': label})

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self._records[index]

  def size(self, index):
    return self._records[index]['label'].shape


@dataclasses.dataclass(frozen=True)
class Blurred:
  """Not a network: scores are means over blocks of 4 x 4 pixels."""

  def apply(self, variables, image, *, train):
    assert not train and not variables
    b, h, w, c = image.shape
    image = image[:, : h // 4 * 4, : w // 4 * 4]
    coarse = jnp.mean(image.reshape(b, h // 4, 4, w // 4, 4, c), (2, 4))
    logits = resizing.resize(coarse, h, w)
    return {'coarse_logits': coarse, 'logits': logits}


SIZES = [(40, 56), (33, 47), (40, 56), (64, 36), (40, 56)]


def count(found):
  total = np.zeros((3, 3), np.int64)
  for ids, label in found:
    valid = label != 255
    np.add.at(total, (label[valid], ids[valid]), 1)
  return total


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'size_multiple': 16},
    {'short_side': 20},
    {'protocol': 'reference'},
  ],
  ids=['plain', 'padded', 'short_side', 'reference'],
)
@pytest.mark.parametrize('tile', [None, (999, 999)], ids=['whole', 'tile'])
def test_one_by_one_counts_what_batches_count(monkeypatch, options, tile):
  monkeypatch.setattr(predictor, 'REFERENCE_SHORT_SIDE', 45)
  network, source = Blurred(), Source(SIZES)
  expected = evaluation.evaluate(
    network,
    {},
    source,
    num_classes=3,
    mesh=sharding.make_mesh(4),
    batch_size=4,
    **options,
  )
  found = list(
    evaluation.predictions(network, {}, source, tile=tile, **options)
  )
  np.testing.assert_array_equal(count(found), expected)
  assert expected.sum() > 5000 and np.all(np.diag(expected) > 0)
  if options.get('protocol') != 'reference':
    for i, (ids, label) in enumerate(found):
      np.testing.assert_array_equal(label, source[i]['label'])
      assert ids.dtype == np.uint8 and ids.shape == label.shape


@pytest.mark.parametrize('short_side', [0, 30, 80], ids=str)
def test_tiles_score_every_size(short_side):
  source = Source(SIZES)
  options = {'short_side': short_side}
  whole, tiles = (
    list(evaluation.predictions(Blurred(), {}, source, tile=tile, **options))
    for tile in (None, (24, 32))
  )
  agree = []
  for (ours, _), (theirs, label) in zip(tiles, whole, strict=True):
    assert ours.shape == label.shape
    agree.append(np.mean(ours == theirs))
  # Blocks of other tiles begin elsewhere.
  assert 0.5 < min(agree) and max(agree) < 1


@dataclasses.dataclass(frozen=True)
class Foreign:
  """Not a Linen module, and without coarse logits."""

  def apply(self, variables, image, *, train):
    outputs = Blurred().apply(variables, image, train=train)
    return {'logits': outputs['logits']}


def test_a_network_needs_logits_alone():
  source, mesh = Source(SIZES), sharding.make_mesh(1)
  foreign, ours = (
    evaluation.evaluate(network, {}, source, num_classes=3, mesh=mesh)
    for network in (Foreign(), Blurred())
  )
  np.testing.assert_array_equal(foreign, ours)
  found = list(evaluation.predictions(Foreign(), {}, source))
  np.testing.assert_array_equal(count(found), ours)


@pytest.mark.parametrize('coarse', [(5, 9), (1, 1)], ids=str)
def test_logits_at_another_size(coarse):
  """A ratio is what sizes say, where nothing is padded."""
  generator = np.random.default_rng(0)
  maps = jnp.asarray(generator.normal(size=(1, *coarse, 3)), jnp.float32)
  outputs = {
    'coarse_logits': maps,
    'logits': resizing.resize(maps, 17, 33),
  }
  expected = predictor.resized_logits(outputs, 40, 50)
  ratio = np.float32([39 / 16, 49 / 32])
  # Positions are rounded otherwise.
  np.testing.assert_allclose(
    predictor.resized_logits(outputs, 40, 50, ratio=ratio),
    expected,
    rtol=1e-4,
    atol=1e-5,
  )


def test_tiles_with_scales_and_mirror_images():
  network, source = Averaged(Blurred(), (0.5, 1.0), True), Source(SIZES[:2])
  whole, covered, tiles = (
    list(evaluation.predictions(network, {}, source, tile=tile))
    for tile in (None, (40, 56), (32, 32))
  )
  for (ours, _), (theirs, _), (parts, label) in zip(
    covered, whole, tiles, strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
    assert parts.shape == label.shape
    assert 0.5 < np.mean(parts == theirs) < 1


def test_tiles_of_one_shape_compile_once():
  class Fresh(Blurred):
    traced = []

    def apply(self, variables, image, *, train):
      self.traced.append(image.shape)
      return super().apply(variables, image, train=train)

  list(evaluation.predictions(Fresh(), {}, Source(SIZES), tile=(32, 32)))
  assert Fresh.traced == [(1, 32, 32, 3)]
