# SPDX-License-Identifier: Apache-2.0
"""Batches depend on seed and step alone; evaluation counts each pixel once."""

import itertools

import jax
import numpy as np
import pytest

from attnfd_jax.data import pipeline
from attnfd_jax.data.transforms import Augment

AUGMENT = Augment(32, (32, 32), photometric=1.0)
# Leaves records as they are.
IDENTITY = Augment(32, (32, 32), flip=0.0, blur=0.0, scale_range=(1.0, 1.0))
SIZES = [(32, 40)] * 5 + [(48, 32)] * 3 + [(33, 47)]


class Source:
  """Record i has its index in every image value; labels are random."""

  def __init__(self, sizes):
    self._sizes = sizes

  def __len__(self):
    return len(self._sizes)

  def __getitem__(self, index):
    size = self._sizes[index]
    generator = np.random.default_rng(index)
    label = generator.integers(0, 6, size, np.uint8)
    label[label == 5] = 255
    image = np.full((*size, 3), index + 1, np.uint8)
    return {'image': image, 'label': label}

  def size(self, index):
    return self._sizes[index]


SQUARES = Source([(32, 32)] * 10)


def take(count, *, seed=0, step=0, batch_size=4, augment=AUGMENT, **options):
  batches = iter(
    pipeline.train_batches(
      SQUARES, augment, batch_size=batch_size, seed=seed, step=step, **options
    )
  )
  found = list(itertools.islice(batches, count))
  if hasattr(batches, 'close'):
    batches.close()
  return found


def assert_equal(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert set(a) == set(b) == {'image', 'label'}
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def indices(batches):
  """Numbers of the records, in order."""
  return np.concatenate([b['image'][:, 0, 0, 0] for b in batches]).astype(int)


@pytest.fixture(scope='module')
def batches():
  return take(8)


def test_shapes(batches):
  for batch in batches:
    assert batch['image'].shape == (4, 32, 32, 3)
    assert batch['label'].shape == (4, 32, 32)
    assert batch['image'].dtype == batch['label'].dtype == np.uint8


def test_threads_do_not_matter(batches):
  assert_equal(take(8, threads=1), batches)


@pytest.mark.slow
def test_workers_do_not_matter(batches):
  assert_equal(take(3, workers=1, threads=1), batches[:3])


@pytest.mark.parametrize('step', [1, 3, 7], ids=str)
def test_resumes_at_a_step(batches, step):
  # 10 records, 4 a batch: epochs end inside of batches.
  assert_equal(take(8 - step, step=step), batches[step:])


def test_seed_changes_order_and_pixels(batches):
  ours, theirs = (
    indices(take(5, seed=seed, augment=IDENTITY)) for seed in (0, 1)
  )
  assert np.any(ours != theirs)
  other = take(1, seed=1)[0]
  assert np.any(other['label'] != batches[0]['label'])


def test_records_are_seen_equally_often_in_new_orders():
  order = indices(take(10, augment=IDENTITY))
  epochs = order.reshape(4, 10)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(1, 11))
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
  # Neither does the next seed repeat this one, an epoch later.
  following = indices(take(10, seed=1, augment=IDENTITY)).reshape(4, 10)
  assert not {tuple(e) for e in epochs.tolist()} & {
    tuple(e) for e in following.tolist()
  }


def test_augmentation_is_new_in_each_epoch():
  found = take(20, batch_size=1, threads=1)
  labels = [batch['label'].tobytes() for batch in found]
  assert len(set(labels)) == 20


def test_processes_share_a_batch(monkeypatch):
  whole = take(6)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  parts = []
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    parts.append(take(6))
  for first, second, both in zip(*parts, whole, strict=True):
    assert first['image'].shape[0] == 2
    for key in both:
      merged = np.stack([first[key], second[key]], 1).reshape(both[key].shape)
      np.testing.assert_array_equal(merged, both[key])


def test_batches_that_processes_cannot_share_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  with pytest.raises(ValueError, match='batch_size=4 must be a multiple of 3'):
    take(1)


def histogram(labels):
  return sum(np.bincount(label.ravel(), minlength=256) for label in labels)


def evaluated(sizes=SIZES, batch_size=4, **options):
  return list(
    pipeline.eval_batches(
      Source(sizes), batch_size=batch_size, threads=2, **options
    )
  )


@pytest.mark.parametrize('size_multiple', [1, 32], ids=['exact', 'padded'])
@pytest.mark.parametrize('batch_size', [1, 2, 4, 16], ids=str)
def test_every_pixel_counts_once(batch_size, size_multiple):
  batches = evaluated(batch_size=batch_size, size_multiple=size_multiple)
  source = Source(SIZES)
  expected = histogram([source[i]['label'] for i in range(len(source))])
  found = histogram([batch['label'] for batch in batches])
  # Only ignored pixels are added.
  np.testing.assert_array_equal(found[:255], expected[:255])
  seen = []
  for batch in batches:
    assert batch['image'].shape[0] == batch_size
    assert batch['image'].shape[:3] == batch['label'].shape
    height, width = batch['label'].shape[1:]
    assert height % size_multiple == 0 and width % size_multiple == 0
    for image, label in zip(batch['image'], batch['label'], strict=True):
      index = int(image[0, 0, 0])
      if not index:
        assert np.all(image == 0) and np.all(label == 255)
        continue
      seen.append(index)
      h, w = SIZES[index - 1]
      np.testing.assert_array_equal(label[:h, :w], source[index - 1]['label'])
      assert np.all(label[h:] == 255) and np.all(label[:, w:] == 255)
  assert sorted(seen) == list(range(1, 10))
  # As many compilations as sizes: 32 x 40 and 33 x 47 become one.
  shapes = {batch['image'].shape for batch in batches}
  rounded = {tuple(-(-n // size_multiple) for n in size) for size in SIZES}
  assert len(shapes) == len(rounded)


@pytest.mark.parametrize('short_side', [0, 24], ids=['whole', 'short_side'])
def test_labels_keep_their_size(short_side):
  batches = evaluated(short_side=short_side)
  sizes = {(b['image'].shape[1:3], b['label'].shape[1:]) for b in batches}
  seen = {
    (32, 40): (24, 30),
    (48, 32): (36, 24),
    (33, 47): (24, 34),
  }
  assert sizes == {(seen[s] if short_side else s, s) for s in seen}


def test_resized_labels_have_the_size_of_the_image():
  batches = evaluated(short_side=24, resize_labels=True)
  sizes = {b['label'].shape[1:] for b in batches}
  assert sizes == {(24, 30), (36, 24), (24, 34)}
  for batch in batches:
    assert batch['image'].shape[1:3] == batch['label'].shape[1:]
  pixels = sum(np.sum(b['image'][:, 0, 0, 0] > 0) for b in batches)
  assert pixels == 9


def test_processes_share_evaluation(monkeypatch):
  whole = evaluated()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  parts = []
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    parts.append(evaluated())
  # Equal numbers of batches of equal shapes: all hosts run the same programs.
  shapes = [[b['image'].shape for b in part] for part in parts]
  assert shapes[0] == shapes[1] and len(shapes[0]) == len(whole)
  total = histogram([b['label'] for part in parts for b in part])
  np.testing.assert_array_equal(total, histogram([b['label'] for b in whole]))


def test_batches_go_to_the_devices():
  device = jax.devices()[1]
  sharding = jax.sharding.SingleDeviceSharding(device)
  dataset = pipeline.train_batches(SQUARES, AUGMENT, batch_size=2, seed=0)
  batch = next(iter(pipeline.to_device(dataset, sharding)))
  assert batch['image'].devices() == {device}
  assert_equal([jax.tree.map(np.asarray, batch)], take(1, batch_size=2))
