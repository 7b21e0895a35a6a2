# SPDX-License-Identifier: Apache-2.0
"""What a run writes for people and programs: lines, JSON, environment."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import tempfile

import jax

from attnfd_jax.devices import processes
from attnfd_jax.runs import paths


def write_json(path, value):
  """Writes atomically: the file is the old or the new one, never half.

  The first process of several does it, the others nothing.
  """
  if not processes.is_first():
    return
  text = json.dumps(value, indent=2, sort_keys=True) + '\n'
  with paths.replacing(path) as file:
    file.write(text.encode())


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


def percent(fraction):
  """'43.55', or 'absent' where there is no such score: None or NaN."""
  absent = fraction is None or math.isnan(fraction)
  return 'absent' if absent else f'{100 * fraction:.2f}'


class StageLog:
  """log.txt and metrics.jsonl of a stage; lines also go to the screen.

  Of several processes the first one writes. Objects at gs:// cannot grow: there
  the files are written here and uploaded by `upload`.

  Args:
    directory: of the stage, an epath.Path.
  """

  def __init__(self, directory):
    self._directory = self._local = directory
    if paths.is_remote(directory):
      self._local = pathlib.Path(tempfile.mkdtemp(prefix='attnfd_jax_'))
      for name in ('log.txt', 'metrics.jsonl'):
        if (directory / name).exists():
          (self._local / name).write_bytes((directory / name).read_bytes())
    self._metrics = self._local / 'metrics.jsonl'
    self._loggers = ()

  @property
  def local(self):
    """A folder of this machine: that of the stage, or the one to upload."""
    return self._local

  def upload(self):
    """Called at each save: what is written so far is in the run's folder."""
    if self._local is self._directory or not processes.is_first():
      return
    for path in filter(pathlib.Path.is_file, self._local.iterdir()):
      (self._directory / path.name).write_bytes(path.read_bytes())

  def forget_after(self, step):
    """Drops metrics that a run which resumes at `step` will write again."""
    if self._metrics.exists() and processes.is_first():
      kept = []
      text = self._metrics.read_bytes().decode(errors='replace')
      for line in text.splitlines():
        try:
          # At step 0 the teacher is scored: a fresh start does that again.
          if step and json.loads(line)['step'] <= step:
            kept.append(line)
        except (ValueError, TypeError, KeyError):
          continue  # The last line of a killed process.
      with paths.replacing(self._metrics) as file:
        file.write(''.join(f'{line}\n' for line in kept).encode())

  def line(self, text):
    """One line for people."""
    if not processes.is_first():
      return
    print(f'[{self._directory.name}] {text}', flush=True)
    now = datetime.datetime.now().isoformat(timespec='seconds')
    with (self._local / 'log.txt').open('a') as file:
      file.write(f'{now} {text}\n')

  def last(self, kind, name, *, default=None):
    """The last value that `metrics` got, also before a restart."""
    found = [x[name] for x in self.records() if x['kind'] == kind and name in x]
    return found[-1] if found else default

  def train_seconds(self):
    """Of all steps, over restarts; no compilation, no evaluation."""
    total, last = 0.0, 0
    for record in self.records():
      if record['kind'] == 'train':
        # The first step after a start has no time of its own.
        seconds = record.get('step_seconds', 0.0)
        total += seconds * (record['step'] - last)
        last = record['step']
    return total

  def attach(self, loggers):
    """`loggers` are called with every record: now the past, then the rest."""
    self._loggers = loggers
    for logger in loggers:
      for record in self.records():
        logger(record)

  def records(self):
    """All of metrics.jsonl."""
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
      if value is not None
    }
    record = without_nan(record)
    with self._metrics.open('a') as file:
      file.write(json.dumps(record) + '\n')
    for logger in self._loggers:
      logger(record)


def without_nan(value):
  """NaN is not JSON: null."""
  if isinstance(value, dict):
    return {key: without_nan(item) for key, item in value.items()}
  return None if isinstance(value, float) and math.isnan(value) else value
