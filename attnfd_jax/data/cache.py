# SPDX-License-Identifier: Apache-2.0
"""Keeps the decoded pixels of a source in a memory-mapped file on disk.

For images that are slow to decode and do not fit into memory: one core decodes
17 Cityscapes PNGs per second, but cuts 361 crops per second from 25 GB of
decoded pixels in the page cache. For data sets that fit into memory there is
config.data.cache.
"""

from collections.abc import Iterable
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from attnfd_jax.data import files, frequencies
from attnfd_jax.data.records import Record, Size, Source
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress
from attnfd_jax.types import StrPath

_HEADER = 128  # Bytes of an .npy file before its array.


def digest(files: Iterable[files.File], fact: bytes = b'') -> str:
  """Hex digest of names, sizes and times of files, and of a further `fact`."""
  sha256 = hashlib.sha256()
  stat = functools.cache(os.stat)  # A zip may hold thousands of the files.
  for file in files:
    size, time = stat(file.path).st_size, stat(file.path).st_mtime_ns
    # Names of files are bytes, and not always text.
    sha256.update(os.fsencode(f'{file} {size} {time}\n'))
  sha256.update(hashlib.sha256(fact).digest())
  return sha256.hexdigest()[:32]


# Not an attribute of the source, whose pickle would contain all pixels.
@functools.cache
def _map_pixels(path: pathlib.Path) -> np.ndarray:
  return np.asarray(np.load(path, mmap_mode='r'))


def _starts(sizes: np.ndarray) -> np.ndarray:
  """Offsets of the records in bytes, and the end of the last one.

  Args:
    sizes: (height, width) of each record, [n, 2].
  """
  return np.concatenate([[0], np.cumsum(4 * np.prod(sizes, 1))])


class DecodedSource:
  """A source that reads decoded pixels from the folder of `open_decoded`.

  Records are read-only views of the mapped file: only the pixels that are used
  are read from disk.
  """

  # Any: a Source that has a fingerprint.
  def __init__(self, source: Any, folder: pathlib.Path):
    self._path = folder / 'pixels.npy'
    self.name, self.key = source.name, source.key
    self.fingerprint = source.fingerprint
    self._sizes = np.load(folder / 'sizes.npy')
    self._starts = _starts(self._sizes)

  def __len__(self) -> int:
    return len(self._sizes)

  def __getitem__(self, index: int) -> Record:
    h, w = self.size(index)
    start, end = self._starts[index : index + 2]
    record = _map_pixels(self._path)[start:end]
    image, label = np.split(record, [3 * h * w])
    return {'image': image.reshape(h, w, 3), 'label': label.reshape(h, w)}

  def size(self, index: int) -> Size:
    """Size of a record."""
    return tuple(self._sizes[index].tolist())


def open_decoded(
  source: Source,
  directory: StrPath,
  *,
  threads: int = 4,
  text: str = 'decoding',
) -> DecodedSource:
  """Opens the decoded pixels of a source; decodes them first if necessary.

  They are in a folder that is named by the fingerprint of the source, so pixels
  of other or older files are never used. An interrupted build is resumed. The
  processes of a host build it once: the others wait.

  Args:
    source: a source of files.
    directory: where that folder is.
    threads: number of threads that decode.
    text: what the progress bar says.

  Raises:
    InputError: if the source is not made of files, or the disk is full.
  """
  fingerprint = getattr(source, 'fingerprint', None)
  if fingerprint is None:
    what = 'config.data.decoded_cache works only for data sets of files'
    raise InputError(f'{what}, not for drawn ones; leave it empty.')
  folder = pathlib.Path(directory).expanduser() / fingerprint()
  complete = folder / 'pixels.npy'
  if not complete.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        print(f'waiting for the process that fills {folder}', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
      if not complete.exists():
        _build(source, folder, threads, text)
  return DecodedSource(source, folder)


# Any: a pairs.Dataset; pairs imports this module.
def with_decoded(dataset: Any, directory: StrPath, *, threads: int = 4) -> Any:
  """Replaces the splits of a data set, except 'test', by DecodedSources."""
  splits = dict(dataset.splits)
  for name in [x for x in splits if x != 'test']:  # It is read only once.
    options = {'threads': threads, 'text': f'decoding {name}'}
    splits[name] = open_decoded(splits[name], directory, **options)
  return dataclasses.replace(dataset, splits=splits)


def _build(
  source: Source, folder: pathlib.Path, threads: int, text: str
) -> None:
  """Writes sizes.npy and pixels.npy, or what is missing of the latter."""
  partial, count = folder / 'pixels.npy.part', len(source)
  # Records are appended in order: the length of the file tells which are there.
  with partial.open('ab', 0) as file:
    if file.tell() < _HEADER:
      file.truncate(0)
      sizes = frequencies.map_records(source.size, range(count), threads)
      sizes = np.array([*progress(count, f'{text}: sizes', iterable=sizes)])
      np.save(folder / 'sizes.npy', sizes)
      total = int(_starts(sizes)[-1])
      if shutil.disk_usage(folder).free < total:
        raise _disk_full(folder, total)
      header = {'descr': '|u1', 'fortran_order': False, 'shape': (total,)}
      np.lib.format.write_array_header_1_0(file, header)
    sizes = np.load(folder / 'sizes.npy')
    starts = _HEADER + _starts(sizes)
    done = int(np.searchsorted(starts, file.tell(), 'right')) - 1
    file.truncate(starts[done])

    def read(index: int) -> bytes:
      record = source[index]
      if record['label'].shape != tuple(sizes[index]):
        what = 'size differs from the one in its header; replace or remove it'
        raise InputError(f'{source.name(index)}: {what}.')
      return record['image'].tobytes() + record['label'].tobytes()

    records = frequencies.map_records(read, range(done, count), threads)
    for data in progress(count, text, initial=done, iterable=records):
      if file.write(data) < len(data):
        raise _disk_full(folder, len(data))
    os.fsync(file)
  partial.rename(folder / 'pixels.npy')


def _disk_full(folder: pathlib.Path, size: int) -> InputError:
  what = f'no space for {size / 1e9:.1f} GB of decoded pixels; make room'
  remedy = 'or name another disk by --config.data.decoded_cache'
  return InputError(f'{folder.parent}: {what}, {remedy}.')
