# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels are those of the files, as long as the files are the same."""

import fcntl
import itertools
import pickle
import threading
import time

import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import cache, pipeline
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.data.transforms import Augment
from attnfd_jax.errors import InputError

SIZES = [(40, 60), (33, 35), (64, 32)]


class Source:
  """Random records of several sizes; `broken` are refused."""

  def __init__(self, count=9, *, mark='one', broken=()):
    self._count, self._mark, self._broken = count, mark, broken
    self.read = []

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    if index in self._broken:
      raise InputError(f'{self.name(index)}: not a readable image.')
    self.read.append(index)
    generator, size = np.random.default_rng(index), self.size(index)
    image = generator.integers(0, 256, (*size, 3), np.uint8)
    return {'image': image, 'label': generator.integers(0, 9, size, np.uint8)}

  def size(self, index):
    return SIZES[index % 3]

  def name(self, index):
    return f'{index}.png'

  def key(self, index):
    return f'key {index}'

  def fingerprint(self):
    return self._mark


def assert_same(found, source):
  assert len(found) == len(source)
  for i in range(len(source)):
    assert found.size(i) == source.size(i)
    assert found.name(i) == source.name(i) and found.key(i) == source.key(i)
    record = source[i]
    assert set(found[i]) == set(record)
    for key, value in record.items():
      assert found[i][key].dtype == np.uint8
      np.testing.assert_array_equal(found[i][key], value)


def test_pixels_are_those_of_the_source(tmp_path):
  assert_same(cache.open_decoded(Source(), tmp_path / 'new'), Source())


def test_pixels_are_decoded_once(tmp_path):
  cache.open_decoded(Source(), tmp_path)
  again = Source(broken=range(9))
  found = cache.open_decoded(again, tmp_path)
  assert again.read == []
  np.testing.assert_array_equal(found[4]['label'], Source()[4]['label'])
  # What is left is the pixels and where they are.
  files = {path.name: path.stat().st_size for path in tmp_path.glob('one/*')}
  assert set(files) == {'pixels.npy', 'sizes.npy', 'lock'}
  assert files['pixels.npy'] == 128 + 4 * 3 * sum(h * w for h, w in SIZES)


def test_another_fingerprint_is_another_cache(tmp_path):
  cache.open_decoded(Source(), tmp_path)
  other = Source(mark='two')
  cache.open_decoded(other, tmp_path)
  assert sorted(other.read) == list(range(9))


def test_an_interrupted_build_goes_on(tmp_path):
  with pytest.raises(InputError, match=r'^5.png: not a readable image'):
    cache.open_decoded(Source(broken=(5,)), tmp_path, threads=1)
  # Half a file never has the name of the whole one.
  assert not (tmp_path / 'one' / 'pixels.npy').exists()
  with (tmp_path / 'one' / 'pixels.npy.part').open('ab') as file:
    file.write(bytes(100))  # Half a record.
  source = Source()
  found = cache.open_decoded(source, tmp_path, threads=1)
  assert source.read == [5, 6, 7, 8]
  assert_same(found, Source())


def test_processes_of_a_host_build_once(tmp_path, capsys):
  """The lock is one of files: who waits finds the pixels of the other."""
  (tmp_path / 'one').mkdir()
  source = Source()
  with open(tmp_path / 'one' / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(
      target=cache.open_decoded, args=(source, tmp_path)
    )
    thread.start()
    time.sleep(0.2)
    assert source.read == []
    (tmp_path / 'other').mkdir()
    built = cache.open_decoded(Source(mark='other'), tmp_path)
    for path in (tmp_path / 'other').glob('*.npy'):
      path.rename(tmp_path / 'one' / path.name)
    del built
  thread.join()
  assert source.read == []
  assert 'waiting for the process that fills' in capsys.readouterr().out


def test_a_full_disk_is_told_before_the_work(monkeypatch, tmp_path):
  usage = type('Usage', (), {'free': 1000})
  monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: usage)
  source = Source()
  with pytest.raises(InputError, match=r'no space for 0.0 GB .*decoded_cache'):
    cache.open_decoded(source, tmp_path)
  assert source.read == []


class Lying(Source):
  def __getitem__(self, index):
    return {k: v[1:] for k, v in super().__getitem__(index).items()}


def test_records_of_another_size_than_their_header(tmp_path):
  source = Lying()
  with pytest.raises(InputError, match=r'^\d.png: size differs from the one'):
    cache.open_decoded(source, tmp_path)


def test_drawn_sets_have_no_cache(tmp_path):
  config = default_config().data
  config.train_scenes = 2
  dataset = load_dataset(config)
  with pytest.raises(
    InputError, match='decoded_cache works only for data sets of fil'
  ):
    cache.with_decoded(dataset, tmp_path)


def test_pickles_without_its_pixels(tmp_path):
  found = cache.open_decoded(Source(300), tmp_path)
  found[0]
  data = pickle.dumps(found)
  assert len(data) < 20_000  # 2 MB of pixels.
  np.testing.assert_array_equal(
    pickle.loads(data)[7]['image'], found[7]['image']
  )


def test_batches_do_not_change(tmp_path):
  """Pixels from the disk are read-only, and prepared all the same."""
  augment = Augment(36, (32, 48), photometric=1.0, rotation=10.0)
  plain, decoded = Source(), cache.open_decoded(Source(), tmp_path)
  for make_batches in (
    lambda source: itertools.islice(
      iter(pipeline.train_batches(source, augment, batch_size=6, seed=0)), 2
    ),
    lambda source: pipeline.eval_batches(source, batch_size=2, short_side=40),
  ):
    for first, second in zip(
      make_batches(plain), make_batches(decoded), strict=True
    ):
      for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@pytest.fixture
def folder(tmp_path):
  """A data set of index masks, three images in train and two in val."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 3), ('val', 2)):
    for kind, shape in (('images', (32, 40, 3)), ('masks', (32, 40))):
      (tmp_path / kind / split).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256 if kind == 'images' else 2, shape, 'u1')
        Image.fromarray(pixels).save(tmp_path / kind / split / f'{i}.png')
  config = default_config().data
  config.name, config.root = 'folder', str(tmp_path)
  config.class_names = ('a', 'b')
  return config


def test_files_have_a_fingerprint(folder, tmp_path):
  def fingerprint(split='train'):
    return load_dataset(folder).splits[split].fingerprint()

  before = fingerprint()
  assert fingerprint() == before and len(before) == 32
  assert fingerprint('val') != before
  folder.limit = 2
  assert fingerprint() != before
  folder.limit = 0
  mask = tmp_path / 'masks' / 'train' / '1.png'
  data = mask.read_bytes()
  mask.write_bytes(data)  # The same pixels, but nobody knows.
  edited = fingerprint()
  assert edited != before
  folder.class_names = ('a', 'b', 'c')
  assert fingerprint() != edited


def test_the_splits_of_every_epoch_are_decoded(folder, tmp_path):
  dataset = load_dataset(folder)
  found = cache.with_decoded(dataset, tmp_path / 'cache')
  for split, source in dataset.splits.items():
    assert isinstance(found.splits[split], cache.DecodedSource)
    assert_same(found.splits[split], source)


def test_one_cache_is_enough():
  config = default_config()
  config.data.cache, config.data.decoded_cache = True, 'somewhere'
  with pytest.raises(
    InputError, match='config.data.decoded_cache keeps on the'
  ):
    resolve(config)
