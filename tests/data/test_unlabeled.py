# SPDX-License-Identifier: Apache-2.0
"""Images without masks: where they are found, and which stage sees them."""

import pickle
import shutil
import zipfile

from data import fixtures
import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.data import cache, pairs, prepared, sources, subsets, views
from attnfd_jax.errors import DataError, InputError


def data_config(name='camvid', root='', **values):
  config = default_config().data
  config.name, config.root = name, str(root)
  for key, value in values.items():
    config[key] = value
  return config


@pytest.fixture
def images(tmp_path):
  """A folder with a.png, b/c.JPG, b/d.txt and e.png, a link to nothing."""
  folder = tmp_path / 'more'
  (folder / 'b').mkdir(parents=True)
  for i, name in enumerate(('a.png', 'b/c.JPG')):
    image = np.full((40, 50, 3), 60 + i, np.uint8)
    Image.fromarray(image).save(folder / name)
  (folder / 'b' / 'd.txt').write_text('notes')
  return folder


@pytest.fixture
def camvid(tmp_path):
  fixtures.make_camvid(tmp_path / 'camvid')
  return tmp_path / 'camvid'


def load(camvid, unlabeled, **options):
  config = data_config(root=camvid, unlabeled=str(unlabeled), **options)
  return sources.load_dataset(config)


def check_source(source, keys):
  assert [source.key(i) for i in range(len(source))] == keys
  for i in range(len(source)):
    record = source[i]
    assert record['image'].shape == (40, 50, 3)
    assert (record['label'] == 255).all()
    assert record['label'].shape == source.size(i) == (40, 50)
    np.testing.assert_array_equal(source.label(i), record['label'])
    np.testing.assert_array_equal(source.image(i), record['image'])


def test_a_folder(camvid, images):
  dataset = load(camvid, images)
  check_source(dataset.splits['unlabeled'], ['a', 'b/c'])
  assert any('left out 1 *.txt (b/d.txt)' in note for note in dataset.notes)
  assert len(dataset.splits['train']) == 6


def test_a_glob(camvid, images):
  source = load(camvid, images / '**' / '*.*').splits['unlabeled']
  check_source(source, [str(images / 'a'), str(images / 'b' / 'c')])


def test_a_list(camvid, images):
  path = images.parent / 'list.txt'
  path.write_text(f'\ufeffmore/b/c.JPG\n\n{images}/a.png\nmore/b/c.JPG\n')
  source = load(camvid, path).splits['unlabeled']
  check_source(source, ['more/b/c', f'{images}/a'])


def test_a_zip(camvid, images):
  path = images.parent / 'more.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name in ('a.png', 'b/c.JPG', 'b/d.txt'):
      archive.write(images / name, name)
  check_source(load(camvid, path).splits['unlabeled'], ['a', 'b/c'])


def test_limit_and_cache(camvid, images):
  source = load(camvid, images, limit=1, cache=True).splits['unlabeled']
  check_source(source, ['a'])
  assert source[0]['image'] is source[0]['image']


@pytest.mark.parametrize(
  ('place', 'text'),
  [
    ('nowhere', r'nowhere: not found; config\.data\.unlabeled is a folder'),
    ('camvid/nothing*.png', 'not found'),
    ('empty', 'no images found;'),
    ('list.txt', r'gone\.png: not found, but listed in .*list\.txt'),
    ('broken', r'e\.png: a link to /gone/e\.png, which does not exist'),
  ],
)
def test_what_is_not_there(camvid, tmp_path, place, text):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'list.txt').write_text('gone.png\n')
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'e.png').symlink_to('/gone/e.png')
  with pytest.raises(DataError, match=text):
    load(camvid, tmp_path / place)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_evaluation_does_not_need_them(camvid, split):
  config = data_config(root=camvid, unlabeled='nowhere').to_dict()
  dataset = sources.load_dataset(config, splits=(split,))
  assert [*dataset.splits] == [split]
  del config['unlabeled']  # Of a stage that is older.
  assert [*sources.load_dataset(config, splits=(split,)).splits] == [split]


def test_voc(tmp_path):
  fixtures.make_voc(tmp_path)
  folder = next(tmp_path.rglob('JPEGImages'))
  for name in ('2012_900001', '2012_900002'):
    shutil.copy(next(folder.glob('*.jpg')), folder / f'{name}.jpg')
  config = data_config('pascal_voc', tmp_path, unlabeled='official')
  source = sources.load_dataset(config).splits['unlabeled']
  named = [source.key(i) for i in range(len(source))]
  assert {*named} >= {'2012_900001', '2012_900002'}
  lists = (folder.parent / 'ImageSets' / 'Segmentation').glob('*.txt')
  lines = {line for x in lists for line in x.read_text().split()}
  assert lines and not lines & {*named}


def test_voc_without_others(tmp_path):
  fixtures.make_voc(tmp_path)
  folder = next(tmp_path.rglob('JPEGImages'))
  lists = (folder.parent / 'ImageSets' / 'Segmentation').glob('*.txt')
  lines = {line for x in lists for line in x.read_text().split()}
  for path in folder.iterdir():
    if path.stem not in lines:
      path.unlink()
  config = data_config('pascal_voc', tmp_path, unlabeled='official')
  with pytest.raises(DataError, match='the lists name all images in it'):
    sources.load_dataset(config)


@pytest.mark.parametrize('zipped', [False, True])
def test_cityscapes(tmp_path, zipped):
  fixtures.make_cityscapes(tmp_path)
  name = 'leftImg8bit/train_extra/bonn/bonn_000000_000000_leftImg8bit.png'
  path = tmp_path / name
  path.parent.mkdir(parents=True)
  Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
  if zipped:
    with zipfile.ZipFile(tmp_path / 'leftImg8bit_trainextra.zip', 'w') as file:
      file.write(path, name)
    path.unlink()
  config = data_config('cityscapes', tmp_path, unlabeled='official')
  source = sources.load_dataset(config).splits['unlabeled']
  check_source(source, ['bonn/bonn_000000_000000_leftImg8bit'])


def test_coco(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  fixtures.make_coco(tmp_path)
  config = data_config('coco', tmp_path, unlabeled='official')
  with pytest.raises(DataError, match='unlabeled2017: not found or empty'):
    sources.load_dataset(config)
  (tmp_path / 'unlabeled2017').mkdir()
  image = Image.fromarray(np.zeros((40, 50, 3), np.uint8))
  image.save(tmp_path / 'unlabeled2017' / '1.jpg')
  check_source(sources.load_dataset(config).splits['unlabeled'], ['1'])


def test_others_have_none_of_their_own(camvid):
  with pytest.raises(InputError, match='camvid has no images without masks of'):
    load(camvid, 'official')


def scenes(**values):
  values = {'image_size': (32, 48), 'train_scenes': 8, **values}
  config = data_config('scenes', **values)
  return config, sources.load_dataset(config)


def test_scenes_of_their_own():
  _, dataset = scenes(unlabeled='official')
  source, known = dataset.splits['unlabeled'], dataset.splits['train']
  assert len(source) == 8
  labeled = {known[i]['image'].tobytes() for i in range(8)}
  for i in range(8):
    assert (source[i]['label'] == 255).all()
    assert source[i]['image'].tobytes() not in labeled


def test_limit_of_labels(camvid):
  config = data_config(root=camvid, unlabeled='rest')
  dataset = sources.load_dataset(config)
  assert 'unlabeled' not in dataset.splits
  whole = dataset.splits['train']

  def view(**options):
    return subsets.for_stage(dataset, config, **options).splits

  few = view(labeled_limit=2, distills=True)
  labeled = [few['train'].key(i) for i in range(2)]
  rest = [few['unlabeled'].key(i) for i in range(4)]
  assert {*labeled, *rest} == {whole.key(i) for i in range(6)}
  # More labels are the same ones and others.
  more = view(labeled_limit=4, distills=False)
  assert 'unlabeled' not in more
  assert {more['train'].key(i) for i in range(4)} > {*labeled}
  assert view(labeled_limit=0, distills=False)['train'] is whole
  assert view(labeled_limit=6, distills=False)['train'] is whole
  config.labeled_seed = 3
  other = view(labeled_limit=2, distills=False)
  assert {other['train'].key(i) for i in range(2)} != {*labeled}
  for count in (0, 6, 9):
    with pytest.raises(InputError, match='all 6 pairs of train are labeled'):
      view(labeled_limit=count, distills=True)


@pytest.mark.parametrize('kept', [False, True], ids=['files', 'cache'])
def test_masks_of_the_rest_are_never_opened(camvid, tmp_path, kept):
  config = data_config(root=camvid, unlabeled='rest', cache=kept)
  dataset = sources.load_dataset(config)
  splits = subsets.for_stage(
    dataset, config, labeled_limit=2, distills=True
  ).splits
  rest, labeled = splits['unlabeled'], splits['train']
  for i in range(len(rest)):
    (mask,) = (camvid / 'trainannot').glob(f'{rest.key(i)}.*')
    mask.write_bytes(b'damaged')
  for i in range(4):
    assert (rest[i]['label'] == 255).all()
    assert rest[i]['image'].shape == (*rest.size(i), 3)
    (path,) = (camvid / 'train').glob(f'{rest.key(i)}.*')
    image = np.asarray(Image.open(path).convert('RGB'))
    np.testing.assert_array_equal(rest[i]['image'], image)
  assert (rest[0]['image'] is rest[0]['image']) == kept
  assert all((labeled[i]['label'] < 255).any() for i in range(2))
  again = pickle.loads(pickle.dumps(rest))
  np.testing.assert_array_equal(again[1]['image'], rest[1]['image'])
  # Neither by the cache of decoded pixels.
  decoded = cache.with_decoded(
    pairs.Dataset('x', ('a',), np.zeros((1, 3)), splits), tmp_path / 'decoded'
  )
  for name in ('train', 'unlabeled'):
    for i in range(len(splits[name])):
      for key in ('image', 'label'):
        np.testing.assert_array_equal(
          decoded.splits[name][i][key], splits[name][i][key]
        )


def test_fingerprints(camvid):
  config = data_config(root=camvid, unlabeled='rest')
  dataset = sources.load_dataset(config)
  train = dataset.splits['train']
  others = [
    views.View(train, [0, 1]),
    views.View(train, [0, 2]),
    views.View(train, [0, 1], labeled=False),
  ]
  found = {x.fingerprint() for x in (train, *others)}
  assert len(found) == 4
  assert views.View(train, [0, 1]).fingerprint() in found
  _, drawn = scenes()
  view = views.View(drawn.splits['train'], [0, 1])
  assert not hasattr(view, 'fingerprint')
  np.testing.assert_array_equal(view.label(1), view[1]['label'])


def test_a_source_of_ones_own():
  """With what sources.py asks for, and no more."""

  class Source(list):
    size, name, key = (lambda self, i: (4, 5)), str, str

  record = {'image': np.ones((4, 5, 3), np.uint8), 'label': np.zeros((4, 5))}
  view = views.View(Source([record] * 3), [0, 2], labeled=False)
  assert len(view) == 2 and (view[1]['label'] == 255).all()
  assert view[1]['image'] is record['image']
  labeled = views.View(Source([record] * 3), [0, 2])
  assert labeled.label(1) is labeled[1]['label'] is record['label']


def test_shards_hold_them(camvid, images, tmp_path):
  folder, counts = prepared.prepare(
    load(camvid, images), tmp_path / 'shards', workers=2
  )
  assert counts['unlabeled'] == 2
  shutil.rmtree(images)
  config = data_config(prepared=str(folder), unlabeled=str(images))
  check_source(sources.load_dataset(config).splits['unlabeled'], ['a', 'b/c'])
  for value in ('', 'rest'):
    config.unlabeled = value
    assert 'unlabeled' not in sources.load_dataset(config).splits


def test_shards_without_them(camvid, tmp_path):
  dataset = load(camvid, '')
  folder, _ = prepared.prepare(dataset, tmp_path / 'shards', workers=2)
  config = data_config(prepared=str(folder), unlabeled='official')
  with pytest.raises(InputError, match='prepare_data with --config.data.unlab'):
    sources.load_dataset(config)
  config.unlabeled = 'rest'
  splits = subsets.for_stage(
    sources.load_dataset(config), config, labeled_limit=2, distills=True
  ).splits
  assert len(splits['unlabeled']) == 4
  assert (splits['unlabeled'][0]['label'] == 255).all()


@pytest.mark.parametrize(
  ('labeled', 'unlabeled', 'share', 'rows'),
  [
    (100, 0, 0.5, 0),
    (100, 20, 0.0, 3),
    (100, 100, 0.0, 8),
    (10, 1000, 0.0, 8),
    (1000, 1, 0.0, 1),
    (10, 1000, 0.75, 12),
    (10, 1000, 0.99, 15),
    (10, 1000, 1.0, 16),
  ],
)
def test_rows_of_a_batch(labeled, unlabeled, share, rows):
  assert rows == subsets.unlabeled_rows(
    16, labeled=labeled, unlabeled=unlabeled, share=share
  )
