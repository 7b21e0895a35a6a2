# SPDX-License-Identifier: Apache-2.0
"""Rare classes come up as often as they are told to, and are counted once."""

import numpy as np
import pytest

from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import frequencies
from attnfd_jax.data.frequencies import Balance
from attnfd_jax.errors import InputError

# Class 0 is everywhere, 1 in two records, 2 in one, 3 in none.
PRESENCE = np.zeros((10, 4), bool)
PRESENCE[:, 0] = True
PRESENCE[[2, 5], 1] = True
PRESENCE[7, 2] = True


class Source:
  """Record i shows the classes of row i; a count of what was read."""

  def __init__(self, presence):
    self._presence = presence
    self.read = 0

  def __len__(self):
    return len(self._presence)

  def __getitem__(self, index):
    self.read += 1
    label = np.full((4, 6), 255, np.uint8)
    present = np.flatnonzero(self._presence[index])
    label[1, : len(present)] = present
    return {'image': np.zeros((4, 6, 3), np.uint8), 'label': label}


class FileSource(Source):
  """Has a fingerprint, so its counts can be kept."""

  mark = 'one'

  def fingerprint(self):
    return self.mark


class LabelSource(Source):
  """Gives labels without their images."""

  def label(self, index):
    return super().__getitem__(index)['label']

  def __getitem__(self, index):
    raise AssertionError('the image was read, too')


def draws(share, presence=PRESENCE, count=20000):
  balance, rng = Balance(share, presence), np.random.default_rng(0)
  found = [balance.random_map(i % 10, rng) for i in range(count)]
  assert all(isinstance(index, int) for index in found)
  return np.bincount(found, minlength=10) / count


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0], ids=str)
def test_share_of_the_draws(share):
  # By class: each of the three that occur; then one of its records.
  by_class = np.full(10, 1 / 3 / 10)
  by_class[[2, 5]] += 1 / 3 / 2
  by_class[7] += 1 / 3
  expected = (1 - share) / 10 + share * by_class
  # Five deviations of a mean of 20000 draws are at most 0.018.
  np.testing.assert_allclose(draws(share), expected, rtol=0, atol=0.018)


def test_without_a_draw_indices_stay():
  balance, rng = Balance(0.0, PRESENCE), np.random.default_rng(0)
  found = [balance.random_map(i, rng) for i in range(10)]
  assert found == list(range(10))


def test_without_classes_indices_stay():
  nothing = np.zeros((10, 4), bool)
  np.testing.assert_allclose(draws(1.0, nothing), 0.1, rtol=1e-12)


def test_presence_is_that_of_the_labels():
  found = frequencies.class_presence(Source(PRESENCE), 4, threads=2)
  np.testing.assert_array_equal(found, PRESENCE)
  assert found.dtype == bool


def test_images_are_not_decoded():
  found = frequencies.class_presence(LabelSource(PRESENCE), 4)
  np.testing.assert_array_equal(found, PRESENCE)


def test_presence_is_counted_once(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for _ in range(2):
    source = FileSource(PRESENCE)
    found = frequencies.class_presence(source, 4)
    np.testing.assert_array_equal(found, PRESENCE)
  assert source.read == 0
  # Other files, or other classes.
  changed = FileSource(PRESENCE[::-1])
  changed.mark = 'two'
  found = frequencies.class_presence(changed, 4)
  np.testing.assert_array_equal(found, PRESENCE[::-1])
  found = frequencies.class_presence(FileSource(PRESENCE), 2)
  np.testing.assert_array_equal(found, PRESENCE[:, :2])
  files = [path.name for path in tmp_path.rglob('*') if path.is_file()]
  assert sorted(files) == ['one-2.npy', 'one-4.npy', 'two-4.npy']


@pytest.mark.parametrize('place', ['file', '/proc'])
def test_presence_without_a_cache(monkeypatch, tmp_path, capsys, place):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / place))
  for _ in range(2):
    found = frequencies.class_presence(FileSource(PRESENCE), 4)
    np.testing.assert_array_equal(found, PRESENCE)
    text = capsys.readouterr().err
    assert text.count('set XDG_CACHE_HOME to a writable folder. Every') == 1


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('balanced', 1.5, r'config.data.balanced=1.5 must be from 0 to 1\.'),
    ('balanced', -0.1, r'config.data.balanced=-0.1 must be from 0 to 1\.'),
    ('rotation', 181.0, r'config.data.rotation=181.0 must be from 0 to 180\.'),
    ('rotation', float('nan'), r'config.data.rotation=nan must be from'),
  ],
  ids=str,
)
def test_bad_values(key, value, message):
  config = default_config()
  config.data[key] = value
  with pytest.raises(InputError, match=message):
    resolve(config)
