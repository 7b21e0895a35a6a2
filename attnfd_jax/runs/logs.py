# SPDX-License-Identifier: Apache-2.0
"""Writes the logs of a run: lines for people, JSON for programs."""

from collections.abc import Callable, Mapping
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
from typing import Any

import jax
import tqdm

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.progress import write
from attnfd_jax.types import AnyPath, StrPath


def write_json(path: StrPath, value: Any) -> None:
  """Replaces a JSON file atomically; only process 0 writes."""
  if processes.is_first():
    text = json.dumps(value, indent=2, sort_keys=True) + '\n'
    with paths.replacing(path) as file:
      file.write(text.encode())


def read_json(path: AnyPath) -> dict[str, Any]:
  """Reads the object in a JSON file; {} if there is no such file.

  Raises:
    InputError: if the file is damaged.
  """
  try:
    return dict(json.loads(path.read_text(encoding='utf-8')))
  except FileNotFoundError:
    return {}
  except (TypeError, ValueError) as error:
    raise InputError(f'{path}: not JSON ({error}); restore the file.') from None


def versions() -> dict[str, str]:
  """Versions of the packages that results depend on."""
  packages = ('attnfd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'grain', 'numpy')
  result = {'python': platform.python_version()}
  for package in (*packages, 'orbax-checkpoint', 'opencv-python-headless'):
    try:
      result[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      result[package] = 'unknown'
  return result


def device_name() -> str:
  """Number and kind of the devices, e.g. '1 x NVIDIA H100 80GB HBM3'."""
  kind = jax.devices()[0].device_kind
  kind = f'CPU ({os.cpu_count()} cores)' if kind == 'cpu' else kind
  return f'{jax.device_count()} x {kind}'


def environment() -> dict[str, Any]:
  """Command, devices and versions, for environment.json."""
  return {
    'command': [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
    'device': device_name(),
    'platform': platform.platform(),
    'processes': jax.process_count(),
    'versions': versions(),
  }


def duration(seconds: float) -> str:
  """Formats a duration as '1:02:03' or '02:03'."""
  return tqdm.tqdm.format_interval(round(max(seconds, 0)))


def reason(error: BaseException) -> str:
  """The system's message of an error, or its first line, shortened."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error).strip() or type(error).__name__
  # Orbax puts the number into pages of JSON.
  system = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(system[1])) if system else text.splitlines()[0][:160]


def count_text(number: int, noun: str) -> str:
  """'1 image', '2 images'."""
  return f'{number} {noun}{"s" * (number != 1)}'


def percent(fraction: float | None) -> str:
  """Formats a score as '43.55', or 'absent' if it is None or NaN."""
  if fraction is None or math.isnan(fraction):
    return 'absent'
  return f'{100 * fraction:.2f}'


class StageLog:
  """Writes log.txt and metrics.jsonl of a stage; prints the lines as well.

  Only process 0 writes.

  Attributes:
    name: of the stage.
    local: folder with the files, on this machine. Objects at gs:// cannot be
      appended to, so that `upload` has to copy them.
    on_record: called with every record of `metrics`, if it is set.
  """

  def __init__(self, directory: AnyPath):
    self._directory = self.local = directory
    self.name = directory.name
    if paths.is_remote(directory):
      self.local = pathlib.Path(tempfile.mkdtemp(prefix='attnfd_jax_'))
      for name in ('log.txt', 'metrics.jsonl', 'wandb_id.txt'):
        if (directory / name).exists():
          (self.local / name).write_bytes((directory / name).read_bytes())
    self._metrics = self.local / 'metrics.jsonl'
    self.on_record: Callable[[dict[str, Any]], None] | None = None

  def upload(self) -> None:
    """Copies the files to a remote folder; called after each checkpoint."""
    if self.local is not self._directory and processes.is_first():
      for path in self.local.iterdir():
        if path.is_file():
          (self._directory / path.name).write_bytes(path.read_bytes())

  def truncate_after(self, step: int) -> None:
    """Drops the records that a run resumed from `step` will write again."""
    if not self._metrics.exists() or not processes.is_first():
      return
    kept = []
    # At step 0 none: the score of the teacher is written again as well.
    for line in self._metrics.read_bytes().splitlines() if step else ():
      # A killed process may leave an incomplete last line.
      with contextlib.suppress(ValueError, TypeError, KeyError):
        if json.loads(line)['step'] <= step:
          kept.append(line + b'\n')
    with paths.replacing(self._metrics) as file:
      file.writelines(kept)

  def line(self, text: str, *, shown: bool = True) -> None:
    """Writes a line to log.txt and, if `shown`, to the screen."""
    if not processes.is_first():
      return
    if shown:
      write(f'[{self.name}] {text}', file=sys.stdout)
    now = datetime.datetime.now().isoformat(timespec='seconds')
    with (self.local / 'log.txt').open('a') as file:
      file.write(f'{now} {text}\n')

  def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends a record to metrics.jsonl.

    Args:
      kind: 'train', 'eval' or 'teacher'.
      step: number of updates applied so far.
      values: numbers, or dicts of numbers; None is left out.
    """
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

  def records(self) -> list[dict[str, Any]]:
    """All records of metrics.jsonl, including those from before a restart."""
    if not self._metrics.exists():
      return []
    return [json.loads(x) for x in self._metrics.read_text().splitlines()]

  def last(self, kind: str, name: str, *, default: Any = None) -> Any:
    """The last value of `name` in the records of a kind, or `default`."""
    records = self.records()
    values = [x[name] for x in records if x['kind'] == kind and name in x]
    return values[-1] if values else default

  def train_seconds(self) -> float:
    """Time of all steps, before restarts too; no compilation, no evaluation."""
    total, last = 0.0, 0
    for record in self.records():
      if record['kind'] == 'train':
        # The first record after a start has no time: it includes compilation.
        total += record.get('step_seconds', 0.0) * (record['step'] - last)
        last = record['step']
    return total


def without_nan(value: Any) -> Any:
  """Replaces NaN, which JSON lacks, by None; also in nested dicts."""
  if isinstance(value, dict):
    return {key: without_nan(item) for key, item in value.items()}
  return None if isinstance(value, float) and math.isnan(value) else value
