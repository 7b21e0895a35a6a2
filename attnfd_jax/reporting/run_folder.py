# SPDX-License-Identifier: Apache-2.0
"""What the report reads of a run's folder."""

import io
import json
import math
import re
import shlex
from typing import NamedTuple
import zipfile

import numpy as np

from attnfd_jax import paths
from attnfd_jax.errors import InputError

STAGES = ('teacher', 'student', 'distill')
# Every other number of a train line is the loss or one of its terms.
_NOT_LOSS = {'step', 'learning_rate', 'grad_norm', 'data_wait'}
_NOT_LOSS |= {'step_seconds', 'images_per_second'}


class Run(NamedTuple):
  """What the files of one run folder say; whatever is missing is empty."""

  path: str
  config: dict
  results: dict  # stage -> result, in the order of STAGES
  curves: dict  # stage -> kind -> name -> [2, n] of steps and values
  pictures: dict  # stage -> name -> array; scenes are those of the last stage
  class_names: list  # In the order of the palette.
  command: str
  missing: list  # Stages and files that a finished run would have.

  @property
  def method(self):
    """How the result calls it, or the config, before there is a result."""
    method = self.results.get('distill', {}).get('method') or {}
    configured = self.config.get('distill', {}).get('method', 'distillation')
    return method.get('title') or method.get('name') or configured

  @property
  def teacher(self):
    """Its name, mIoU and source, of the distilled student's result; or {}."""
    return self.results.get('distill', {}).get('teacher') or {}

  def network(self, stage):
    """'resnet18 x0.25' -> 'ResNet-18 ×0.25'."""
    role = 'teacher' if stage == 'teacher' else 'student'
    name = self.results.get(stage, {}).get('network')
    if not name and role == 'teacher':
      name = self.teacher.get('name')  # One from elsewhere has no stage.
    name = name or self.config.get(role, {}).get('backbone', role)
    return re.sub(r' x(?=\d)', ' ×', re.sub(r'\bresnet(?=\d)', 'ResNet-', name))

  @property
  def mious(self):
    """stage -> [2, n] of steps and mIoU during training."""
    evals = {s: kinds.get('eval', {}) for s, kinds in self.curves.items()}
    return {s: named['miou'] for s, named in evals.items() if 'miou' in named}

  @property
  def ious(self):
    """stage -> {class: fraction, None where it is absent}."""
    tables = {s: r.get('iou_per_class') for s, r in self.results.items()}
    tables = {s: table for s, table in tables.items() if table}
    names = self.class_names or next(iter(tables.values()), ())
    return {s: {n: t.get(n) for n in names} for s, t in tables.items()}

  def shown_values(self, num_scenes):
    """The classes, and perhaps 255, of the first labels and predictions."""
    maps = [
      arrays[name][:num_scenes]
      for arrays in self.pictures.values()
      for name in ('label', 'prediction')
    ]
    return np.unique(maps).tolist()

  def maps(self, role):
    """name -> [n, h, w]: what the method compares, of teacher or student."""
    start = f'map_{role}_'
    arrays = self.pictures.get('distill', {})
    names = [key.removeprefix(start) for key in arrays if key.startswith(start)]
    return {name: arrays[start + name] for name in names}


def read_run(workdir):
  """The Run in a folder; only its results.json is required.

  Raises:
    InputError: if that is absent, or a JSON file is damaged.
  """
  folder = paths.as_path(workdir)
  found = _read_json(folder / 'results.json')
  if found is None:
    again = 'give the --workdir of a run that finished a stage'
    raise InputError(f'{workdir}: no results.json there; {again}.')
  config = _read_json(folder / 'config.json') or {}
  results = {stage: found[stage] for stage in STAGES if stage in found}
  curves, pictures, class_names, command = {}, {}, [], []
  for stage in results:
    curves[stage] = _read_curves(folder / stage / 'metrics.jsonl')
    pictures[stage] = _read_pictures(folder / stage / 'pictures.npz')
    # JSON objects of results are sorted by name: their order says nothing.
    own = _read_json(folder / stage / 'config.json') or {}
    class_names = own.get('class_names') or class_names
    environment = _read_json(folder / stage / 'environment.json') or {}
    command = environment.get('command') or command
  missing = [s for s in config.get('stages', []) if s not in results]
  missing += [f'{s}/metrics.jsonl' for s in results if not curves[s]]
  missing += [f'{s}/pictures.npz' for s in results if not pictures[s]]
  drawn = {stage: arrays for stage, arrays in pictures.items() if arrays}
  pictures = {
    stage: arrays
    for stage, arrays in drawn.items()
    if np.array_equal(arrays['label'], [*drawn.values()][-1]['label'])
  }
  command = re.sub('^main.py', 'python -m attnfd_jax.main', shlex.join(command))
  files = (config, results, curves, pictures, class_names, command)
  return Run(str(workdir), *files, missing)


def _read_json(path):
  """The object in the file, None without a file."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise InputError(f'{path}: not JSON ({error}); restore the file.') from None


def _read_curves(path):
  """See Run.curves; a later line replaces its step."""
  curves = {}
  lines = path.read_text(encoding='utf-8') if path.is_file() else ''
  for line in lines.splitlines():
    try:
      record = json.loads(line)
    except ValueError:
      continue  # The line that was being written when the run was killed.
    series = curves.setdefault(record['kind'], {})
    for name in sorted(record.keys() - _NOT_LOSS):
      if isinstance(record[name], float) and math.isfinite(record[name]):
        series.setdefault(name, {})[record['step']] = record[name]
  return {
    kind: {name: np.array(sorted(x.items())).T for name, x in series.items()}
    for kind, series in curves.items()
  }


def _read_pictures(path):
  try:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return {}
