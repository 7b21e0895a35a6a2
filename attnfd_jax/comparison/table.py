# SPDX-License-Identifier: Apache-2.0
"""compare.json of the runs that a comparison's folder has; its fields are
described in docs/comparing.md.
"""

import json
import shlex
import statistics

import numpy as np

from attnfd_jax import paths
from attnfd_jax.reporting import comparison_page
from attnfd_jax.reporting.run_folder import read_curves
from attnfd_jax.runs import logs

KINDS = tuple(comparison_page.TITLES)
_SCORES = ('miou', 'pixel_accuracy', 'class_accuracy', 'fw_iou')
_SCORES += ('iou_per_class', 'accuracy_per_class')
# Of row.json; the rest of a row comes from its runs.
_FACTS = ('name', 'title', 'method', 'settings', 'num_epochs', 'num_steps')
_FACTS += ('flags', 'memory_bytes', 'method_params', 'seconds_factor', 'failed')
_MEASURED = ('step_seconds', 'baseline_step_seconds', 'data_seconds', 'device')


def scores_of(result):
  """The part of a result that metrics.summarise made."""
  return {key: result[key] for key in _SCORES}


def teacher_record(workdir):
  """Scores on val of a given teacher, as the first run has them; or None."""
  for path in _of_runs(workdir, 'metrics.jsonl'):
    first = path.read_text().partition('\n')
    if not first[1]:  # Another command is writing it.
      continue
    record = json.loads(first[0])
    if record['kind'] == 'teacher':
      return {k: v for k, v in record.items() if k not in ('kind', 'step')}
  return None


def _of_runs(workdir, name):
  """The files of a name of all distilled students."""
  for rows in ('*/*', 'tuning/*/*'):
    yield from sorted(workdir.glob(f'{rows}/seed*/distill/{name}'))


def collect(workdir, *, command=()):
  """What compare.json holds, of all rows and seeds that are there."""
  workdir = paths.as_path(workdir)
  baseline = _row(workdir / 'student', 'student')
  found = {
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
      found['student'] = {key: result[key] for key in keys}
  for kind in KINDS:
    for folder in _row_folders(workdir / kind):
      found['rows'].append({'equal': kind} | _row(folder, 'distill'))
  set_statistics(found)
  return found


def set_statistics(found):
  """Sets what follows from the runs of the rows: spreads, differences, seconds.

  `found` is a compare.json, perhaps with runs of several.
  """
  baseline = found['baseline']
  for row in (baseline, *found['rows']):
    for split in ('val', 'test'):
      row[split] = _spread([run.get(split) for run in row['runs']])
    if row is not baseline:
      row['difference'] = _differences(row, baseline)
    _set_seconds(row, baseline)


def _row_folders(folder):
  return sorted(path.parent for path in folder.glob('*/row.json'))


def _row(folder, stage):
  """A row of its runs' results; {} where there is none."""
  facts = logs.read_json(folder / 'row.json')
  row = {key: facts[key] for key in _FACTS if key in facts}
  if 'step_seconds' in facts:
    row['measured'] = {key: facts[key] for key in _MEASURED}
  folders = [x for x in folder.glob('seed*') if x.name[4:].isdigit()]
  runs = [_run(path, stage) for path in sorted(folders, key=_seed)]
  row['runs'] = [run for run in runs if len(run) > 2]
  return row


def _set_seconds(row, baseline):
  """Seconds that can be compared: those of the baseline times the ratio that
  was measured in turn, whatever the machine did at that time.
  """
  if 'measured' in row and 'measured' in baseline:
    measured = row['measured']
    ratio = measured['step_seconds'] / measured['baseline_step_seconds']
    row['step_seconds'] = baseline['measured']['step_seconds'] * ratio
    row['seconds'] = row['num_steps'] * row['step_seconds']


def _seed(path):
  return int(path.name.removeprefix('seed'))


def _run(directory, stage):
  run = {
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
  elif failed := logs.read_json(directory / 'failed.json'):
    run['failed'] = failed['failed']
  return run


def _curve(path):
  """[step, mIoU on val] of each evaluation."""
  found = read_curves(path).get('eval', {}).get('miou', np.zeros((2, 0)))
  return [[int(step), float(value)] for step, value in found.T]


def _spread(values):
  """Mean, standard deviation (n - 1) and number of what is known, or None."""
  values = [value for value in values if value is not None]
  if not values:
    return None
  std = statistics.stdev(values) if len(values) > 1 else None
  return {'mean': statistics.mean(values), 'std': std, 'n': len(values)}


def _differences(row, baseline):
  """To the baseline with the same seed: spreads; of each class the mean."""
  before = {run['seed']: run for run in baseline['runs'] if 'val' in run}
  pairs = [
    (run, before[run['seed']])
    for run in row['runs']
    if 'val' in run and run['seed'] in before
  ]

  def spread(value_of):
    values = [tuple(map(value_of, pair)) for pair in pairs]
    return _spread([a - b for a, b in values if None not in (a, b)])

  found = {split: spread(lambda x, k=split: x[k]) for split in ('val', 'test')}
  names = pairs[0][0]['iou_per_class'] if pairs else ()
  of_classes = {
    name: spread(lambda x, k=name: x['iou_per_class'][k]) for name in names
  }
  found['iou_per_class'] = {
    name: value and value['mean'] for name, value in of_classes.items()
  }
  return found


def _teacher(workdir):
  """Name, source and scores of the teacher; {} before they are known."""
  if result := logs.read_json(workdir / 'teacher' / 'teacher' / 'result.json'):
    test = result.get('test', {}).get('miou')
    found = {'name': result['network'], 'source': 'teacher', 'test': test}
    return found | {'val': result['miou'], 'params': result['params']}
  for path in _of_runs(workdir, 'result.json'):
    teacher = logs.read_json(path)['teacher']
    found = {'name': teacher['name'], 'source': teacher['source']}
    return found | {'val': teacher['miou']}
  return {}


def _tuning(folder):
  """The candidates of --tune, with their mIoU on val."""
  found = []
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
        found.append(entry | values)
  return found


def write(found, workdir):
  """compare.json, compare.md and compare.html."""
  workdir = paths.as_path(workdir)
  logs.write_json(workdir / 'compare.json', found)
  comparison_page.write(found, workdir)
