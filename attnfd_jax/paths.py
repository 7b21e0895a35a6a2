# SPDX-License-Identifier: Apache-2.0
"""Local and gs:// paths, and files that are replaced atomically."""

from collections.abc import Iterator
import contextlib
import os
import tempfile
from typing import IO

from etils import epath

from attnfd_jax.errors import InputError
from attnfd_jax.types import StrPath

LONGEST_NAME = 255  # In bytes, on all common file systems.


def is_remote(path: StrPath) -> bool:
  """Whether `path` is an address such as gs://bucket/run."""
  return '://' in str(path)


def as_path(path: StrPath) -> epath.Path:
  """An absolute path with `~` expanded.

  Raises:
    InputError: if a remote address needs a package that is not installed.
  """
  if not is_remote(path):
    return epath.Path(os.path.abspath(os.path.expanduser(path)))
  try:
    epath.Path(path).exists()
  except ImportError as error:
    remedy = "pip install 'attnfd_jax[gcs]'"
    raise InputError(f'{path}: reading it needs gcsfs; {remedy}.') from error
  return epath.Path(path)


def check_writable(folder: StrPath) -> None:
  """Raises OSError unless a file can be created in `folder` and written."""
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(b'x')
    file.flush()


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[IO[bytes]]:
  """Opens a temporary file that replaces `path` once it is complete."""
  path = epath.Path(path)
  if is_remote(path):
    with path.open('wb') as file:  # Objects are replaced whole.
      yield file
    return
  # Always the same name, so that the next run overwrites what a killed process
  # left behind.
  name = path.name
  while len(os.fsencode(name)) > LONGEST_NAME - len('..tmp'):
    name = name[:-1]
  temporary = path.with_name(f'.{name}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # The bytes must be on disk before the name.
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
