# SPDX-License-Identifier: Apache-2.0
"""Images a second of the training pipeline.

Nothing goes to a device: this is what the host delivers, to be compared with
what `benchmark train` consumes.
"""

import multiprocessing
import os
import pathlib
import statistics
import threading
import time

from attnfd_jax.config import num_cores, resolve
from attnfd_jax.data import cache, pipeline
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError
from attnfd_jax.runs import logs


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


def measure(batches, config, *, seconds):
  """Speed of the batches of a resolved config, over at least `seconds`."""
  # Before the clock starts, and the least that it counts: more batches than
  # can be under way at once.
  first = 2 * config.data.threads * max(config.data.workers, 1)
  others, count = threading.enumerate(), 0
  iterator = iter(batches)
  for _ in range(first):
    next(iterator)
  wall, cpu = time.perf_counter(), _cpu_seconds()
  while count < first or time.perf_counter() - wall < seconds:
    next(iterator)
    count += 1
  wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
  images = count * config.batch_size
  speed = {
    'images_per_second': images / wall,
    'cpu_seconds_per_image': cpu / images,
    'peak_memory_bytes': _peak_memory(),
  }
  iterator.close()
  for thread in threading.enumerate():  # They finish their last batches.
    # An iterator that somebody else left open would never finish.
    if thread.name.startswith('grain') and thread not in others:
      thread.join()
  return speed


def describe(config, dataset):
  """What a number depends on."""
  return {
    'dataset': dataset.name,
    'images': len(dataset.splits['train']),
    'batch_size': config.batch_size,
    'crop_size': list(config.data.crop_size),
    'threads': config.data.threads,
    'workers': config.data.workers,
    'cores': num_cores(),
    'device': logs.device_name(),
    'versions': logs.versions(),
  }


def run(options):
  """Prints a line for each round; returns what `--json` prints.

  Args:
    options: flags config, rounds and seconds.
  """
  if options.config is None:
    raise InputError('--config is missing, as in --config=configs/camvid.py.')
  if options.rounds < 1 or not options.seconds > 0:
    raise InputError(
      f'--rounds={options.rounds} and --seconds={options.seconds:g} must be '
      'positive.'
    )
  config = resolve(options.config)
  dataset = load_dataset(config.data)
  if folder := config.data.decoded_cache:
    dataset = cache.with_decoded(dataset, folder, threads=config.data.threads)
  facts = describe(config, dataset) | {'rounds': options.rounds}
  shown = (f'{k} {v}' for k, v in facts.items() if k != 'versions')
  print(', '.join(shown), flush=True)
  batches, rounds = pipeline.configured_batches(config, dataset), []
  for i in range(options.rounds):
    rounds.append(measure(batches, config, seconds=options.seconds))
    rate, cpu, memory = rounds[-1].values()
    text = f'{rate:.1f} images/s, {1e3 * cpu:.2f} CPU ms an image'
    print(f'round {i + 1}: {text}', flush=True)
  medians = {k: statistics.median(x[k] for x in rounds) for k in rounds[0]}
  medians['peak_memory_bytes'] = memory
  print('median: ' + ', '.join(f'{k} {v:.4g}' for k, v in medians.items()))
  return medians | facts
