# SPDX-License-Identifier: Apache-2.0
"""What a run writes for people and programs: lines, JSON, environment."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import jax

from attnfd_jax.devices import processes


def write_json(path, value):
  """Writes atomically: the file is the old or the new one, never half.

  The first process of several does it, the others nothing.
  """
  if not processes.is_first():
    return
  text = json.dumps(value, indent=2, sort_keys=True) + '\n'
  with replacing(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def replacing(path):
  """A file, open for bytes, that takes the place of `path` when it is whole."""
  path = pathlib.Path(path)
  # One name: what a killed process leaves is overwritten by the next one.
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())  # The name must not be there before the bytes.
  temporary.replace(path)


def versions():
  """Versions of what a number depends on."""
  packages = ('attnfd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'grain', 'numpy')
  found = {'python': platform.python_version()}
  for package in (*packages, 'orbax-checkpoint', 'opencv-python-headless'):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'unknown'
  return found


def device_name():
  """Kind and number of the devices, e.g. '1 x NVIDIA H100 80GB HBM3'."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if kind == 'cpu':
    kind = f'CPU ({os.cpu_count()} cores)'
  return f'{len(devices)} x {kind}'


def environment():
  return {
    'command': [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
    'device': device_name(),
    'platform': platform.platform(),
    'processes': jax.process_count(),
    'versions': versions(),
  }


def duration(seconds):
  """'1:02:03' or '2:03'."""
  text = str(datetime.timedelta(seconds=round(max(seconds, 0))))
  return text.removeprefix('0:')


class StageLog:
  """log.txt and metrics.jsonl of a stage; lines also go to the screen.

  Of several processes the first one writes.
  """

  def __init__(self, directory):
    self._directory = pathlib.Path(directory)
    self._stage = self._directory.name
    self._metrics = self._directory / 'metrics.jsonl'
    self._loggers = ()

  def forget_after(self, step):
    """Drops metrics that a run which goes on at `step` will write again."""
    if self._metrics.exists() and processes.is_first():
      kept = []
      text = self._metrics.read_text(errors='replace')
      for line in text.splitlines():
        try:
          # At step 0 the teacher is scored: a fresh start does that again.
          if step and json.loads(line)['step'] <= step:
            kept.append(line)
        except (ValueError, TypeError, KeyError):
          continue  # The last line of a killed process.
      with replacing(self._metrics) as file:
        file.write(''.join(f'{line}\n' for line in kept).encode())

  def line(self, text):
    """One line for people."""
    if not processes.is_first():
      return
    print(f'[{self._stage}] {text}', flush=True)
    now = datetime.datetime.now().isoformat(timespec='seconds')
    with (self._directory / 'log.txt').open('a') as file:
      file.write(f'{now} {text}\n')

  def last(self, kind, name, *, default=None):
    """The last value that `metrics` got, also before a restart."""
    found = [x[name] for x in self._records() if x['kind'] == kind]
    return found[-1] if found else default

  def tell(self, loggers):
    """`loggers` are called with every record: now the past, then the rest."""
    self._loggers = loggers
    for logger in loggers:
      for record in self._records():
        logger(record)

  def _records(self):
    if not self._metrics.exists():
      return []
    return [json.loads(x) for x in self._metrics.read_text().splitlines()]

  def metrics(self, kind, step, values):
    """One JSON object for programs."""
    if not processes.is_first():
      return
    record = {'kind': kind, 'step': int(step)}
    record |= {
      key: value if isinstance(value, dict) else float(value)
      for key, value in values.items()
    }
    with self._metrics.open('a') as file:
      file.write(json.dumps(record) + '\n')
    for logger in self._loggers:
      logger(record)
