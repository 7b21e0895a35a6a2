# SPDX-License-Identifier: Apache-2.0
"""Measures the training pipeline in images per second.

Nothing is copied to a device: compare the throughput of the host with what
`benchmark train` consumes.
"""

from collections.abc import Iterable
import multiprocessing
import os
import pathlib
import re
import statistics
import threading
import time
from typing import Any

from attnfd_jax.config import num_cores, resolve
from attnfd_jax.data import cache, pipeline
from attnfd_jax.data.sources import Dataset, load_dataset
from attnfd_jax.errors import check_range, InputError
from attnfd_jax.runs import logs
from attnfd_jax.types import Config


def _of_workers(name: str) -> list[str]:
  """Reads a file in /proc of each running worker process."""
  workers = multiprocessing.active_children()
  return [pathlib.Path(f'/proc/{x.pid}/{name}').read_text() for x in workers]


def _cpu_seconds() -> float:
  """Returns the CPU time used so far by this process and its workers."""
  total = time.process_time()
  for text in _of_workers('stat'):
    # Fields 14 and 15 of the line; field 2, a name, may contain spaces.
    user, system = text.rpartition(')')[2].split()[11:13]
    total += (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
  return total


def peak_memory() -> int:
  """Returns the sum of the peak memory of this process and its workers."""
  # getrusage would start from the peak of the process that forked this one.
  own = pathlib.Path('/proc/self/status').read_text()
  text = '\n'.join([own, *_of_workers('status')])
  return 1024 * sum(map(int, re.findall(r'^VmHWM:\s*(\d+)', text, re.M)))


def measure(
  batches: Iterable[Any], config: Config, *, seconds: float
) -> dict[str, Any]:
  """Measures the throughput of a pipeline.

  Args:
    batches: batches of the pipeline; their iterator has a method `close`.
    config: resolved config of these batches.
    seconds: minimum duration.

  Returns:
    {'images_per_second', 'cpu_seconds_per_image', 'peak_memory_bytes'}.
  """
  # Number of warm-up batches and minimum number of timed ones: more than can be
  # in flight at once.
  num_warmup = 2 * config.data.threads * max(config.data.workers, 1)
  others, count = threading.enumerate(), 0
  iterator: Any = iter(batches)
  for _ in range(num_warmup):
    next(iterator)
  wall, cpu = time.perf_counter(), _cpu_seconds()
  while count < num_warmup or time.perf_counter() - wall < seconds:
    next(iterator)
    count += 1
  wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
  images = count * config.batch_size
  speed = {
    'images_per_second': images / wall,
    'cpu_seconds_per_image': cpu / images,
    'peak_memory_bytes': peak_memory(),
  }
  iterator.close()
  # Wait for threads that finish their last batches, but not for those of other
  # iterators that are still open.
  for thread in threading.enumerate():
    if thread.name.startswith('grain') and thread not in others:
      thread.join()
  return speed


def describe(config: Config, dataset: Dataset) -> dict[str, Any]:
  """Returns the facts on which the throughput depends."""
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


def run(options: Any) -> dict[str, Any]:
  """Runs the benchmark and prints a line for each round.

  Args:
    options: flags of the command.

  Returns:
    The object that `--json` prints.

  Raises:
    InputError: if a flag is missing or out of range.
  """
  if options.config is None:
    raise InputError('--config is missing, as in --config=configs/camvid.py.')
  check_range('--rounds', options.rounds, 1)
  check_range('--seconds', options.seconds, 1e-9)
  config: Config = resolve(options.config)
  dataset = load_dataset(config.data)
  for note in dataset.notes:
    print(note)
  if folder := config.data.decoded_cache:
    dataset = cache.with_decoded(dataset, folder, threads=config.data.threads)
  facts = describe(config, dataset) | {'rounds': options.rounds}
  shown = (f'{k} {v}' for k, v in facts.items() if k != 'versions')
  print(', '.join(shown), flush=True)
  batches = pipeline.configured_batches(config, dataset)
  rounds: list[dict[str, Any]] = []
  for i in range(options.rounds):
    rounds.append(measure(batches, config, seconds=options.seconds))
    rate, cpu, _ = rounds[-1].values()
    text = f'{rate:.1f} images/s, {1e3 * cpu:.2f} CPU ms per image'
    print(f'round {i + 1}: {text}', flush=True)
  medians = {k: statistics.median(x[k] for x in rounds) for k in rounds[0]}
  medians['peak_memory_bytes'] = rounds[-1]['peak_memory_bytes']
  print('median: ' + ', '.join(f'{k} {v:.4g}' for k, v in medians.items()))
  return medians | facts
