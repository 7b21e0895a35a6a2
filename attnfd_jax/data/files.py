# SPDX-License-Identifier: Apache-2.0
"""Reads files on disk and in zip archives, and lists folders."""

import dataclasses
import functools
import importlib
import os
import pathlib
import types
from typing import NamedTuple
import zipfile

from attnfd_jax.errors import DataError, first_line, InputError
from attnfd_jax.types import StrPath

# File extensions of images and masks, in training, checking and predicting.
IMAGE_ENDINGS = tuple(
  '.jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif .ppm .pgm .pbm .pnm '
  '.jp2'.split()
)
# Left behind by operating systems. Names with a leading dot are skipped too.
_JUNK = ('thumbs.db', 'desktop.ini', '__macosx')

# Maximum size of an unpacked archive member in bytes; no image needs more.
_LARGEST_MEMBER = 1 << 29


def require_module(module: str, what: str) -> types.ModuleType:
  """Imports a module of the extra 'data'.

  Raises:
    InputError: '<what> needs <module>', if it is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    name = f'{module.split(".")[0]}: pip install'
    raise InputError(f"{what} needs {name} 'attnfd_jax[data]'.") from error


def data_error(
  file: 'File | StrPath',
  kind: str,
  what: str,
  values: dict[int, int] | dict[str, int] | None = None,
) -> DataError:
  """Returns the DataError '<file>: <what>.'; see there for kind and values."""
  return DataError(f'{file}: {what}.', kind, file, values)


@functools.cache
def _archive(path: str, process: int) -> zipfile.ZipFile:
  """Opens a zip file; threads may share it, processes may not."""
  del process
  try:
    return zipfile.ZipFile(path)
  except Exception as error:  # zipfile raises many types.
    what = f'not a readable zip ({error}); copy it again'
    raise data_error(path, 'unreadable', what) from error


@dataclasses.dataclass(frozen=True)
class File:
  """A file on disk, a member of a zip archive, or bytes in memory."""

  path: str
  member: str = ''
  data: bytes | None = dataclasses.field(default=None, repr=False)
  target: str = ''  # Where a broken symbolic link points to.

  def __str__(self) -> str:
    return f'{self.path}!{self.member}' if self.member else self.path

  @property
  def inner(self) -> pathlib.PurePath:
    """The path: inside the archive for a member of one."""
    return pathlib.PurePath(self.member or self.path)

  def broken(self) -> DataError:
    """Returns the DataError of a broken link, a file with a `target`."""
    what = f'a link to {self.target}, which does not exist; the data may have'
    return data_error(
      self, 'unreadable', f'{what} been moved or not downloaded'
    )

  def read(self, limit: int | None = None) -> bytes:
    """Reads the first `limit` bytes, or all.

    Raises:
      DataError: of kind 'unreadable'.
    """
    if self.data is not None:
      return self.data[:limit]
    if self.target:
      raise self.broken()
    archive = _archive(self.path, os.getpid()) if self.member else None
    try:
      if not archive:
        with open(self.path, 'rb') as file:
          return file.read(limit)
      size = archive.getinfo(self.member).file_size
      if size > _LARGEST_MEMBER:
        raise ValueError(f'{size} bytes, too large for an image')
      with archive.open(self.member) as file:
        # A member larger than declared must not exhaust the memory.
        return file.read(size + 1 if limit is None else limit)
    except Exception as error:  # zipfile raises many types.
      what = f'cannot be read ({first_line(error)})'
      remedy = '; copy the zip again' if archive else ''
      raise data_error(self, 'unreadable', what + remedy) from error


def as_file(path: File | StrPath) -> File:
  """Converts a path to a File."""
  return File(str(path)) if isinstance(path, (str, os.PathLike)) else path


def read_lines(path: StrPath) -> list[str]:
  """Reads the stripped lines of a text file, without a byte order mark."""
  text = pathlib.Path(path).read_text(encoding='utf-8-sig', errors='replace')
  return [line.strip() for line in text.splitlines()]


def _is_hidden(name: str) -> bool:
  return name.startswith('.') or name.lower() in _JUNK


class Listing(NamedTuple):
  """Files in a folder and its subfolders, without hidden ones."""

  files: dict[str, File]  # By path relative to the folder, with '/'; sorted.
  others: list[str]  # Relative paths of files with other extensions.


def walk(folder: StrPath, endings: tuple[str, ...] = IMAGE_ENDINGS) -> Listing:
  """Lists a folder recursively, following links; empty if it does not exist.

  A broken link is a File with a `target`, whatever its extension.

  Raises:
    DataError: of kind 'unreadable', if a folder cannot be listed.
  """

  def refuse(error: OSError) -> None:
    if os.path.lexists(error.filename):
      what = f'cannot be listed ({error.strerror})'
      raise data_error(error.filename, 'unreadable', what) from error

  listed: dict[str, File] = {}
  others: list[str] = []
  # Resolved paths of a folder and of those above it.
  chains: dict[str, set[str]] = {}
  for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
    parents = chains.get(os.path.dirname(top), set())
    real = os.path.realpath(top)
    folders[:] = [x for x in folders if not _is_hidden(x)]
    if real in parents:  # A link to one of its parents.
      folders.clear()
      continue
    chains[top], inner = {*parents, real}, os.path.relpath(top, folder)
    for name in names:
      if _is_hidden(name):
        continue
      path = os.path.join(top, name)
      inside = name if inner == os.curdir else f'{inner}/{name}'
      is_file = os.path.isfile(path)
      if not is_file and os.path.islink(path):
        listed[inside] = File(path, target=os.readlink(path))
      elif is_file and name.lower().endswith(endings):
        listed[inside] = File(path)
      else:
        others.append(inside)
  return Listing(dict(sorted(listed.items())), sorted(others))


def list_zip(
  path: StrPath, prefix: str, endings: tuple[str, ...]
) -> list[File]:
  """Lists the members of a zip whose names start with `prefix`, sorted."""
  names = sorted(_archive(str(path), os.getpid()).namelist())
  return [
    File(str(path), name)
    for name in names
    if name.startswith(prefix)
    and name.lower().endswith(endings)
    and not _is_hidden(pathlib.PurePath(name).name)
  ]
