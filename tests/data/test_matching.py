# SPDX-License-Identifier: Apache-2.0
"""Names that differ by one rule are matched; what could be wrong is not."""

import os
import unicodedata

import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.data import files, matching
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import DataError, InputError

NAMES = [f'f{i:02d}' for i in range(5)]
RULES = {
  'suffix': (str, '{}_mask'.format),
  'prefix': (str, 'mask_{}'.format),
  'two suffixes': ('{}_rgb'.format, '{}_label'.format),
  'two prefixes': ('image_{}'.format, 'label_{}'.format),
  'case': (str, str.upper),
  'folders': ('cam/{}'.format, str),
  'folder and suffix': ('cam/{}'.format, 'cam/{}_m'.format),
  'backslash': ('images\\{}'.format, str),
}


@pytest.mark.parametrize('rule', RULES)
def test_one_rule_for_all(rule):
  left, right = ([*map(f, NAMES)] for f in RULES[rule])
  found, how = matching.agree(left, right)
  assert found == dict(zip(left, right, strict=True)) and how
  # The other way round, and with one that has no partner.
  found, _ = matching.agree(right, left[:-1])
  assert found == dict(zip(right[:-1], left[:-1], strict=True))


def test_equal_names_need_no_rule():
  assert matching.agree(NAMES, NAMES) == ({x: x for x in NAMES}, '')


def test_unicode_forms_are_one_name():
  composed = ['é', 'b']
  apart = [unicodedata.normalize('NFD', name) for name in composed]
  found, how = matching.agree(composed, apart)
  assert found == dict(zip(composed, apart, strict=True)) and how


@pytest.mark.parametrize(
  ('left', 'right'),
  [
    (['dog'], ['cat']),
    (['image1'], ['label1']),
    (NAMES, [x + end for x in NAMES for end in ('_mask', '_color')]),
    (['a/x', 'b/x'], ['x']),
    (['X', 'x'], ['x_mask']),
    ([f'a{i}' for i in range(9)], [f'b{i}{i}' for i in range(9)]),
  ],
  ids=['words', 'one', 'two kinds', 'folders', 'case', 'other numbers'],
)
def test_nothing_is_guessed(left, right):
  assert matching.agree(left, right)[0] == {}


def test_frames_are_not_shifted():
  left, right = [f'a{i}' for i in range(5)], [f'a{i}' for i in range(1, 6)]
  assert matching.agree(left, right)[0] == {x: x for x in left[1:]}


def test_a_folder_is_walked_with_its_links(tmp_path):
  inside, outside = tmp_path / 'in', tmp_path / 'out'
  for path in ('in/a.jpg', 'in/sub/b.WEBP', 'out/c.tif', 'in/notes.txt'):
    (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / path).write_bytes(b'x')
  for name in ('.hidden.png', 'Thumbs.db', '.git/d.png', '__MACOSX/e.png'):
    (inside / name).parent.mkdir(exist_ok=True)
    (inside / name).write_bytes(b'x')
  (inside / 'linked').symlink_to(outside)
  (outside / 'around').symlink_to(inside)
  (inside / 'gone').symlink_to(tmp_path / 'nowhere')
  (inside / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
  found, others = files.walk(inside)
  expected = ['a.jpg', 'gone', 'gone.png', 'linked/c.tif', 'sub/b.WEBP']
  assert [*found] == expected and others == ['notes.txt']
  with pytest.raises(DataError, match=r'a link to .*nowhere\.png'):
    found['gone.png'].read()
  assert files.walk(tmp_path / 'absent') == ({}, [])


def draw(root, *, split='{}/{}', name=str, mask=str, ending='png', value=1):
  for s, first in (('train', 0), ('val', 5)):
    for i in range(first, first + 3):
      ids = np.zeros((40, 48), np.uint8)
      ids[i:20] = value
      for kind, f in (('images', name), ('masks', mask)):
        path = root / split.format(kind, s) / f'{f(f"f{i}")}.{ending}'
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(ids)
        image = image.convert('RGB') if kind == 'images' else image
        image.save(path)
  return root


def load(root, names=('background', 'object'), strict=True, **keys):
  config = default_config().data
  config.update({'name': 'folder', 'root': str(root), 'class_names': names})
  splits = keys.pop('splits', ('train', 'val', 'test'))
  config.update(keys)
  return load_dataset(config, strict=strict, splits=splits)


def test_what_was_matched_is_said(tmp_path):
  dataset = load(draw(tmp_path, mask='{}_mask'.format))
  assert {k: len(x) for k, x in dataset.splits.items()} == {
    'train': 3,
    'val': 3,
  }
  assert any('NAME and NAME_mask' in note for note in dataset.notes)


def test_one_hint_where_no_name_fits(tmp_path):
  root = draw(tmp_path, mask=lambda x: f'{ord(x[-1]):x}'[::-1])
  (train, _) = load(root, strict=False).problems
  assert 'no mask has the name of an image' in str(train)
  assert 'f0, f1, ...' in str(train)


@pytest.mark.parametrize('ending', ['bmp', 'tif', 'gif', 'png'])
def test_endings_are_one_list(tmp_path, ending):
  dataset = load(draw(tmp_path, ending=ending))
  record = dataset.splits['train'][2]
  assert record['image'].shape == (40, 48, 3)
  assert np.unique(record['label']).tolist() == [0, 1]


def test_black_and_white_masks_are_two_classes(tmp_path):
  root = draw(tmp_path, value=255)
  dataset = load(root)
  assert dataset.detected == {'id_map': (0, 255)}
  assert np.unique(dataset.splits['val'].label(0)).tolist() == [0, 1]
  assert any('255 is' in note for note in dataset.notes)
  # Beside a single 1 they are void, and with three names nothing is inferred.
  assert not load(root, ('a', 'b', 'c')).detected
  path = root / 'masks/val/f7.png'
  ids = np.asarray(Image.open(path)).copy()
  ids[0, 0] = 1
  Image.fromarray(ids).save(path)
  assert not load(root).detected


@pytest.mark.parametrize(
  'names', [('object',), ('background,object',)], ids=['one', 'comma']
)
def test_one_class_is_none(tmp_path, names):
  with pytest.raises(InputError, match='class_names must be 2 or more'):
    load(draw(tmp_path), names)


def test_a_split_alone_is_read(tmp_path):
  root = draw(tmp_path)
  for kind in ('images', 'masks'):
    os.rename(root / kind / 'val', root / kind / 'test')
    os.rename(root / kind / 'train', root / kind / 'other')
  assert [*load(root, splits=('test',)).splits] == ['test']
  with pytest.raises(DataError, match='3 images in images/test'):
    load(root, splits=('val',))


def test_images_without_a_split(tmp_path):
  root = draw(tmp_path, split='{}')
  with pytest.raises(DataError, match='6 images in images, 6 images in masks'):
    load(root)
