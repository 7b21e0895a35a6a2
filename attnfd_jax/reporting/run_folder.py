# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a run folder for the report."""

from collections.abc import Sequence
import io
import json
import math
import re
import shlex
from typing import Any
import zipfile

from etils import epath
import numpy as np

from attnfd_jax import paths
from attnfd_jax.errors import InputError
from attnfd_jax.reporting.figures import ROLES
from attnfd_jax.runs import logs
from attnfd_jax.types import StrPath

# All other numbers in a record of training are the loss and its terms.
_NOT_LOSS = {'step', 'learning_rate', 'grad_norm', 'data_wait'}
_NOT_LOSS |= {'step_seconds', 'images_per_second'}
_NOT_LOSS |= {'cosine', 'task_norm', 'distill_norm'}


class Run:
  """The content of a run folder; attributes of missing files are empty.

  Attributes:
    path: the folder.
    config: its config.json.
    results: stage -> result.
    curves: stage -> kind of record -> name -> steps and values [2, n].
    pictures: stage -> name -> array, for the stages with the same images.
    class_names: names in the order of the class ids.
    command: the command that started the run.
    missing: names of missing stages and files.
    difference: settings that differ from other runs on the page, as text.

  Raises:
    InputError: if there is no results.json, or a JSON file is damaged.
  """

  def __init__(self, path: StrPath):
    folder, self.path = paths.as_path(path), str(path)
    if not (folder / 'results.json').is_file():
      problem = f'{path}: no results.json there; give the --workdir of a run'
      raise InputError(f'{problem} that has finished a stage.')
    results = logs.read_json(folder / 'results.json')
    self.config: dict[str, Any] = logs.read_json(folder / 'config.json')
    self.results: dict[str, dict[str, Any]] = {
      stage: results[stage] for stage in ROLES if stage in results
    }
    self.difference = ''
    self.curves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    self.class_names: Sequence[str] = []
    pictures, command = {}, []
    for stage in self.results:
      self.curves[stage] = read_curves(folder / stage / 'metrics.jsonl')
      pictures[stage] = read_pictures(folder / stage / 'pictures.npz')
      # The classes in results.json are sorted by name, not by id.
      own = logs.read_json(folder / stage / 'config.json')
      self.class_names = own.get('class_names') or self.class_names
      environment = logs.read_json(folder / stage / 'environment.json')
      command = environment.get('command') or command
    command = shlex.join(command)
    verb = r'^(main|compare)\.py'  # The form in environment.json.
    self.command = re.sub(verb, r'python -m attnfd_jax.\1', command)
    stages = self.config.get('stages', [])
    self.missing = [s for s in stages if s not in self.results]
    files = {'metrics.jsonl': self.curves, 'pictures.npz': pictures}
    for name, by_stage in files.items():
      self.missing += [f'{s}/{name}' for s in self.results if not by_stage[s]]
    drawn = {stage: arrays for stage, arrays in pictures.items() if arrays}
    self.pictures: dict[str, dict[str, np.ndarray]] = {
      stage: arrays
      for stage, arrays in drawn.items()
      if np.array_equal(arrays['label'], [*drawn.values()][-1]['label'])
    }

  @property
  def method(self) -> str:
    """Name of the method, from the result or else from the config."""
    method = self.results.get('distill', {}).get('method') or {}
    configured = self.config.get('distill', {}).get('method', 'distillation')
    return method.get('title') or method.get('name') or configured

  @property
  def teacher(self) -> dict[str, Any]:
    """Name, mIoU and source of the teacher of the distilled student, or {}."""
    return self.results.get('distill', {}).get('teacher') or {}

  def network(self, stage: str) -> str:
    """Name of a stage's network for people, such as 'ResNet-18 ×0.25'."""
    role = 'teacher' if stage == 'teacher' else 'student'
    name = self.results.get(stage, {}).get('network')
    if not name and role == 'teacher':
      name = self.teacher.get('name')  # A given teacher has no stage.
    name = name or self.config.get(role, {}).get('backbone', role)
    return re.sub(r' x(?=\d)', ' ×', re.sub(r'\bresnet(?=\d)', 'ResNet-', name))

  @property
  def mious(self) -> dict[str, np.ndarray]:
    """Steps and mIoU during training [2, n] of each stage."""
    evals = {s: kinds.get('eval', {}) for s, kinds in self.curves.items()}
    return {s: named['miou'] for s, named in evals.items() if 'miou' in named}

  @property
  def ious(self) -> dict[str, dict[str, float | None]]:
    """IoU of each class for each stage; None for a class that is absent."""
    tables = {s: r.get('iou_per_class') for s, r in self.results.items()}
    tables = {s: table for s, table in tables.items() if table}
    names = self.class_names or next(iter(tables.values()), ())
    return {s: {n: t.get(n) for n in names} for s, t in tables.items()}

  def shown_values(self, num_scenes: int) -> list[int]:
    """Class ids in the first labels and predictions; 255 is not labeled."""
    drawn = [(x['label'], x['prediction']) for x in self.pictures.values()]
    return np.unique(np.array(drawn)[:, :, :num_scenes]).tolist()

  def maps(self, role: str) -> dict[str, np.ndarray]:
    """Maps [n, h, w] of the teacher or student that the method compares."""
    start, arrays = f'map_{role}_', self.pictures.get('distill', {})
    names = [key.removeprefix(start) for key in arrays if key.startswith(start)]
    return {name: arrays[start + name] for name in names}


def read_curves(path: epath.Path) -> dict[str, dict[str, np.ndarray]]:
  """Reads a metrics.jsonl.

  Returns:
    Kind of record -> name -> steps and values [2, n]. Of several records of one
    step the last one counts.
  """
  curves: dict[str, dict[str, dict[int, float]]] = {}
  text = path.read_text(encoding='utf-8') if path.is_file() else ''
  for line in text.splitlines():
    try:
      record = json.loads(line)
    except ValueError:
      continue  # A line that was cut off when the run was killed.
    series = curves.setdefault(record['kind'], {})
    for name in sorted(record.keys() - _NOT_LOSS):
      if isinstance(record[name], float) and math.isfinite(record[name]):
        series.setdefault(name, {})[record['step']] = record[name]
  return {
    kind: {name: np.array(sorted(x.items())).T for name, x in series.items()}
    for kind, series in curves.items()
  }


def read_pictures(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a pictures.npz; {} if it is missing or damaged."""
  try:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return {}
