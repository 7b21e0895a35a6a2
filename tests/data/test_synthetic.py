# SPDX-License-Identifier: Apache-2.0
"""Scenes are reproducible, complete, and not solved by color."""

import pickle

import numpy as np
import pytest

from attnfd_jax.data import synthetic

HEIGHT, WIDTH = 96, 128
ROAD = synthetic.CLASS_NAMES.index('road')
SKY = synthetic.CLASS_NAMES.index('sky')


def make_scenes(num_scenes=4, *, height=HEIGHT, width=WIDTH, seed=0):
  return synthetic.StreetScenes(
    num_scenes, height=height, width=width, seed=seed
  )


@pytest.fixture(scope='module')
def examples():
  return list(make_scenes(60))


def test_names_and_palette_fit():
  assert len(set(synthetic.CLASS_NAMES)) == 9
  assert synthetic.PALETTE.shape == (9, 3)
  assert synthetic.PALETTE.dtype == np.uint8
  assert len(np.unique(synthetic.PALETTE, axis=0)) == 9


@pytest.mark.parametrize(
  'size', [(96, 128), (33, 47), (32, 160), (160, 40)], ids=str
)
def test_shapes_and_values(size):
  height, width = size
  for example in make_scenes(height=height, width=width):
    image, label = example['image'], example['label']
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    assert label.shape == (height, width) and label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(9), 255}
    assert image.std() > 5


def test_scene_depends_on_seed_and_index_only():
  scenes = make_scenes()
  last_first = [scenes[i] for i in (3, 2, 1, 0)][::-1]
  larger_set = make_scenes(100)
  for i, example in enumerate(last_first):
    for key in ('image', 'label'):
      np.testing.assert_array_equal(example[key], scenes[i][key])
      np.testing.assert_array_equal(example[key], larger_set[i][key])
  assert (scenes[0]['image'] != scenes[1]['image']).any()
  assert (scenes[0]['image'] != make_scenes(seed=1)[0]['image']).any()


def test_render_scene_advances_the_generator():
  generator = np.random.default_rng(0)
  first, _ = synthetic.render_scene(generator, height=HEIGHT, width=WIDTH)
  second, _ = synthetic.render_scene(generator, height=HEIGHT, width=WIDTH)
  assert (first != second).any()


def test_examples_own_their_memory(examples):
  # A view would keep the canvas alive, four times as large.
  assert all(value.base is None for value in examples[0].values())


def test_pickled_scenes_draw_the_same():
  scenes = make_scenes()
  copy = pickle.loads(pickle.dumps(scenes))
  assert len(copy) == len(scenes)
  np.testing.assert_array_equal(copy[1]['image'], scenes[1]['image'])
  np.testing.assert_array_equal(copy[1]['label'], scenes[1]['label'])


def test_iteration_ends():
  assert len(list(make_scenes(3))) == 3


def test_every_class_is_common(examples):
  counts = [np.bincount(e['label'].ravel(), minlength=256) for e in examples]
  visible = (np.array(counts)[:, :9] >= 24).mean(axis=0)
  rare = dict(zip(synthetic.CLASS_NAMES, visible.tolist(), strict=True))
  rare = {name: share for name, share in rare.items() if share < 0.8}
  assert not rare
  ignored = np.array(counts)[:, 255]
  assert 0 < (ignored > 0).mean() < 0.6
  assert ignored.max() < 0.15 * HEIGHT * WIDTH


def test_sky_is_above_road(examples):
  for example in examples:
    sky_rows = np.nonzero(example['label'] == SKY)[0]
    road_rows = np.nonzero(example['label'] == ROAD)[0]
    assert sky_rows.size and road_rows.size
    assert sky_rows.max() <= road_rows.min() + 1
    assert sky_rows.mean() + 0.2 * HEIGHT < road_rows.mean()


def test_labels_lie_on_image_edges(examples):
  """Image gradients at label borders exceed those elsewhere, unshifted."""

  def contrast(shift):
    at_border, elsewhere = [], []
    for example in examples:
      image = example['image'].astype(np.float32).mean(axis=-1)
      step = np.abs(np.diff(image, axis=1))
      border = np.diff(example['label'].astype(int), axis=1) != 0
      border = np.roll(border, shift, axis=1)
      at_border.append(step[border].mean())
      elsewhere.append(step[~border].mean())
    return np.mean(at_border) / np.mean(elsewhere)

  assert contrast(0) > 1.5
  assert contrast(0) > max(contrast(-3), contrast(3)) + 0.5


def test_color_alone_does_not_solve_it(examples):
  """Pixels get the class with the nearest mean color, fitted on them."""
  image = np.concatenate([e['image'].reshape(-1, 3) for e in examples])
  label = np.concatenate([e['label'].ravel() for e in examples])
  image, label = image[label < 9].astype(np.float32), label[label < 9]
  means = np.stack([image[label == k].mean(axis=0) for k in range(9)])
  distance = np.square(image[:, None] - means).sum(axis=-1)
  pairs = 9 * label.astype(int) + distance.argmin(axis=1)
  matrix = np.bincount(pairs, minlength=81).reshape(9, 9)
  union = matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()
  assert (matrix.diagonal() / union).mean() < 0.25


@pytest.mark.parametrize('index', [-1, 4, 1000])
def test_index_outside_raises(index):
  with pytest.raises(IndexError, match=rf'index={index} .*\[0, 4\)'):
    make_scenes()[index]


@pytest.mark.parametrize(
  'arguments',
  [{'num_scenes': 0}, {'height': 31}, {'width': 8}],
  ids=['num_scenes', 'height', 'width'],
)
def test_bad_arguments_raise(arguments):
  ((name, value),) = arguments.items()
  with pytest.raises(ValueError, match=rf'{name}={value} must be \d+ or more'):
    make_scenes(**arguments)
