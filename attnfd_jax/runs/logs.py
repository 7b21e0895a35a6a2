# SPDX-License-Identifier: Apache-2.0
"""What a run writes for people and programs: lines, JSON, environment."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys
import tempfile

import jax
import tqdm

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError


def write_json(path, value):
  """Writes a file, the old or the new one and never half, in process 0."""
  if processes.is_first():
    text = json.dumps(value, indent=2, sort_keys=True) + '\n'
    with paths.replacing(path) as file:
      file.write(text.encode())


def read_json(path):
  """The object in a file, {} without a file; InputError if it is damaged."""
  try:
    return dict(json.loads(path.read_text(encoding='utf-8')))
  except FileNotFoundError:
    return {}
  except (TypeError, ValueError) as error:
    raise InputError(f'{path}: not JSON ({error}); restore the file.') from None


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
  kind = jax.devices()[0].device_kind
  kind = f'CPU ({os.cpu_count()} cores)' if kind == 'cpu' else kind
  return f'{jax.device_count()} x {kind}'


def environment():
  return {
    'command': [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
    'device': device_name(),
    'platform': platform.platform(),
    'processes': jax.process_count(),
    'versions': versions(),
  }


def duration(seconds):
  """'1:02:03' or '02:03'."""
  return tqdm.tqdm.format_interval(round(max(seconds, 0)))


def reason(error):
  """What the system said, or the first line: messages can be pages of JSON."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error).strip() or type(error).__name__
  system = re.search(r"os_error_code='(\d+)'", text)  # Of Orbax.
  return os.strerror(int(system[1])) if system else text.splitlines()[0][:160]


def percent(fraction):
  """'43.55', or 'absent' where there is no such score: None or NaN."""
  absent = fraction is None or math.isnan(fraction)
  return 'absent' if absent else f'{100 * fraction:.2f}'


class StageLog:
  """log.txt and metrics.jsonl of a stage; lines also go to the screen.

  Of several processes the first one writes. Objects at gs:// cannot grow: their
  files are written in `local`, a folder of this machine, until `upload`.
  `on_record` is called with every record of `metrics`.
  """

  def __init__(self, directory):
    self._directory = self.local = directory
    if paths.is_remote(directory):
      self.local = pathlib.Path(tempfile.mkdtemp(prefix='attnfd_jax_'))
      for name in ('log.txt', 'metrics.jsonl', 'wandb_id.txt'):
        if (directory / name).exists():
          (self.local / name).write_bytes((directory / name).read_bytes())
    self._metrics = self.local / 'metrics.jsonl'
    self.on_record = None

  def upload(self):
    """Called at each save: what is written so far is in the run's folder."""
    if self.local is not self._directory and processes.is_first():
      for path in filter(pathlib.Path.is_file, self.local.iterdir()):
        (self._directory / path.name).write_bytes(path.read_bytes())

  def forget_after(self, step):
    """Drops metrics that a run which resumes at `step` will write again."""
    if not self._metrics.exists() or not processes.is_first():
      return
    kept = []
    # At step 0 the teacher is scored: a fresh start does that again.
    for line in self._metrics.read_bytes().splitlines() if step else ():
      # The last one of a killed process may be anything.
      with contextlib.suppress(ValueError, TypeError, KeyError):
        if json.loads(line)['step'] <= step:
          kept.append(line + b'\n')
    with paths.replacing(self._metrics) as file:
      file.writelines(kept)

  def line(self, text, *, shown=True):
    """One line for people; not `shown`, in the file alone."""
    if not processes.is_first():
      return
    if shown:
      print(f'[{self._directory.name}] {text}', flush=True)
    now = datetime.datetime.now().isoformat(timespec='seconds')
    with (self.local / 'log.txt').open('a') as file:
      file.write(f'{now} {text}\n')

  def metrics(self, kind, step, values):
    """One JSON object for programs."""
    if not processes.is_first():
      return
    record = {
      key: value if isinstance(value, dict) else float(value)
      for key, value in values.items()
      if value is not None
    }
    record = {'kind': kind, 'step': int(step)} | without_nan(record)
    with self._metrics.open('a') as file:
      file.write(json.dumps(record) + '\n')
    if self.on_record:
      self.on_record(record)

  def records(self):
    """All that `metrics` got, also before a restart."""
    if not self._metrics.exists():
      return []
    return [json.loads(x) for x in self._metrics.read_text().splitlines()]

  def last(self, kind, name, *, default=None):
    """The last value of a name in the records of a kind."""
    found = [x[name] for x in self.records() if x['kind'] == kind and name in x]
    return found[-1] if found else default

  def train_seconds(self):
    """Of all steps, over restarts; no compilation, no evaluation."""
    total, last = 0.0, 0
    for record in self.records():
      if record['kind'] == 'train':
        # The first step after a start has no time of its own.
        total += record.get('step_seconds', 0.0) * (record['step'] - last)
        last = record['step']
    return total


def without_nan(value):
  """NaN is not JSON: null."""
  if isinstance(value, dict):
    return {key: without_nan(item) for key, item in value.items()}
  return None if isinstance(value, float) and math.isnan(value) else value
