# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels of a source in one memory-mapped file, built once per host.

For images that take long to decode and do not fit into memory: a core decodes
17 Cityscapes PNGs a second, and crops 361 from 25 GB of pixels in the page
cache (config.data.cache is for sets that fit).
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil

import numpy as np

from attnfd_jax.data import frequencies
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress

_GROUP = 64  # Records that an interrupted build may have to read again.


def digest(files, *facts):
  """Hex digest that changes with name, size or time of a File, or with a fact.

  Facts are bytes that decide what is read from the files.
  """
  found = hashlib.sha256()
  stat = functools.cache(os.stat)  # Thousands of members lie in one zip.
  for file in files:
    size, time = stat(file.path).st_size, stat(file.path).st_mtime_ns
    # Names of files are bytes, and not always text.
    found.update(os.fsencode(f'{file} {size} {time}\n'))
  for fact in facts:
    found.update(hashlib.sha256(fact).digest())
  return found.hexdigest()[:32]


@functools.cache
def _map_pixels(path):
  return np.asarray(np.load(path, mmap_mode='r'))


def _starts(sizes):
  """First byte of every record, and one past the last; sizes are [n, 2]."""
  return np.concatenate([[0], np.cumsum(4 * np.prod(sizes, 1))])


class DecodedSource:
  """A source with its pixels in `folder`, as `open_decoded` left it.

  Records are read-only views: the disk is read where a crop looks at them. Each
  process maps the file itself; in a pickle the array would go by value.
  """

  def __init__(self, source, folder):
    self._path = folder / 'pixels.npy'
    self.name, self.key = source.name, source.key
    self.fingerprint = source.fingerprint
    self._sizes = np.load(folder / 'sizes.npy')
    self._starts = _starts(self._sizes)

  def __len__(self):
    return len(self._sizes)

  def __getitem__(self, index):
    h, w = self.size(index)
    start, end = self._starts[index : index + 2]
    record = _map_pixels(self._path)[start:end]
    image, label = np.split(record, [3 * h * w])
    return {'image': image.reshape(h, w, 3), 'label': label.reshape(h, w)}

  def size(self, index):
    return tuple(self._sizes[index].tolist())


def open_decoded(source, directory, *, threads=4, text='decoding'):
  """The DecodedSource of `source`, built below `directory` if it is absent.

  Its folder is named by the fingerprint of the source: pixels of other or older
  files are never used. An interrupted build is resumed; the processes of a host
  build it once. A source without files or a full disk is an InputError.
  """
  if not hasattr(source, 'fingerprint'):
    raise InputError(
      'config.data.decoded_cache is for data sets of files, and this one is '
      'drawn; leave it empty.'
    )
  folder = pathlib.Path(directory).expanduser() / source.fingerprint()
  complete = folder / 'pixels.npy'
  if not complete.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
      if not complete.exists():
        _build(source, folder, threads, text)
  return DecodedSource(source, folder)


def with_decoded(dataset, directory, *, threads=4):
  """`dataset` with the splits that every epoch reads as DecodedSources."""
  decoded = {
    name: open_decoded(
      source, directory, threads=threads, text=f'decoding {name}'
    )
    for name, source in dataset.splits.items()
    if name in ('train', 'val')  # test is read once.
  }
  return dataclasses.replace(dataset, splits=dataset.splits | decoded)


@contextlib.contextmanager
def _locked(folder):
  with open(folder / 'lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for the process that fills {folder}', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _build(source, folder, threads, text):
  # `written` has a byte for each record whose pixels are on the disk.
  partial, written = folder / 'pixels.part', folder / 'written'
  if not (partial.exists() and written.exists()):
    _begin(source, folder, threads, text)
  sizes = np.load(folder / 'sizes.npy')
  starts = _starts(sizes) + np.load(partial, mmap_mode='r').offset
  done = written.stat().st_size

  def write(index):
    record = source[index]
    if record['label'].shape != tuple(sizes[index]):
      raise InputError(
        f'{source.name(index)}: not of the size that its header tells; '
        'replace or remove it.'
      )
    data = record['image'].tobytes() + record['label'].tobytes()
    # Not through a map of the file: there, a full disk is a fatal signal.
    if os.pwrite(file.fileno(), data, starts[index]) < len(data):
      raise _full(folder, len(data))

  bar = progress(len(sizes), text, initial=done)
  with bar, partial.open('r+b') as file, written.open('ab', 0) as marks:
    for first in range(done, len(sizes), _GROUP):
      group = range(len(sizes))[first : first + _GROUP]
      for _ in frequencies.map_records(write, group, threads):
        bar.update()
      os.fsync(file)
      marks.write(bytes(len(group)))
  partial.rename(folder / 'pixels.npy')
  written.unlink()


def _begin(source, folder, threads, text):
  count = len(source)
  sizes = frequencies.map_records(source.size, range(count), threads)
  sizes = np.array([*progress(count, f'{text}: sizes', iterable=sizes)])
  np.save(folder / 'sizes.npy', sizes)
  total = int(_starts(sizes)[-1])
  if shutil.disk_usage(folder).free < total:
    raise _full(folder, total)
  # Sparse: the disk fills as records come.
  np.lib.format.open_memmap(folder / 'pixels.part', 'w+', np.uint8, (total,))
  (folder / 'written').write_bytes(b'')


def _full(folder, size):
  return InputError(
    f'{folder.parent}: no space for {size / 1e9:.1f} GB of decoded pixels; '
    'make room, or name another disk by --config.data.decoded_cache.'
  )
