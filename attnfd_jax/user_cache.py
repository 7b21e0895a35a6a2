# SPDX-License-Identifier: Apache-2.0
"""Where things are kept that can be made again."""

import os
import pathlib

from attnfd_jax import paths
from attnfd_jax.errors import InputError


def folder(name):
  """Path of `name` in the user's cache; it may not exist."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  found = pathlib.Path(os.path.expanduser(home))
  if found.parts[:1] == ('~',):  # A user without a home.
    found = pathlib.Path(os.devnull)  # Nothing can be made in it.
  return found / 'attnfd_jax' / name


def made(name):
  """`folder`, which is there; InputError if nothing can be written to it."""
  path = folder(name)
  try:
    path.mkdir(parents=True, exist_ok=True)
    paths.check_writable(path)
  except OSError as error:
    what = f'The cache {path} cannot be written ({error.strerror})'
    remedy = 'set XDG_CACHE_HOME to a folder that can be'
    raise InputError(f'{what}; {remedy}.') from error
  return path
