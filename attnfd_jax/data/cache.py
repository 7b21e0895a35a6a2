# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels of a source in one memory-mapped file, built once per host.

For images that take long to decode and do not fit into memory: a core decodes
17 Cityscapes PNGs a second, and crops 361 from 25 GB of pixels in the page
cache (config.data.cache is for sets that fit).
"""

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

_HEADER = 128  # Bytes of an .npy file before its array.


def digest(files, fact=b''):
  """Hex digest that changes with name, size or time of a File, and the fact."""
  found = hashlib.sha256()
  stat = functools.cache(os.stat)  # Thousands of members lie in one zip.
  for file in files:
    size, time = stat(file.path).st_size, stat(file.path).st_mtime_ns
    # Names of files are bytes, and not always text.
    found.update(os.fsencode(f'{file} {size} {time}\n'))
  found.update(hashlib.sha256(fact).digest())
  return found.hexdigest()[:32]


@functools.cache  # Not in the source: in a pickle the array goes by value.
def _map_pixels(path):
  return np.asarray(np.load(path, mmap_mode='r'))


def _starts(sizes):
  """First byte of every record, and one past the last; sizes are [n, 2]."""
  return np.concatenate([[0], np.cumsum(4 * np.prod(sizes, 1))])


class DecodedSource:
  """A source with its pixels in `folder`, as `open_decoded` left it.

  Records are read-only views: the disk is read where a crop looks at them.
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
    what = 'config.data.decoded_cache is for data sets of files'
    raise InputError(f'{what}, and this one is drawn; leave it empty.')
  folder = pathlib.Path(directory).expanduser() / source.fingerprint()
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


def with_decoded(dataset, directory, *, threads=4):
  """`dataset` with the splits that every epoch reads as DecodedSources."""
  splits = dict(dataset.splits)
  for name in [x for x in splits if x != 'test']:  # It is read once.
    options = {'threads': threads, 'text': f'decoding {name}'}
    splits[name] = open_decoded(splits[name], directory, **options)
  return dataclasses.replace(dataset, splits=splits)


def _build(source, folder, threads, text):
  partial, count = folder / 'pixels.npy.part', len(source)
  # Records are appended in order: its length tells what was done before.
  with partial.open('ab', 0) as file:
    if file.tell() < _HEADER:
      file.truncate(0)
      sizes = frequencies.map_records(source.size, range(count), threads)
      sizes = np.array([*progress(count, f'{text}: sizes', iterable=sizes)])
      np.save(folder / 'sizes.npy', sizes)
      total = int(_starts(sizes)[-1])
      if shutil.disk_usage(folder).free < total:
        raise _full(folder, total)
      header = {'descr': '|u1', 'fortran_order': False, 'shape': (total,)}
      np.lib.format.write_array_header_1_0(file, header)
    sizes = np.load(folder / 'sizes.npy')
    starts = _HEADER + _starts(sizes)
    done = int(np.searchsorted(starts, file.tell(), 'right')) - 1
    file.truncate(starts[done])

    def read(index):
      record = source[index]
      if record['label'].shape != tuple(sizes[index]):
        what = 'not of the size that its header tells; replace or remove it'
        raise InputError(f'{source.name(index)}: {what}.')
      return record['image'].tobytes() + record['label'].tobytes()

    records = frequencies.map_records(read, range(done, count), threads)
    for data in progress(count, text, initial=done, iterable=records):
      if file.write(data) < len(data):
        raise _full(folder, len(data))
    os.fsync(file)
  partial.rename(folder / 'pixels.npy')


def _full(folder, size):
  what = f'no space for {size / 1e9:.1f} GB of decoded pixels; make room'
  remedy = 'or name another disk by --config.data.decoded_cache'
  return InputError(f'{folder.parent}: {what}, {remedy}.')
