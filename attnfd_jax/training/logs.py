# SPDX-License-Identifier: Apache-2.0
"""What a run writes for people and programs: lines, JSON, environment."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import jax


def write_json(path, value):
  """Writes atomically: the file is the old or the new one, never half."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')
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

  Lines of metrics after `step` are dropped: a resumed run writes them again.
  """

  def __init__(self, directory, *, step=0):
    self._directory = pathlib.Path(directory)
    self._stage = self._directory.name
    self._metrics = self._directory / 'metrics.jsonl'
    self._start = time.monotonic()
    if self._metrics.exists():
      kept = []
      for line in self._metrics.read_text().splitlines():
        try:
          if json.loads(line)['step'] <= step:
            kept.append(line)
        except json.JSONDecodeError:
          continue  # The last line of a killed process.
      temporary = self._metrics.with_suffix('.tmp')
      temporary.write_text(''.join(f'{line}\n' for line in kept))
      temporary.replace(self._metrics)

  def line(self, text):
    """One line for people."""
    print(f'[{self._stage}] {text}', flush=True)
    now = datetime.datetime.now().isoformat(timespec='seconds')
    with (self._directory / 'log.txt').open('a') as file:
      file.write(f'{now} {text}\n')

  def last(self, kind, name, *, default=None):
    """The last value that `metrics` got, also before a restart."""
    lines = []
    if self._metrics.exists():
      lines = self._metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = [x[name] for x in records if x['kind'] == kind]
    return found[-1] if found else default

  def metrics(self, kind, step, values):
    """One JSON object for programs."""
    record = {'kind': kind, 'step': int(step)}
    record |= {
      key: value if isinstance(value, dict) else float(value)
      for key, value in values.items()
    }
    with self._metrics.open('a') as file:
      file.write(json.dumps(record) + '\n')
