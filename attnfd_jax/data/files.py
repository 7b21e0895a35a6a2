# SPDX-License-Identifier: Apache-2.0
"""Files as they lie on the disk or inside of a zip archive."""

import dataclasses
import functools
import os
import pathlib
import struct
import zipfile
import zlib

from attnfd_jax.errors import DataError

# Bytes of an unpacked member: more than any image, and not a bomb.
_LARGEST_MEMBER = 1 << 29


def fault(file, kind, what, values=None):
  """The DataError '<file>: <what>.'; see there for kind and values."""
  return DataError(f'{file}: {what}.', kind, file, values)


class _Archive:
  """Members of a zip by position: no seek, so threads and forks share it."""

  def __init__(self, path):
    try:
      with zipfile.ZipFile(path) as archive:
        self.members = {m.filename: m for m in archive.infolist()}
      # Closed by the end of the process.
      self._handle = os.open(path, os.O_RDONLY)
      self._size = os.fstat(self._handle).st_size
    except Exception as error:  # zipfile has many types for damaged headers.
      what = f'not a readable zip ({error}); copy it again'
      raise fault(path, 'unreadable', what) from error

  def read(self, member, limit=None):
    """The first `limit` bytes of a member, or all; OSError if damaged."""
    if member not in self.members:
      raise FileNotFoundError('no such member')
    info = self.members[member]
    start = info.header_offset + 30
    if start < 30 or start + info.compress_size > self._size:
      raise OSError('it lies outside of the zip; copy it again')
    if info.file_size > _LARGEST_MEMBER:
      raise OSError(f'{info.file_size} bytes, more than an image has')
    # Its own header has names of other lengths than the directory.
    header = os.pread(self._handle, 30, info.header_offset)
    start += sum(struct.unpack('<HH', header[26:]))
    size = info.compress_size if limit is None else limit
    data = os.pread(self._handle, min(size, info.compress_size), start)
    if info.compress_type == zipfile.ZIP_DEFLATED:
      most = info.file_size + 1 if limit is None else limit
      try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
      except zlib.error as error:
        raise OSError(str(error)) from error
    elif info.compress_type != zipfile.ZIP_STORED:
      raise OSError('packed by another method than deflate; unpack the zip')
    if limit is None and zlib.crc32(data) != info.CRC:
      raise OSError('checksum differs; copy the zip again')
    return data


_archive = functools.lru_cache(maxsize=None)(_Archive)


@dataclasses.dataclass(frozen=True)
class File:
  """A plain file, or a member of a zip that is read in place."""

  path: str
  member: str = ''

  def __str__(self):
    return f'{self.path}!{self.member}' if self.member else self.path

  @property
  def _name(self):
    return pathlib.PurePath(self.member or self.path)

  @property
  def name(self):
    return self._name.name

  @property
  def stem(self):
    return self._name.stem

  @property
  def suffix(self):
    return self._name.suffix

  def read(self, limit=None):
    """The first `limit` bytes, or all.

    Raises:
      DataError: 'unreadable', if it is gone, damaged or not ours to read.
    """
    try:
      if self.member:
        return _archive(self.path).read(self.member, limit)
      with open(self.path, 'rb') as file:
        return file.read(-1 if limit is None else limit)
    except OSError as error:
      what = f'cannot be read ({error.strerror or error})'
      raise fault(self, 'unreadable', what) from error


@dataclasses.dataclass(frozen=True)
class InMemory:
  """What is read as a File, but was already."""

  name: str
  data: bytes

  def __str__(self):
    return self.name

  def read(self, limit=None):
    """The first `limit` bytes, or all."""
    return self.data[:limit]


def as_file(path):
  """A path as a File; a File as it is."""
  return File(str(path)) if isinstance(path, (str, os.PathLike)) else path


def read_lines(path):
  """Lines of a text file, stripped; a mark of Windows at its start is not."""
  text = pathlib.Path(path).read_text(encoding='utf-8-sig', errors='replace')
  return [line.strip() for line in text.splitlines()]


def list_folder(folder, endings):
  """Files in `folder` with one of the endings, sorted; hidden ones are not."""
  with os.scandir(folder) as entries:
    names = sorted(e.name for e in entries if e.is_file())
  return _with_ending([File(os.path.join(folder, n)) for n in names], endings)


def list_tree(folder, endings):
  """Files in and below `folder`, {path inside of it: File}; none if absent."""
  found = {}
  for parent, folders, _ in os.walk(folder):
    folders[:] = sorted(name for name in folders if name[0] != '.')
    for file in list_folder(parent, endings):
      found[pathlib.Path(file.path).relative_to(folder).as_posix()] = file
  return found


def without_ending(found):
  """{path: File} with keys that lack their ending, as lists name files."""
  return {
    str(pathlib.PurePosixPath(path).with_suffix('')): file
    for path, file in found.items()
  }


def list_zip(path, prefix, endings):
  """Members whose names start with `prefix`, sorted."""
  names = [n for n in _archive(str(path)).members if n.startswith(prefix)]
  return _with_ending([File(str(path), n) for n in sorted(names)], endings)


def _with_ending(files, endings):
  return [
    file
    for file in files
    if file.suffix.lower() in endings and file.name[0] != '.'
  ]
