# SPDX-License-Identifier: Apache-2.0
"""Home folders, names as long as they may be, and caches."""

import os

import pytest

from attnfd_jax import paths, user_cache
from attnfd_jax.errors import InputError


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('~/a', '/home/me/a'),
    ('~', '/home/me'),
    ('/x/~/a', '/x/~/a'),
    ('/x/../a', '/a'),
  ],
)
def test_home(monkeypatch, given, expected):
  monkeypatch.setenv('HOME', '/home/me')
  assert str(paths.as_path(given)) == expected


@pytest.mark.parametrize('name', ['a' * 255, 'ä' * 127, '空' * 85, 'b.json'])
def test_names_as_long_as_they_may_be_are_replaced(tmp_path, name):
  path = tmp_path / name
  for text in (b'old', b'new'):
    with paths.replacing(path) as file:
      file.write(text)
      assert len([*tmp_path.iterdir()]) == 1 + (text == b'new')
  assert path.read_bytes() == b'new'
  assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('variable', ['XDG_CACHE_HOME', 'HOME'])
@pytest.mark.parametrize('place', ['file', 'file/below', '/proc', '/dev/null'])
def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, variable, place):
  (tmp_path / 'file').write_text('')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv(variable, str(tmp_path / place))
  with pytest.raises(InputError) as refused:
    user_cache.made('coco')
  text = str(refused.value)
  assert text.startswith(f'The cache {user_cache.folder("coco")} cannot be wri')
  assert text.endswith('; set XDG_CACHE_HOME to a writable folder.')


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  path = user_cache.made('coco')
  assert path == tmp_path / 'attnfd_jax' / 'coco' and not [*path.iterdir()]

  def full(folder):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(paths, 'check_writable', full)
  with pytest.raises(InputError, match=r'No space left.*XDG_CACHE_HOME'):
    user_cache.made('coco')


def test_places_of_the_cache(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.setenv('XDG_CACHE_HOME', '~/cache')
  assert str(user_cache.folder('x')) == '/home/me/cache/attnfd_jax/x'
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert str(user_cache.folder('x')) == '/home/me/.cache/attnfd_jax/x'
  # A user whom the system does not know.
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  assert str(user_cache.folder('x')) == '/dev/null/attnfd_jax/x'
