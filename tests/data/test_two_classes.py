# SPDX-License-Identifier: Apache-2.0
"""A run, and a check, need something to learn from and to score."""

import dataclasses

import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.data import checking
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import DataError

SPLITS = ('train', 'val')
THREE = ('road', 'sky', 'tree')
# Values of the masks, and what the refusal says; the names are THREE.
NOTHING_TO_LEARN = {
  'all ignored': ([255], 'no pixel of {} is labeled'),
  'the first class': ([0], "labels of {} show only 'road'"),
  'one class and void': ([2, 255], "labels of {} show only 'tree'"),
}


def draw(root, values, images=3):
  """Pairs whose masks show the values {split: [...]} in stripes."""
  generator = np.random.default_rng(0)
  for split, found in values.items():
    for i in range(images):
      ids = np.repeat(np.resize(np.uint8(found), 32), 48).reshape(32, 48)
      image = generator.integers(0, 256, (32, 48, 3), np.uint8)
      for kind, array in (('images', image), ('masks', ids)):
        path = root / kind / split / f'{split}{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def load(root, names=THREE, **keys):
  config = default_config().data
  config.update({'name': 'folder', 'root': str(root), 'class_names': names})
  config.update(keys)
  return load_dataset(config, strict=False)


def refusals(dataset):
  """What a run says, and what check_data says; neither is the other's code."""
  try:
    checking.require_classes(dataset, SPLITS, 2)
    run = None
  except DataError as error:
    run = str(error)
  report, _ = checking.check(dataset, 2)
  found = [x for x in report['problems'] if x['kind'] == 'classes']
  assert report['usable'] == (not found)
  return run, found[0]['message'] if found else None


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('kind', NOTHING_TO_LEARN)
def test_run_and_check_refuse_alike(tmp_path, kind, split):
  values, message = NOTHING_TO_LEARN[kind]
  draw(tmp_path, {'train': [0, 1, 2], 'val': [0, 1], split: values})
  run, checked = refusals(load(tmp_path))
  assert run == checked
  assert message.format(split) in run
  assert f'has the values {", ".join(map(str, values))}' in run


@pytest.mark.parametrize(
  'keys',
  [
    {'id_map': (7, 8, 9)},
    {'id_map': (0, 7, 8)},
    {'palette': ((0, 0, 0), (9, 9, 9), (8, 8, 8))},
  ],
  ids=['nothing', 'one id', 'one color'],
)
def test_a_table_must_meet_two_of_its_classes(tmp_path, keys):
  draw(tmp_path, {'train': [0, 1, 2], 'val': [0, 1, 2]})
  if 'palette' in keys:
    for path in (tmp_path / 'masks').rglob('*.png'):
      Image.new('RGB', (48, 32)).save(path)
  run, checked = refusals(load(tmp_path, **keys))
  assert run == checked
  assert '--config.data.id_map' in run and '--config.data.palette' in run


def test_two_classes_are_enough_and_the_rest_is_not_read(tmp_path):
  draw(tmp_path, {'train': [0, 2], 'val': [1, 2]}, images=40)
  dataset, read = load(tmp_path), []
  for split, source in dataset.splits.items():
    label = source.label

    def counted(index, label=label, split=split):
      read.append((split, index))
      return label(index)

    source.label = counted
  assert checking.require_classes(dataset, SPLITS, 2) == []
  assert {split for split, _ in read} == {*SPLITS}
  assert len(read) < 40  # Of 80; a few are under way in each thread.


def test_test_may_have_no_labels(tmp_path):
  draw(tmp_path, {'train': [0, 1], 'val': [0, 1], 'test': [255]})
  dataset = load(tmp_path)
  assert refusals(dataset) == (None, None)
  report, _ = checking.check(dataset, 2)
  (note,) = report['warnings']['note']
  assert note == 'test: no pixel is labeled; it will not be scored'


def test_a_limit_is_named_where_it_hides_classes(tmp_path):
  draw(tmp_path, {'train': [0, 1], 'val': [0, 1]})
  for i in range(2):
    Image.new('L', (48, 32)).save(tmp_path / f'masks/train/train{i}.png')
  assert refusals(load(tmp_path)) == (None, None)
  run, checked = refusals(load(tmp_path, limit=2))
  assert run == checked
  assert 'config.data.limit=2 leaves 1 pairs unread' in run


@pytest.mark.parametrize(
  ('num_classes', 'images', 'usable'),
  [(150, 3, True), (31, 3, True), (30, 3, False), (2, 1, False)],
)
def test_a_small_sample_of_many_classes_is_a_note(
  tmp_path, num_classes, images, usable
):
  draw(tmp_path, {'train': [1], 'val': [1]}, images)
  names = tuple(f'c{i}' for i in range(num_classes))
  dataset = load(tmp_path, names)
  run, checked = refusals(dataset)
  assert (run is None) == (checked is None) == usable
  if usable:
    expected = f"show only 'c1', one of {num_classes} classes: 3 images"
    notes = checking.require_classes(dataset, SPLITS, 2)
    assert all(expected in note for note in notes) and len(notes) == 2
    report, _ = checking.check(dataset, 2)
    assert report['warnings']['note'] == notes


def test_sources_without_files_are_asked_too():
  dataset = load_dataset(default_config().data)  # Drawn scenes.
  assert checking.require_classes(dataset, SPLITS, 1) == []

  class Blank:
    def __len__(self):
      return 3

    def label(self, index):
      return np.full((4, 4), 255, np.uint8)

  dataset = dataclasses.replace(
    dataset, splits={**dataset.splits, 'val': Blank()}
  )
  with pytest.raises(DataError, match='no pixel of val is labeled'):
    checking.require_classes(dataset, SPLITS, 1)
