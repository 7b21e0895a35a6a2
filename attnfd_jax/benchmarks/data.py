# SPDX-License-Identifier: Apache-2.0
"""Images a second of the training pipeline, and of the authors' recipe in PIL.

Nothing goes to a device: this is what the host delivers, to be compared with
what `benchmark train` consumes.
"""

import collections
import io
import multiprocessing
import os
import pathlib
import statistics
import threading
import time

import grain
import numpy as np
import PIL
from PIL import Image
from PIL import ImageFilter
from PIL import ImageOps

from attnfd_jax.config import num_cores
from attnfd_jax.config import resolve
from attnfd_jax.data import cache
from attnfd_jax.data import masks
from attnfd_jax.data import pipeline
from attnfd_jax.data import transforms
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError
from attnfd_jax.models import deeplab
from attnfd_jax.runs import logs


class _PilSource:
  """Records as PIL images, decoded by PIL."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if hasattr(self._source, 'image_bytes'):
      data = io.BytesIO(self._source.image_bytes(index))
      image = Image.open(data).convert('RGB')
      label = self._label(index)
    else:  # Drawn: there is nothing to decode.
      record = self._source[index]
      image, label = Image.fromarray(record['image']), record['label']
    return {'image': image, 'label': Image.fromarray(label)}

  def _label(self, index):
    read = getattr(self._source, 'read_label', None)
    if not isinstance(read, masks.IndexLabels):
      return self._source.label(index)
    file = self._source.mask(index)
    ids = np.asarray(Image.open(io.BytesIO(file.read())))
    return read.from_ids(file, ids)


class _PilAugment(grain.transforms.RandomMap):
  """The recipe in the authors' order, of whole images and with floats.

  custom_transforms.py:50-123: flip, resize, pad, crop, blur, normalise.
  """

  def __init__(self, augment):
    self._options = augment

  def random_map(self, record, rng):
    options = self._options
    image, label = record['image'], record['label']
    if rng.random() < options.flip:
      image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    low, high = (int(x * options.base_size) for x in options.scale_range)
    short = int(rng.integers(low, high + 1))
    size = transforms.fit_short_side(image.size, short)
    image = image.resize(size, Image.Resampling.BILINEAR)
    label = label.resize(size, Image.Resampling.NEAREST)
    crop = options.crop_size[::-1]
    border = [max(c - n, 0) for c, n in zip(crop, size, strict=True)]
    if any(border):
      image = ImageOps.expand(image, (0, 0, *border), 0)
      label = ImageOps.expand(label, (0, 0, *border), options.label_fill)
    left, top = (
      int(rng.integers(n - c + 1))
      for n, c in zip(image.size, crop, strict=True)
    )
    box = (left, top, left + crop[0], top + crop[1])
    image, label = image.crop(box), label.crop(box)
    if rng.random() < options.blur:
      image = image.filter(ImageFilter.GaussianBlur(rng.random()))
    image = np.array(image).astype(np.float32) / np.float32(255)
    image -= np.array(deeplab.IMAGE_MEAN, np.float32)
    image /= np.array(deeplab.IMAGE_STD, np.float32)
    return {'image': image, 'label': np.array(label)}


def _workers():
  """Folders of /proc of the running worker processes."""
  return [
    pathlib.Path('/proc', str(process.pid))
    for process in multiprocessing.active_children()
  ]


def _cpu_seconds():
  """Of this process and its workers, up to now."""
  total = time.process_time()
  for folder in _workers():
    # The fields 14 and 15 of the line; the second one, a name, has spaces.
    fields = (folder / 'stat').read_text().rpartition(')')[2].split()
    total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  return total


def _peak_memory():
  """Bytes of this process and its workers at their highest."""
  total = 0
  # Not getrusage's, which begins with that of the process it was forked from.
  for folder in (pathlib.Path('/proc/self'), *_workers()):
    lines = (folder / 'status').read_text().splitlines()
    total += sum(int(x.split()[1]) for x in lines if x.startswith('VmHWM'))
  return 1024 * total


def _measure(batches, *, batch_size, first, seconds):
  """Images a second, CPU seconds an image, and the peak of memory in bytes.

  Args:
    batches: a grain.IterDataset.
    batch_size: images in each.
    first: batches before the clock starts, and the least that it counts; more
      than can be under way at once.
    seconds: at least.
  """
  others = threading.enumerate()
  iterator = iter(batches)
  for _ in range(first):
    next(iterator)
  wall, cpu, count = time.perf_counter(), _cpu_seconds(), 0
  while count < first or time.perf_counter() - wall < seconds:
    next(iterator)
    count += 1
  wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
  memory = _peak_memory()
  iterator.close()
  for thread in threading.enumerate():  # They finish their last batches.
    # An iterator that somebody else left open would never finish.
    if thread.name.startswith('grain') and thread not in others:
      thread.join()
  return count * batch_size / wall, cpu / (count * batch_size), memory


def _load(options):
  """Resolved config and data set of the flags."""
  if options.config is None:
    raise InputError('--config is missing, as in --config=configs/camvid.py.')
  if options.rounds < 1 or not options.seconds > 0:
    raise InputError(
      f'--rounds={options.rounds} and --seconds={options.seconds:g} must be '
      'positive.'
    )
  config = options.config.copy_and_resolve_references()
  data = config.data
  if options.compare:
    # What the authors' recipe does not have.
    data.photometric = data.rotation = data.balanced = 0.0
    data.cache, data.decoded_cache = False, ''
  config = resolve(config)
  dataset = load_dataset(data)
  if data.decoded_cache:
    dataset = cache.with_decoded(
      dataset, data.decoded_cache, threads=data.threads
    )
  return config, dataset


def run(options):
  """Prints a line for each round; returns what `--json` prints.

  Args:
    options: flags config, compare, rounds and seconds.

  Raises:
    InputError: whenever the user can mend it.
  """
  config, dataset = _load(options)
  data, source = config.data, dataset.splits['train']
  facts = {
    'dataset': dataset.name,
    'images': len(source),
    'batch_size': config.batch_size,
    'crop_size': list(data.crop_size),
    'threads': data.threads,
    'workers': data.workers,
    'cores': num_cores(),
    'rounds': options.rounds,
  }
  print(', '.join(f'{key} {value}' for key, value in facts.items()), flush=True)
  ours = pipeline.configured_batches(config, dataset)
  theirs = pipeline.train_batches(
    _PilSource(source),
    _PilAugment(pipeline.make_augment(config)),
    batch_size=config.batch_size,
    seed=config.seed,
    threads=data.threads,
    workers=data.workers,
  )
  limits = {
    'batch_size': config.batch_size,
    'first': 2 * data.threads * max(data.workers, 1),
    'seconds': options.seconds,
  }
  found = collections.defaultdict(list)
  for i in range(options.rounds):
    rate, cpu, memory = _measure(ours, **limits)
    found['images_per_second'].append(rate)
    found['cpu_seconds_per_image'].append(cpu)
    if not i or not options.compare:  # A peak is never forgotten.
      facts['peak_memory_bytes'] = memory
    line = (
      f'round {i + 1}: {rate:.1f} images/s, {1e3 * cpu:.2f} CPU ms an image'
    )
    if options.compare:
      pil_rate, pil_cpu, _ = _measure(theirs, **limits)
      found['pil_images_per_second'].append(pil_rate)
      found['pil_cpu_seconds_per_image'].append(pil_cpu)
      found['ratio'].append(rate / pil_rate)
      found['cpu_ratio'].append(pil_cpu / cpu)
      line += (
        f'; PIL and NumPy {pil_rate:.1f}, {1e3 * pil_cpu:.2f}; ratio '
        f'{rate / pil_rate:.2f}, of CPU {pil_cpu / cpu:.2f}'
      )
    print(line, flush=True)
  medians = {key: statistics.median(values) for key, values in found.items()}
  print('median: ' + ', '.join(f'{k} {v:.4g}' for k, v in medians.items()))
  return (
    medians
    | facts
    | {
      'compared': options.compare,
      'device': logs.device_name(),
      'versions': logs.versions() | {'pillow': PIL.__version__},
    }
  )
