# SPDX-License-Identifier: Apache-2.0
"""What readers give, and how they refuse files that are wrong."""

import pathlib
import pickle
import re

import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.data import classes, sources
from attnfd_jax.errors import DataError, InputError

SIZE = (12, 16)
REAL_CAMVID = pathlib.Path(__file__).parents[2].parent / 'shared' / 'camvid'
# The first colors of VOCdevkit's labelcolormap, and its border.
VOC_COLORS = {
  0: (0, 0, 0),
  1: (128, 0, 0),
  2: (0, 128, 0),
  7: (128, 128, 128),
  8: (64, 0, 0),
  15: (192, 128, 128),
  20: (0, 64, 128),
  64: (32, 0, 0),
  255: (224, 224, 192),
}


def data_config(name, root, **changes):
  config = default_config().data
  config.update({'name': name, 'root': str(root), **changes})
  return config


def draw(seed, size=SIZE):
  """Smooth, so that JPEG keeps it nearly."""
  h, w = size
  rows, columns = np.mgrid[:h, :w]
  image = np.stack([9 * rows, 7 * columns, 0 * rows + 40 * seed + 20], -1)
  return image.astype(np.uint8)


def make_ids(seed, num_ids, size=SIZE):
  ids = np.random.default_rng(seed).integers(0, num_ids, size, np.uint8)
  ids.flat[:num_ids] = np.arange(num_ids)
  return ids


def write(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)
  return path


@pytest.fixture
def camvid(tmp_path):
  """SegNet's layout: three images of train, one of val and test."""
  for split, stems in (('train', 'abc'), ('val', 'd'), ('test', 'e')):
    for i, stem in enumerate(stems):
      ending = 'jpg' if stem == 'b' else 'png'
      write(tmp_path / split / f'{stem}.{ending}', draw(i))
      write(tmp_path / f'{split}annot' / f'{stem}.png', make_ids(i, 12))
  return tmp_path


@pytest.fixture
def folder(tmp_path):
  for split in ('train', 'val'):
    for i, stem in enumerate('ab'):
      write(tmp_path / 'images' / split / f'{stem}.png', draw(i))
      write(tmp_path / 'masks' / split / f'{stem}.png', make_ids(i, 3))
  return tmp_path


def load_train(root, **changes):
  dataset = sources.load_dataset(data_config('camvid', root, **changes))
  return dataset.splits['train']


def load_folder(root, names=('x', 'y', 'z')):
  return sources.load_dataset(data_config('folder', root, class_names=names))


def test_camvid_records(camvid):
  dataset = sources.load_dataset(data_config('camvid', camvid))
  assert dataset.num_classes == 11
  assert dataset.class_names[:2] == ('sky', 'building')
  assert dataset.palette.shape == (11, 3) and dataset.palette.dtype == np.uint8
  sizes = {name: len(source) for name, source in dataset.splits.items()}
  assert sizes == {'train': 3, 'val': 1, 'test': 1}
  source = dataset.splits['train']
  for i, name in enumerate(('a.png', 'b.jpg', 'c.png')):
    record = source[i]
    assert pathlib.Path(source.name(i)).name == name
    assert source.size(i) == record['label'].shape == SIZE
    ids = make_ids(i, 12)
    # Void is id 11 in the files.
    np.testing.assert_array_equal(
      record['label'], np.where(ids == 11, 255, ids)
    )
    assert record['image'].dtype == record['label'].dtype == np.uint8
    # JPEG rounds and thins the color; BGR would differ by up to 100.
    loss = 12 if name.endswith('jpg') else 0
    difference = record['image'].astype(int) - draw(i)
    assert np.abs(difference).max() <= loss


def test_file_ids_may_already_be_ignored(camvid):
  ids = np.full(SIZE, 255, np.uint8)
  write(camvid / 'trainannot' / 'a.png', ids)
  assert np.all(load_train(camvid)[0]['label'] == 255)


def test_wrong_values_are_listed(camvid):
  ids = make_ids(0, 11)
  ids[-1, :3] = 12
  ids[-2, :5] = 200
  path = write(camvid / 'trainannot' / 'a.png', ids)
  source = load_train(camvid)
  with pytest.raises(InputError) as error:
    source[0]
  assert str(error.value) == (
    f'{path}: values 12 (3 pixels), 200 (5 pixels) are not classes; classes '
    'are 0 to 10, ignored 11, 255.'
  )
  assert set(source[1]) == {'image', 'label'}  # Others can still be read.


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_a_mask_of_colors_is_refused(camvid, mode):
  path = camvid / 'trainannot' / 'a.png'
  Image.new(mode, SIZE[::-1]).save(path)
  message = rf'{re.escape(str(path))}: mask has mode {mode}; expected an 8-bit'
  with pytest.raises(InputError, match=f'{message}.*Convert colors to ids'):
    load_train(camvid)[0]


def test_sizes_must_agree(camvid):
  path = write(camvid / 'trainannot' / 'c.png', make_ids(0, 11, (10, 16)))
  message = rf'{re.escape(str(path))}: mask is 16x10, its image 16x12'
  with pytest.raises(InputError, match=message):
    load_train(camvid)[2]


@pytest.mark.parametrize(
  ('side', 'other'),
  [('trainannot', 'train'), ('train', 'trainannot')],
  ids=['mask', 'image'],
)
def test_a_missing_partner_is_named(camvid, side, other):
  write(camvid / side / 'lonely.png', make_ids(0, 11))
  message = rf'{re.escape(str(camvid / other))}: no partner for lonely.png\.'
  with pytest.raises(InputError, match=message):
    load_train(camvid)


def test_many_missing_partners_are_counted(camvid):
  for i in range(5):
    write(camvid / 'train' / f'x{i}.png', draw(0))
  message = (
    r'no partner for x0\.png\. \(And 4 more; python -m attnfd_jax\.check'
  )
  with pytest.raises(InputError, match=message):
    load_train(camvid)


@pytest.mark.parametrize('missing', ['train', 'valannot', ''])
def test_a_missing_folder_names_the_key(camvid, missing):
  if missing:
    (camvid / missing).rename(camvid / 'elsewhere')
    path = camvid / missing
  else:
    camvid = path = camvid / 'gone'
  message = rf'{re.escape(str(path))}: no(t| such).*config\.data\.root'
  with pytest.raises(InputError, match=message):
    load_train(camvid)


def test_an_empty_folder_is_refused(camvid):
  for path in (*(camvid / 'val').iterdir(), *(camvid / 'valannot').iterdir()):
    path.unlink()
  with pytest.raises(InputError, match=r'val: no files \*\.jpg, .* in it'):
    load_train(camvid)


def test_stems_must_differ(camvid):
  write(camvid / 'train' / 'b.png', draw(0))
  message = r'train: b\.jpg, b\.png have the same stem; keep one of them'
  with pytest.raises(InputError, match=message):
    load_train(camvid)


@pytest.mark.parametrize('content', [b'', b'no image'], ids=['empty', 'text'])
@pytest.mark.parametrize(
  ('path', 'what'),
  [('train/a.png', 'image'), ('trainannot/a.png', 'mask')],
  ids=['image', 'mask'],
)
def test_unreadable_files_are_named(camvid, content, path, what):
  path = camvid / path
  path.write_bytes(content)
  message = rf'{re.escape(str(path))}: not a readable {what}'
  with pytest.raises(InputError, match=message):
    load_train(camvid)[0]


def test_other_files_are_overlooked(camvid):
  (camvid / 'train' / 'notes.txt').write_text('no image')
  write(camvid / 'train' / '.hidden.png', draw(0))
  assert len(load_train(camvid)) == 3


def test_limit_takes_the_first(camvid):
  source = load_train(camvid, limit=2)
  names = [pathlib.Path(source.name(i)).name for i in range(len(source))]
  assert names == ['a.png', 'b.jpg']


def test_cached_records_are_equal_and_read_once(camvid):
  plain, cached = load_train(camvid), load_train(camvid, cache=True)
  first = cached[1]
  for path in (camvid / 'train').iterdir():
    if path.stem == 'b':
      path.unlink()
  again = cached[1]
  for key in ('image', 'label'):
    np.testing.assert_array_equal(first[key], again[key])
  for key in ('image', 'label'):
    np.testing.assert_array_equal(cached[0][key], plain[0][key])
  with pytest.raises((InputError, OSError)):
    plain[1]


@pytest.mark.parametrize('cache', [False, True], ids=['plain', 'cached'])
def test_pickled_sources_read_the_same(camvid, cache):
  source = load_train(camvid, cache=cache)
  small = len(pickle.dumps(source))
  expected = source[0]
  pickled = pickle.dumps(source)
  # What is cached stays here.
  assert len(pickled) == small
  copy = pickle.loads(pickled)
  assert len(copy) == 3
  for key in ('image', 'label'):
    np.testing.assert_array_equal(copy[0][key], expected[key])


def test_rotation_of_the_camera_is_refused_and_not_applied(camvid):
  exif = Image.Exif()
  exif[0x0112] = 6  # Turned by 90 degrees: its mask is not.
  path = camvid / 'train' / 'a.png'
  path.unlink()
  Image.fromarray(draw(0)).save(path.with_suffix('.jpg'), exif=exif)
  source = load_train(camvid)
  assert source.size(0) == SIZE
  assert sources.read_image(source.name(0)).shape[:2] == SIZE
  with pytest.raises(DataError, match='EXIF orientation 6'):
    source[0]


def test_folder_records(folder):
  dataset = load_folder(folder)
  assert dataset.class_names == ('x', 'y', 'z')
  assert {k: len(v) for k, v in dataset.splits.items()} == {
    'train': 2,
    'val': 2,
  }
  np.testing.assert_array_equal(
    dataset.splits['val'][1]['label'], make_ids(1, 3)
  )
  np.testing.assert_array_equal(dataset.splits['val'][1]['image'], draw(1))
  assert dataset.palette.shape == (3, 3)


def test_folder_reads_test_if_it_is_there(folder):
  write(folder / 'images' / 'test' / 't.png', draw(0))
  write(folder / 'masks' / 'test' / 't.png', make_ids(0, 3))
  assert len(load_folder(folder).splits['test']) == 1


def test_folder_needs_names(folder):
  with pytest.raises(InputError, match=r'config\.data\.class_names must be'):
    load_folder(folder, ())


def test_folder_refuses_ids_past_the_names(folder):
  message = r'values 2 \(\d+ pixels\) are not classes; classes are 0 to 1,'
  with pytest.raises(InputError, match=message):
    load_folder(folder, ('x', 'y')).splits['train'][0]


def test_a_palette_png_is_read_as_ids(folder):
  ids = make_ids(7, 3)
  ids[0, 5] = 255
  file = Image.fromarray(ids)
  file.putpalette(classes.voc_palette(256).tobytes())
  path = folder / 'masks' / 'train' / 'a.png'
  file.save(path)
  with Image.open(path) as stored:
    assert stored.mode == 'P'
  label = load_folder(folder).splits['train'][0]['label']
  np.testing.assert_array_equal(label, ids)


def test_unknown_data_set_has_a_hint():
  message = "Unknown data set 'camvd'. Did you mean 'camvid'.*Have: camvid,"
  with pytest.raises(InputError, match=message):
    sources.load_dataset(data_config('camvd', ''))


def test_scenes_of_val_are_others():
  config = data_config('scenes', '', image_size=(32, 48))
  config.update({'train_scenes': 3, 'val_scenes': 2})
  splits = sources.load_dataset(config).splits
  train, val = splits['train'], splits['val']
  assert (len(train), len(val)) == (3, 2)
  assert train.size(0) == train[0]['label'].shape == (32, 48)
  assert np.any(train[0]['image'] != val[0]['image'])
  np.testing.assert_array_equal(
    pickle.loads(pickle.dumps(train))[0]['image'], train[0]['image']
  )


def test_changing_a_scene_does_not_change_the_next():
  config = data_config('scenes', '', image_size=(32, 48), train_scenes=1)
  source = sources.load_dataset(config).splits['train']
  source[0]['image'] = None
  assert source[0]['image'] is not None


def test_voc_palette():
  palette = classes.voc_palette(256)
  assert palette.dtype == np.uint8
  for index, color in VOC_COLORS.items():
    assert tuple(palette[index].tolist()) == color
  assert len(np.unique(palette, axis=0)) == 256
  np.testing.assert_array_equal(classes.voc_palette(21), palette[:21])


@pytest.mark.parametrize(
  ('table', 'count'),
  [(classes.CAMVID, 11), (classes.CITYSCAPES, 19), (classes.VOC, 21)],
  ids=['camvid', 'cityscapes', 'voc'],
)
def test_class_tables(table, count):
  assert len(table) == len(set(table.values())) == count


@pytest.mark.skipif(
  not (REAL_CAMVID / 'train').is_dir(), reason=f'no CamVid at {REAL_CAMVID}'
)
def test_the_real_camvid():
  dataset = sources.load_dataset(data_config('camvid', REAL_CAMVID))
  sizes = {name: len(source) for name, source in dataset.splits.items()}
  assert sizes == {'train': 367, 'val': 101, 'test': 233}
  for source in dataset.splits.values():
    record = source[len(source) - 1]
    assert record['image'].shape == (360, 480, 3)
    assert set(np.unique(record['label'])) <= {*range(11), 255}
