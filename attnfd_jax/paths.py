# SPDX-License-Identifier: Apache-2.0
"""Paths on a disk or at gs://, and files that are replaced whole."""

import contextlib
import os
import tempfile

from etils import epath

from attnfd_jax.errors import InputError

LONGEST_NAME = 255  # Bytes, on all common file systems.


def is_remote(path):
  """Whether `path` is an address such as gs://bucket/run."""
  return '://' in str(path)


def as_path(path):
  """An absolute epath.Path, `~` being the home folder; InputError if an address
  needs another package.
  """
  if not is_remote(path):
    return epath.Path(os.path.abspath(os.path.expanduser(path)))
  try:
    epath.Path(path).exists()
  except ImportError as error:
    remedy = "pip install 'attnfd_jax[gcs]'"
    raise InputError(f'{path}: reading it needs gcsfs; {remedy}.') from error
  return epath.Path(path)


def check_writable(folder):
  """Raises OSError unless a file can be made in `folder`, and written."""
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(b'x')
    file.flush()


@contextlib.contextmanager
def replacing(path):
  """A file, open for bytes, that takes the place of `path` when it is whole."""
  path = epath.Path(path)
  if is_remote(path):
    with path.open('wb') as file:  # Objects are replaced whole.
      yield file
    return
  # One name: what a killed process leaves is overwritten by the next one.
  name = path.name
  while len(os.fsencode(name)) > LONGEST_NAME - len('..tmp'):
    name = name[:-1]
  temporary = path.with_name(f'.{name}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # The name must not be there before the bytes.
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
