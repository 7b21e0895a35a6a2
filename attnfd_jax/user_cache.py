# SPDX-License-Identifier: Apache-2.0
"""The user's cache folder: downloads and compiled programs."""

import os
import pathlib

from attnfd_jax import paths
from attnfd_jax.errors import InputError


def folder(name: str) -> pathlib.Path:
  """Path of `name` in the user's cache; it may not exist."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  cache = pathlib.Path(os.path.expanduser(home))
  if cache.parts[:1] == ('~',):  # A user without a home folder.
    cache = pathlib.Path(os.devnull)  # Not writable, which `made` reports.
  return cache / 'attnfd_jax' / name


def made(name: str) -> pathlib.Path:
  """Creates `folder(name)`; InputError if it is not writable."""
  path = folder(name)
  try:
    path.mkdir(parents=True, exist_ok=True)
    paths.check_writable(path)
  except OSError as error:
    what = f'The cache {path} cannot be written ({error.strerror})'
    remedy = 'set XDG_CACHE_HOME to a writable folder'
    raise InputError(f'{what}; {remedy}.') from error
  return path
