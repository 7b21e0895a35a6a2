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


_archive = functools.cache(_Archive)


@dataclasses.dataclass(frozen=True)
class File:
  """A plain file, a member of a zip, read in place, or what was read before."""

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
    """The first `limit` bytes, or all.

    Raises:
      DataError: 'unreadable', if it is gone, damaged or not ours to read.
    """
    if self.data is not None:
      return self.data[:limit]
    try:
      if self.member:
        return _archive(self.path).read(self.member, limit)
      with open(self.path, 'rb') as file:
        return file.read(limit)
    except OSError as error:
      what = f'cannot be read ({error.strerror or error})'
      raise fault(self, 'unreadable', what) from error


def as_file(path):
  """A path as a File; a File as it is."""
  return File(str(path)) if isinstance(path, (str, os.PathLike)) else path


def read_lines(path):
  """Lines of a text file, stripped; a mark of Windows at its start is not."""
  text = pathlib.Path(path).read_text(encoding='utf-8-sig', errors='replace')
  return [line.strip() for line in text.splitlines()]


def _chosen(names, endings):
  """Names of files with one of the endings, sorted; hidden ones are not."""
  paths = [(name, pathlib.PurePath(name)) for name in sorted(names)]
  return [
    name
    for name, path in paths
    if path.suffix.lower() in endings and path.name[0] != '.'
  ]


def list_folder(folder, endings):
  """Files in `folder` with one of the endings, sorted; hidden ones are not."""
  with os.scandir(folder) as entries:
    names = _chosen([e.name for e in entries if e.is_file()], endings)
  return [File(os.path.join(folder, name)) for name in names]


def list_tree(folder, endings):
  """Files in and below `folder`, {path inside of it: File}; none if absent."""
  found = {}
  for parent, folders, _ in os.walk(folder):
    folders[:] = sorted(name for name in folders if name[0] != '.')
    for file in list_folder(parent, endings):
      found[pathlib.Path(file.path).relative_to(folder).as_posix()] = file
  return found


def list_zip(path, prefix, endings):
  """Members whose names start with `prefix`, as of `list_folder`."""
  names = [n for n in _archive(str(path)).members if n.startswith(prefix)]
  return [File(str(path), name) for name in _chosen(names, endings)]
