# SPDX-License-Identifier: Apache-2.0
"""compare.json of the runs that a comparison's folder has; its fields are
described in docs/comparing.md.
"""

import json
import shlex
import statistics

from attnfd_jax import paths
from attnfd_jax.reporting import comparison_page
from attnfd_jax.runs import logs

KINDS = ('steps', 'seconds')  # In which rows can be equal to the baseline.
_SCORES = ('miou', 'pixel_accuracy', 'class_accuracy', 'fw_iou')
_SCORES += ('iou_per_class', 'accuracy_per_class')
# Of row.json; the rest of a row comes from its runs.
_FACTS = ('title', 'method', 'settings', 'num_epochs', 'num_steps', 'flags')
_FACTS += ('step_seconds', 'baseline_step_seconds', 'memory_bytes')
_FACTS += ('method_params', 'seconds_factor', 'failed')


def scores_of(result):
  """The part of a result that metrics.summarise made."""
  return {key: result[key] for key in _SCORES}


def _read(path):
  return json.loads(path.read_text()) if path.exists() else {}


def teacher_record(workdir):
  """Scores on val of a given teacher, as the first run has them; or None."""
  for path in _of_runs(workdir, 'metrics.jsonl'):
    for line in path.read_text().splitlines()[:1]:
      record = json.loads(line)
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
      result = _read(workdir / run['folder'] / 'student' / 'result.json')
      keys = ('dataset', 'protocol', 'network', 'params', 'pretrained')
      found['student'] = {key: result[key] for key in keys}
  for kind in KINDS:
    for folder in _row_folders(workdir / kind):
      row = {'equal': kind} | _row(folder, 'distill')
      row['difference'] = _differences(row, baseline)
      found['rows'].append(row)
  return found


def _row_folders(folder):
  return sorted(path.parent for path in folder.glob('*/row.json'))


def _row(folder, stage):
  """A row of its runs' results; {} where there is none."""
  facts = _read(folder / 'row.json')
  row = {key: facts[key] for key in _FACTS if key in facts}
  runs = [_run(path, stage) for path in sorted(folder.glob('seed*'), key=_seed)]
  row['runs'] = [run for run in runs if len(run) > 2]
  for split in ('val', 'test'):
    row[split] = _spread([run.get(split) for run in row['runs']])
  return row


def _seed(path):
  return int(path.name.removeprefix('seed'))


def _run(directory, stage):
  run = {
    'seed': _seed(directory),
    'folder': '/'.join(directory.parts[-3 if stage == 'distill' else -2 :]),
  }
  if result := _read(directory / stage / 'result.json'):
    run |= {
      'val': result['miou'],
      'test': result.get('test', {}).get('miou'),
      'step': result['step'],
      'train_seconds': result['train_seconds'],
      'iou_per_class': result['iou_per_class'],
    }
    if stage == 'distill':
      run['options'] = result['method']['options']
  elif failed := _read(directory / 'failed.json'):
    run['failed'] = failed['failed']
  return run


def _spread(values):
  """Mean, standard deviation (n - 1) and number of what is known, or None."""
  values = [value for value in values if value is not None]
  if not values:
    return None
  std = statistics.stdev(values) if len(values) > 1 else None
  return {'mean': statistics.mean(values), 'std': std, 'n': len(values)}


def _differences(row, baseline):
  """To the baseline with the same seed."""
  before = {run['seed']: run for run in baseline['runs']}
  found = {}
  for split in ('val', 'test'):
    pairs = [
      (run.get(split), before.get(run['seed'], {}).get(split))
      for run in row['runs']
    ]
    found[split] = _spread([a - b for a, b in pairs if None not in (a, b)])
  return found


def _teacher(workdir):
  """Name, source and scores of the teacher; {} before they are known."""
  if result := _read(workdir / 'teacher' / 'teacher' / 'result.json'):
    test = result.get('test', {}).get('miou')
    found = {'name': result['network'], 'source': 'teacher', 'test': test}
    return found | {'val': result['miou'], 'params': result['params']}
  for path in _of_runs(workdir, 'result.json'):
    teacher = _read(path)['teacher']
    found = {'name': teacher['name'], 'source': teacher['source']}
    return found | {'val': teacher['miou']}
  return {}


def _tuning(folder):
  """The candidates of --tune, with their mIoU on val."""
  found = []
  for kind in KINDS:
    for path in _row_folders(folder / kind):
      row = _row(path, 'distill')
      found += [
        {
          'method': row['method'],
          'settings': row['settings'],
          'equal': kind,
          **{key: run.get(key) for key in ('seed', 'val', 'failed')},
        }
        for run in row['runs']
      ]
  return found


def write(found, workdir):
  """compare.json, compare.md and compare.html."""
  workdir = paths.as_path(workdir)
  logs.write_json(workdir / 'compare.json', found)
  comparison_page.write(found, workdir)
