# SPDX-License-Identifier: Apache-2.0
"""Images a second of the training pipeline.

Nothing goes to a device: this is what the host delivers, to be compared with
what `benchmark train` consumes.
"""

import multiprocessing
import os
import pathlib
import re
import statistics
import threading
import time

from attnfd_jax.config import num_cores, resolve
from attnfd_jax.data import cache, pipeline
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError, within
from attnfd_jax.runs import logs


def _of_workers(name):
  """Texts of a file in /proc of each running worker process."""
  workers = multiprocessing.active_children()
  return [pathlib.Path(f'/proc/{x.pid}/{name}').read_text() for x in workers]


def _cpu_seconds():
  """Of this process and its workers, up to now."""
  total = time.process_time()
  for text in _of_workers('stat'):
    # The fields 14 and 15 of the line; the second one, a name, has spaces.
    user, system = text.rpartition(')')[2].split()[11:13]
    total += (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
  return total


def _peak_memory():
  """Bytes of this process and its workers at their highest."""
  # Not getrusage's, which begins with that of the process it was forked from.
  own = pathlib.Path('/proc/self/status').read_text()
  text = '\n'.join([own, *_of_workers('status')])
  return 1024 * sum(map(int, re.findall(r'^VmHWM:\s*(\d+)', text, re.M)))


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
  """Prints a line for each round; returns what `--json` prints."""
  if options.config is None:
    raise InputError('--config is missing, as in --config=configs/camvid.py.')
  within('--rounds', options.rounds, 1)
  within('--seconds', options.seconds, 1e-9)
  config = resolve(options.config)
  dataset = load_dataset(config.data)
  for note in dataset.notes:
    print(note)
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
