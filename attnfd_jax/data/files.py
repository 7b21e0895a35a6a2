# SPDX-License-Identifier: Apache-2.0
"""Files as they lie on the disk or inside of a zip archive."""

import dataclasses
import functools
import importlib
import os
import pathlib
import zipfile

from attnfd_jax.errors import DataError, first_line, InputError

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

  def __str__(self):
    return f'{self.path}!{self.member}' if self.member else self.path

  @property
  def inner(self):
    """Its path, in the zip if it lies in one."""
    return pathlib.PurePath(self.member or self.path)

  def read(self, limit=None):
    """The first `limit` bytes, or all; raises DataError 'unreadable'."""
    if self.data is not None:
      return self.data[:limit]
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


def _with_ending(names, endings):
  """Sorted names that have one of the endings and are not hidden."""
  names = (name for name in sorted(names) if name.lower().endswith(endings))
  return [name for name in names if pathlib.PurePath(name).name[0] != '.']


def list_folder(folder, endings):
  """Files in `folder`, see `_with_ending`."""
  with os.scandir(folder) as entries:
    names = _with_ending([e.name for e in entries if e.is_file()], endings)
  return [File(os.path.join(folder, name)) for name in names]


def list_tree(folder, endings):
  """Files in and below `folder`, {path inside of it: File}; none if absent."""
  tree = {}
  for parent, folders, _ in os.walk(folder):
    folders[:] = sorted(name for name in folders if name[0] != '.')
    for file in list_folder(parent, endings):
      tree[pathlib.Path(file.path).relative_to(folder).as_posix()] = file
  return tree


def list_zip(path, prefix, endings):
  """Members whose names start with `prefix`, see `_with_ending`."""
  names = _archive(str(path), os.getpid()).namelist()
  names = [name for name in names if name.startswith(prefix)]
  return [File(str(path), name) for name in _with_ending(names, endings)]
