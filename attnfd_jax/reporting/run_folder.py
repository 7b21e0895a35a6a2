# SPDX-License-Identifier: Apache-2.0
"""What the report reads of a run's folder."""

import io
import json
import math
import re
import shlex
import zipfile

import numpy as np

from attnfd_jax import paths
from attnfd_jax.errors import InputError
from attnfd_jax.reporting.figures import ROLES
from attnfd_jax.runs import logs

# Every other number of a train line is the loss or one of its terms.
_NOT_LOSS = {'step', 'learning_rate', 'grad_norm', 'data_wait'}
_NOT_LOSS |= {'step_seconds', 'images_per_second'}
_NOT_LOSS |= {'cosine', 'task_norm', 'distill_norm'}


class Run:
  """What the files of one run folder say; whatever is missing is empty.

  InputError if there is no results.json, or a JSON file is damaged.
  """

  def __init__(self, path):
    folder, self.path = paths.as_path(path), str(path)
    if not (folder / 'results.json').is_file():
      problem = f'{path}: no results.json there; give the --workdir of a run'
      raise InputError(f'{problem} that finished a stage.')
    found = logs.read_json(folder / 'results.json')
    self.config = logs.read_json(folder / 'config.json')
    # stage -> result, stage -> kind -> name -> [2, n] of steps and values, and
    # stage -> name -> array.
    self.results = {stage: found[stage] for stage in ROLES if stage in found}
    self.difference = ''  # From the other runs of a page, which knows them.
    self.curves, pictures, self.class_names, command = {}, {}, [], []
    for stage in self.results:
      self.curves[stage] = read_curves(folder / stage / 'metrics.jsonl')
      pictures[stage] = read_pictures(folder / stage / 'pictures.npz')
      # JSON objects of results are sorted by name: their order says nothing.
      own = logs.read_json(folder / stage / 'config.json')
      self.class_names = own.get('class_names') or self.class_names
      environment = logs.read_json(folder / stage / 'environment.json')
      command = environment.get('command') or command
    command = shlex.join(command)
    verb = r'^(main|compare)\.py'  # As environment.json has it.
    self.command = re.sub(verb, r'python -m attnfd_jax.\1', command)
    stages = self.config.get('stages', [])
    self.missing = [s for s in stages if s not in self.results]
    files = {'metrics.jsonl': self.curves, 'pictures.npz': pictures}
    for name, read in files.items():
      self.missing += [f'{s}/{name}' for s in self.results if not read[s]]
    drawn = {stage: arrays for stage, arrays in pictures.items() if arrays}
    self.pictures = {
      stage: arrays
      for stage, arrays in drawn.items()
      if np.array_equal(arrays['label'], [*drawn.values()][-1]['label'])
    }

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
    found = {s: r.get('iou_per_class') for s, r in self.results.items()}
    tables = {s: table for s, table in found.items() if table}
    names = self.class_names or next(iter(tables.values()), ())
    return {s: {n: t.get(n) for n in names} for s, t in tables.items()}

  def shown_values(self, num_scenes):
    """The classes, and perhaps 255, of the first labels and predictions."""
    drawn = [(x['label'], x['prediction']) for x in self.pictures.values()]
    return np.unique(np.array(drawn)[:, :, :num_scenes]).tolist()

  def maps(self, role):
    """name -> [n, h, w]: what the method compares, of teacher or student."""
    start, arrays = f'map_{role}_', self.pictures.get('distill', {})
    names = [key.removeprefix(start) for key in arrays if key.startswith(start)]
    return {name: arrays[start + name] for name in names}


def read_curves(path):
  """kind -> name -> [2, n] of steps and values in a metrics.jsonl; a later line
  replaces its step.
  """
  curves = {}
  text = path.read_text(encoding='utf-8') if path.is_file() else ''
  for line in text.splitlines():
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


def read_pictures(path):
  """The arrays of a stage's pictures.npz; {} if there is none, or damaged."""
  try:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return {}
