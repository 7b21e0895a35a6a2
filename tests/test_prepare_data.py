# SPDX-License-Identifier: Apache-2.0
"""Shards give the batches that the files give, and survive interruptions."""

from data import fixtures
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_run

from attnfd_jax.config import default_config
from attnfd_jax.data import classes, pipeline, prepared
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.data.transforms import Augment
from attnfd_jax.errors import DataError, InputError

MAKERS = {
  'camvid': fixtures.make_camvid,
  'pascal_voc': fixtures.make_voc,
  'cityscapes': fixtures.make_cityscapes,
  'coco': fixtures.make_coco,
  'folder': lambda root: fixtures.make_folder(root, 'colors'),
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
  """Several shards of few images; nothing in the user's cache."""
  monkeypatch.setattr(prepared, 'SHARD_SIZE', 4)
  cache = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))


def load(name, **keys):
  config = default_config().data
  folder = fixtures.folder_config('colors') if name == 'folder' else {}
  config.update(folder | {'name': name} | keys)
  return load_dataset(config)


def first_batches(source):
  augment = Augment(48, (32, 32), photometric=0.5)
  batches = pipeline.train_batches(source, augment, batch_size=4, seed=3)
  iterator = iter(batches)
  return [next(iterator) for _ in range(3)]


def assert_equal(ours, theirs):
  assert ours.keys() == theirs.keys()
  for key, value in ours.items():
    np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize('name', MAKERS)
def test_both_ways_give_the_same_batches(tmp_path, name):
  if name == 'coco':
    pytest.importorskip('pycocotools')
  MAKERS[name](tmp_path / 'files')
  files = load(name, root=str(tmp_path / 'files'))
  target = tmp_path / 'shards'
  folder, counts = prepared.prepare(files, target, workers=2)
  assert counts == {split: len(x) for split, x in files.splits.items()}
  # Nothing but the data set is left.
  assert [path.name for path in target.iterdir()] == [name]
  for given in (target, folder):
    shards = load(name, prepared=str(given))
    assert shards.class_names == files.class_names
    np.testing.assert_array_equal(shards.palette, files.palette)
    assert shards.splits.keys() == files.splits.keys()
  for split, ours in shards.splits.items():
    theirs = files.splits[split]
    for i in range(len(theirs)):
      assert ours.key(i) == theirs.key(i) and ours.size(i) == theirs.size(i)
      assert_equal(ours[i], theirs[i])
  for ours, theirs in zip(
    first_batches(shards.splits['train']),
    first_batches(files.splits['train']),
    strict=True,
  ):
    assert_equal(ours, theirs)
  fewer = load(name, prepared=str(target), limit=2).splits['train']
  assert len(fewer) == 2
  # What is kept of one source must not be taken for another's.
  sources = [fewer, *shards.splits.values()]
  assert len({source.fingerprint() for source in sources}) == len(sources)


def test_goes_on_with_the_first_unfinished_shard(tmp_path, monkeypatch):
  root = tmp_path / 'files'
  fixtures.make_camvid(root)
  files = load('camvid', root=str(root))
  bad = sorted((root / 'trainannot').iterdir())[-1]
  content = bad.read_bytes()
  bad.write_bytes(content[:40])
  with pytest.raises(DataError, match=bad.name):
    prepared.prepare(files, tmp_path / 'shards', workers=1)
  staged = tmp_path / 'shards' / '.camvid.shards'
  (first,) = staged.glob('train-*')
  assert first.name.startswith(f'train-{prepared.VERSION}-0-')
  # What is finished is not read again, unless its files have changed.
  bad.write_bytes(content)
  changed = root / 'val' / f'{files.splits["val"].key(0)}.png'
  changed.write_bytes(changed.read_bytes() + bytes(1))
  source, read = type(files.splits['train']), []
  encoded = source.encoded

  def recorded(self, index):
    read.append(self.name(index))
    return encoded(self, index)

  monkeypatch.setattr(source, 'encoded', recorded)
  prepared.prepare(files, tmp_path / 'shards', workers=1)
  train, val = files.splits['train'], files.splits['val']
  assert not {train.name(i) for i in range(4)} & set(read)
  assert {train.name(4), train.name(5), val.name(0)} <= set(read)


def test_shards_of_an_attempt_with_other_data_are_not_kept(tmp_path):
  root, target = tmp_path / 'files', tmp_path / 'shards'
  fixtures.make_camvid(root)
  bad = sorted((root / 'testannot').iterdir())[-1]
  content = bad.read_bytes()
  bad.write_bytes(content[:40])
  with pytest.raises(DataError, match=bad.name):
    prepared.prepare(load('camvid', root=str(root)), target, workers=1)
  bad.write_bytes(content)
  fewer = load('camvid', root=str(root), limit=2)
  folder, _ = prepared.prepare(fewer, target, workers=1)
  names = {path.name for path in folder.glob('camvid-*')}
  assert names == {
    f'camvid-{split}.array_record-00000-of-00001'
    for split in ('train', 'val', 'test')
  }
  splits = load('camvid', prepared=str(target)).splits
  assert [len(source) for source in splits.values()] == [2, 2, 2]


def test_the_command(tmp_path):
  fixtures.make_camvid(tmp_path / 'files')
  arguments = (
    f'--config={tiny_run.ROOT}/configs/camvid.py',
    f'--config.data.root={tmp_path}/files',
    f'--target={tmp_path}/shards',
  )
  done = tiny_run.run_verb('prepare_data', *arguments)
  assert done.returncode == 0, done.stderr
  assert 'train 6, val 4, test 4 records' in done.stdout
  assert '14/14' in done.stderr
  done = tiny_run.run_verb('prepare_data', *arguments)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and 'remove it' in line


def test_what_cannot_be_read_is_refused(tmp_path):
  fixtures.make_camvid(tmp_path / 'files')
  files = load('camvid', root=str(tmp_path / 'files'))
  with pytest.raises(InputError, match='not a data set of files'):
    prepared.prepare(load('scenes'), tmp_path / 'shards', workers=1)
  with pytest.raises(InputError, match='no data set of prepare_data in it'):
    load('camvid', prepared=str(tmp_path / 'files'))
  folder, _ = prepared.prepare(files, tmp_path / 'shards', workers=1)
  with pytest.raises(InputError, match='contains camvid'):
    load('cityscapes', prepared=str(folder))
  info = folder / 'dataset_info.json'
  text = info.read_text()
  assert '"array_record"' in text
  info.write_text(text.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(InputError, match='needs TensorFlow'):
    load('camvid', prepared=str(folder))


def test_the_stock_cityscapes_of_tfds(tmp_path):
  """Its labels are label ids, its splits have names of their own."""
  drawn = fixtures.make_cityscapes(tmp_path / 'files')
  files = load('cityscapes', root=str(tmp_path / 'files'))

  class Cityscapes(tfds.core.ShardBasedBuilder, skip_registration=True):
    name = 'cityscapes'
    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='semantic_segmentation')]

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          'image_id': tfds.features.Text(),
          'image_left': tfds.features.Image(shape=(None, None, 3)),
          'segmentation_label': tfds.features.Image(shape=(None, None, 1)),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager):
      def examples(split):
        source = files.splits[split]
        masks = sorted((tmp_path / f'files/gtFine/{split}').rglob('*labelIds*'))
        for i, mask in enumerate(masks):
          yield (
            i,
            {
              'image_id': source.key(i),
              'image_left': source.pairs[i].image.read(),
              'segmentation_label': mask.read_bytes(),
            },
          )

      return {
        'train': [lambda: examples('train')],
        'validation': [lambda: examples('val')],
      }

  builder = Cityscapes(data_dir=str(tmp_path), file_format='array_record')
  builder.download_and_prepare()
  stock = load('cityscapes', prepared=builder.data_dir)
  assert stock.class_names == tuple(classes.CITYSCAPES)
  assert list(stock.splits) == ['train', 'val']
  for split, source in stock.splits.items():
    assert len(source) == len(drawn[split])
    for i in range(len(source)):
      assert_equal(source[i], files.splits[split][i])
