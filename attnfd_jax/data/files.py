# SPDX-License-Identifier: Apache-2.0
"""Files as they lie on the disk or inside of a zip archive."""

import dataclasses
import functools
import importlib
import os
import pathlib
from typing import NamedTuple
import zipfile

from attnfd_jax.errors import DataError, first_line, InputError

# Of all images and masks, in training, checking and predicting.
IMAGE_ENDINGS = tuple(
  '.jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif .ppm .pgm .pbm .pnm '
  '.jp2'.split()
)
# What systems leave behind; names that start with a dot are skipped as well.
_JUNK = ('thumbs.db', 'desktop.ini', '__macosx')

# Bytes of an unpacked member: more than any image needs.
_LARGEST_MEMBER = 1 << 29


def need(module, what):
  """A module of the extra 'data'; InputError if it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    name = f'{module.split(".")[0]}: pip install'
    raise InputError(f"{what} needs {name} 'attnfd_jax[data]'.") from error


def fault(file, kind, what, values=None):
  """The DataError '<file>: <what>.'; see there for kind and values."""
  return DataError(f'{file}: {what}.', kind, file, values)


@functools.cache
def _archive(path, process):
  """The open ZipFile; threads may share one, processes may not."""
  del process
  try:
    return zipfile.ZipFile(path)
  except Exception as error:  # zipfile has many types for damaged headers.
    what = f'not a readable zip ({error}); copy it again'
    raise fault(path, 'unreadable', what) from error


@dataclasses.dataclass(frozen=True)
class File:
  """A file on the disk, a member of a zip archive, or bytes in memory."""

  path: str
  member: str = ''
  data: bytes | None = dataclasses.field(default=None, repr=False)
  target: str = ''  # Of a link to a file that is not there.

  def __str__(self):
    return f'{self.path}!{self.member}' if self.member else self.path

  @property
  def inner(self):
    """Its path, in the zip if it lies in one."""
    return pathlib.PurePath(self.member or self.path)

  def broken(self):
    """The DataError of a file with a `target`."""
    what = f'a link to {self.target}, which is not there; was the data moved'
    return fault(self, 'unreadable', f'{what}, or not downloaded')

  def read(self, limit=None):
    """The first `limit` bytes, or all; raises DataError 'unreadable'."""
    if self.data is not None:
      return self.data[:limit]
    if self.target:
      raise self.broken()
    archive = self.member and _archive(self.path, os.getpid())
    try:
      if not archive:
        with open(self.path, 'rb') as file:
          return file.read(limit)
      size = archive.getinfo(self.member).file_size
      if size > _LARGEST_MEMBER:
        raise ValueError(f'{size} bytes, more than an image has')
      with archive.open(self.member) as file:
        # A member that is larger than declared must not fill the memory.
        return file.read(size + 1 if limit is None else limit)
    except Exception as error:  # zipfile raises many types.
      what = f'cannot be read ({first_line(error)})'
      remedy = '; copy the zip again' if archive else ''
      raise fault(self, 'unreadable', what + remedy) from error


def as_file(path):
  """A path as a File; a File as it is."""
  return File(str(path)) if isinstance(path, (str, os.PathLike)) else path


def read_lines(path):
  """Stripped lines of a text file, without a byte order mark."""
  text = pathlib.Path(path).read_text(encoding='utf-8-sig', errors='replace')
  return [line.strip() for line in text.splitlines()]


def _is_hidden(name):
  return name.startswith('.') or name.lower() in _JUNK


class Listing(NamedTuple):
  """What lies in and below a folder, hidden files left out."""

  files: dict  # {path inside of it, with '/': File}, sorted.
  others: list  # Paths inside of it that have another ending.


def walk(folder, endings=IMAGE_ENDINGS):
  """The Listing of a folder, links to folders followed; empty if absent.

  A link to nothing is a File with a `target`, whatever its ending. DataError
  'unreadable' if a folder cannot be listed.
  """

  def refuse(error):
    if os.path.lexists(error.filename):
      what = f'cannot be listed ({error.strerror})'
      raise fault(error.filename, 'unreadable', what) from error

  found, others, chains = {}, [], {}
  for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
    real, above = os.path.realpath(top), chains.get(os.path.dirname(top), ())
    folders[:] = [x for x in folders if not _is_hidden(x)]
    if real in above:  # A link to a folder around it.
      folders.clear()
      continue
    chains[top], inner = {*above, real}, os.path.relpath(top, folder)
    for name in names:
      if _is_hidden(name):
        continue
      path = os.path.join(top, name)
      inside = name if inner == os.curdir else f'{inner}/{name}'
      sound = os.path.isfile(path)
      if not sound and os.path.islink(path):
        found[inside] = File(path, target=os.readlink(path))
      elif sound and name.lower().endswith(endings):
        found[inside] = File(path)
      else:
        others.append(inside)
  return Listing(dict(sorted(found.items())), sorted(others))


def list_zip(path, prefix, endings):
  """The Files of members whose names start with `prefix`, sorted."""
  names = sorted(_archive(str(path), os.getpid()).namelist())
  return [
    File(str(path), name)
    for name in names
    if name.startswith(prefix)
    and name.lower().endswith(endings)
    and not _is_hidden(pathlib.PurePath(name).name)
  ]
