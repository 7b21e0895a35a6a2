# SPDX-License-Identifier: Apache-2.0
"""Collects the runs of a comparison into compare.json.

Its fields are described in docs/comparing.md.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import shlex
import statistics
from typing import Any

from etils import epath
import numpy as np

from attnfd_jax import paths
from attnfd_jax.reporting import comparison_page
from attnfd_jax.reporting.run_folder import read_curves
from attnfd_jax.runs import logs
from attnfd_jax.types import StrPath

KINDS = tuple(comparison_page.TITLES)
_SCORES = ('miou', 'pixel_accuracy', 'class_accuracy', 'fw_iou')
_SCORES += ('iou_per_class', 'accuracy_per_class')
# Fields copied from row.json; the other fields of a row come from its runs.
_FACTS = ('name', 'title', 'method', 'settings', 'num_epochs', 'num_steps')
_FACTS += ('flags', 'memory_bytes', 'method_params', 'seconds_factor', 'failed')
_MEASURED = ('step_seconds', 'baseline_step_seconds', 'data_seconds', 'device')


def scores_of(result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the part of a result that comes from metrics.summarize."""
  return {key: result[key] for key in _SCORES}


def teacher_record(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns a given teacher's scores on val from any run; None without one."""
  for path in _of_runs(workdir, 'metrics.jsonl'):
    first = path.read_text().partition('\n')
    if not first[1]:  # Another command is still writing the line.
      continue
    record = json.loads(first[0])
    if record['kind'] == 'teacher':
      return {k: v for k, v in record.items() if k not in ('kind', 'step')}
  return None


def _of_runs(workdir: epath.Path, name: str) -> Iterator[epath.Path]:
  """Yields the files with this name of all distilled students."""
  for rows in ('*/*', 'tuning/*/*'):
    yield from sorted(workdir.glob(f'{rows}/seed*/distill/{name}'))


def collect(workdir: StrPath, *, command: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the content of compare.json for all runs in the folder.

  Args:
    workdir: folder of the comparison.
    command: command line of `main` with the same config.
  """
  workdir = paths.as_path(workdir)
  baseline = _row(workdir / 'student', 'student')
  comparison: dict[str, Any] = {
    'command': shlex.join(command),
    'device': logs.device_name(),
    'versions': logs.versions(),
    'teacher': _teacher(workdir),
    'baseline': baseline,
    'rows': [],
    'tuning': _tuning(workdir / 'tuning'),
  }
  for run in baseline.get('runs', ()):
    if 'val' in run:
      result = logs.read_json(
        workdir / run['folder'] / 'student' / 'result.json'
      )
      keys = ('dataset', 'protocol', 'network', 'params', 'pretrained')
      comparison['student'] = {key: result[key] for key in keys}
  for kind in KINDS:
    for folder in _row_folders(workdir / kind):
      comparison['rows'].append({'equal': kind} | _row(folder, 'distill'))
  set_statistics(comparison)
  return comparison


def set_statistics(comparison: dict[str, Any]) -> None:
  """Computes the statistics of the rows: spreads, differences and seconds.

  Args:
    comparison: content of a compare.json, changed in place; its runs may have
      been merged from several.
  """
  baseline = comparison['baseline']
  for row in (baseline, *comparison['rows']):
    for split in ('val', 'test'):
      row[split] = _spread([run.get(split) for run in row['runs']])
    if row is not baseline:
      row['difference'] = _differences(row, baseline)
    _set_seconds(row, baseline)


def _row_folders(folder: epath.Path) -> list[epath.Path]:
  return sorted(path.parent for path in folder.glob('*/row.json'))


def _row(folder: epath.Path, stage: str) -> dict[str, Any]:
  """Returns a row with its runs, before the statistics."""
  facts = logs.read_json(folder / 'row.json')
  row = {key: facts[key] for key in _FACTS if key in facts}
  if 'step_seconds' in facts:
    row['measured'] = {key: facts[key] for key in _MEASURED}
  folders = [x for x in folder.glob('seed*') if x.name[4:].isdigit()]
  runs = [_run(path, stage) for path in sorted(folders, key=_seed)]
  # Without runs that have neither finished nor failed.
  row['runs'] = [run for run in runs if len(run) > 2]
  return row


def _set_seconds(row: dict[str, Any], baseline: Mapping[str, Any]) -> None:
  """Sets comparable times, whatever the load when the row was measured.

  They are the baseline's times the row's ratio to it, which was measured in
  alternation.
  """
  if 'measured' in row and 'measured' in baseline:
    measured = row['measured']
    ratio = measured['step_seconds'] / measured['baseline_step_seconds']
    row['step_seconds'] = baseline['measured']['step_seconds'] * ratio
    row['seconds'] = row['num_steps'] * row['step_seconds']


def _seed(path: epath.Path) -> int:
  return int(path.name.removeprefix('seed'))


def _run(directory: epath.Path, stage: str) -> dict[str, Any]:
  """Returns a run; with only two fields if it is not finished."""
  run: dict[str, Any] = {
    'seed': _seed(directory),
    'folder': '/'.join(directory.parts[-3 if stage == 'distill' else -2 :]),
  }
  if result := logs.read_json(directory / stage / 'result.json'):
    run |= {
      'val': result['miou'],
      'test': result.get('test', {}).get('miou'),
      'step': result['step'],
      'train_seconds': result['train_seconds'],
      'iou_per_class': result['iou_per_class'],
      'curve': _curve(directory / stage / 'metrics.jsonl'),
    }
    if stage == 'distill':
      run['options'] = result['method']['options']
  elif failure := logs.read_json(directory / 'failed.json'):
    run['failed'] = failure['failed']
  return run


def _curve(path: epath.Path) -> list[list[int | float]]:
  """Returns [step, mIoU on val] of each evaluation."""
  curve = read_curves(path).get('eval', {}).get('miou', np.zeros((2, 0)))
  return [[int(step), float(value)] for step, value in curve.T]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
  """Returns mean, standard deviation (n - 1) and number of values, or None.

  Values that are None do not count.
  """
  values = [value for value in values if value is not None]
  if not values:
    return None
  std = statistics.stdev(values) if len(values) > 1 else None
  return {'mean': statistics.mean(values), 'std': std, 'n': len(values)}


def _differences(
  row: Mapping[str, Any], baseline: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns spreads of the differences to the baseline with the same seed.

  For the IoU of each class, only the mean.
  """
  before = {run['seed']: run for run in baseline['runs'] if 'val' in run}
  pairs = [
    (run, before[run['seed']])
    for run in row['runs']
    if 'val' in run and run['seed'] in before
  ]

  def spread(value_of):
    values = [tuple(map(value_of, pair)) for pair in pairs]
    return _spread([a - b for a, b in values if None not in (a, b)])

  differences: dict[str, Any] = {
    split: spread(lambda x, k=split: x[k]) for split in ('val', 'test')
  }
  names = pairs[0][0]['iou_per_class'] if pairs else ()
  of_classes = {
    name: spread(lambda x, k=name: x['iou_per_class'][k]) for name in names
  }
  differences['iou_per_class'] = {
    name: value and value['mean'] for name, value in of_classes.items()
  }
  return differences


def _teacher(workdir: epath.Path) -> dict[str, Any]:
  """Returns name, source and scores of the teacher; {} if not evaluated yet."""
  if result := logs.read_json(workdir / 'teacher' / 'teacher' / 'result.json'):
    test = result.get('test', {}).get('miou')
    facts = {'name': result['network'], 'source': 'teacher', 'test': test}
    return facts | {'val': result['miou'], 'params': result['params']}
  for path in _of_runs(workdir, 'result.json'):
    teacher = logs.read_json(path)['teacher']
    facts = {'name': teacher['name'], 'source': teacher['source']}
    return facts | {'val': teacher['miou']}
  return {}


def _tuning(folder: epath.Path) -> list[dict[str, Any]]:
  """Returns the candidates of --tune with their mIoU on val."""
  candidates = []
  for kind in KINDS:
    choices = [
      logs.read_json(path) for path in (folder / kind).glob('*-seed*.json')
    ]
    chosen = {choice['chosen'] for choice in choices}
    for path in _row_folders(folder / kind):
      row = _row(path, 'distill')
      entry = {key: row[key] for key in ('method', 'settings', 'title')}
      entry |= {'equal': kind, 'chosen': row['name'] in chosen}
      for run in row['runs'] or [{'failed': row.get('failed')}]:
        values = {key: run.get(key) for key in ('seed', 'val', 'failed')}
        candidates.append(entry | values)
  return candidates


def write(comparison: Mapping[str, Any], workdir: StrPath) -> None:
  """Writes compare.json, compare.md and compare.html."""
  workdir = paths.as_path(workdir)
  logs.write_json(workdir / 'compare.json', comparison)
  comparison_page.write(comparison, workdir)
