# SPDX-License-Identifier: Apache-2.0
r"""One page that compares finished runs and opens offline.

  python -m attnfd_jax.report runs/a [runs/b ...] --output=report.html

Reads the files of the run folders and nothing else. Runs that differ only in
their seed are also summarised as mean and standard deviation.
"""

import json
import os
import pathlib
import re
import shlex
from typing import NamedTuple
import zipfile

from absl import flags
import numpy as np

from attnfd_jax.config import leaves
from attnfd_jax.errors import InputError
from attnfd_jax.reporting import page as page
from attnfd_jax.reporting.figures import signed

STAGES = tuple(page.NAMES)
# Every other number of a train line is the loss or one of its terms.
_NOT_LOSS = (
  *('step', 'learning_rate', 'grad_norm'),
  *('step_seconds', 'images_per_second', 'data_wait'),
)


class Run(NamedTuple):
  """What the files of one run folder say; whatever is missing is empty."""

  path: str
  config: dict
  results: dict  # stage -> result with a number under 'miou'
  curves: dict  # stage -> kind -> name -> (steps, values)
  pictures: dict  # stage -> name -> array
  classes: list  # Names in the order of the palette.
  command: str
  missing: list  # Stages and files that a finished run would have.


def read_run(workdir):
  """Reads a run folder; only results.json has to be there."""
  folder = pathlib.Path(workdir)
  found = _read_json(folder / 'results.json')
  if found is None:
    again = 'give the --workdir of a run that finished a stage'
    raise InputError(f'{workdir}: no results.json there; {again}.')
  config = _read_json(folder / 'config.json') or {}
  results = {
    stage: found[stage]
    for stage in STAGES
    if isinstance(found.get(stage, {}).get('miou'), float)
  }
  stages = list(results)
  curves = {s: _read_curves(folder / s / 'metrics.jsonl') for s in stages}
  pictures = {s: _read_pictures(folder / s / 'pictures.npz') for s in stages}
  classes, command = [], []
  for stage in stages:
    # JSON objects of results are sorted by name: their order says nothing.
    own = _read_json(folder / stage / 'config.json') or {}
    classes = own.get('class_names') or classes
    environment = _read_json(folder / stage / 'environment.json') or {}
    command = environment.get('command') or command
  missing = [s for s in config.get('stages', []) if s not in results]
  missing += [f'{s}/metrics.jsonl' for s in stages if not curves[s]]
  missing += [f'{s}/pictures.npz' for s in stages if not pictures[s]]
  command = re.sub('^main.py', 'python -m attnfd_jax.main', shlex.join(command))
  files = (config, results, curves, pictures, classes, command)
  return Run(str(workdir), *files, missing)


def _read_json(path):
  """The object in the file, None without a file."""
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise InputError(f'{path}: not JSON ({error}); restore the file.') from None


def _read_curves(path):
  """kind -> name -> (steps, values); a later line replaces its step."""
  if not path.is_file():
    return {}
  points = {}
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      record = json.loads(line)
    except ValueError:
      continue  # The line that was being written when the run was killed.
    series = points.setdefault(record['kind'], {})
    for name in sorted(record.keys() - set(_NOT_LOSS)):
      if isinstance(record[name], float):
        series.setdefault(name, {})[record['step']] = record[name]
  return {
    kind: {
      name: tuple(map(np.array, zip(*sorted(series.items()), strict=True)))
      for name, series in names.items()
    }
    for kind, names in points.items()
  }


def _read_pictures(path):
  try:
    with np.load(path) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return {}


def outcome(results, *, method, network):
  """What `method` brought the student `network`, good or bad; plain text."""
  score = {stage: page.percent(r['miou']) for stage, r in results.items()}
  if 'distill' not in results:
    done = ', '.join(f'{stage} {text} mIoU' for stage, text in score.items())
    return f'There is no distilled student yet; finished: {done or "nothing"}.'
  after = score['distill']
  if 'student' not in results:
    return (
      f'{method} trains the {network} student to {after} mIoU; no student '
      'without distillation to compare it with.'
    )
  before, distill = score['student'], results['distill']
  gain = page.gain(results)
  if gain is None:
    return (
      f'The student ({before}) and the distilled student ({after}) were '
      'evaluated differently: these numbers cannot be compared.'
    )
  student = f'the {network} student'
  if abs(gain) < 0.05:
    text = f'{method} makes no difference to {student}'
  elif gain > 0:
    text = f'{method} lifts {student} by {signed(gain)} points of mIoU'
  else:
    text = f'{method} does not help: {student} loses {-gain:.2f} points of mIoU'
  where = f'{distill.get("split")}, protocol {distill.get("protocol")}'
  text += f', from {before} to {after} ({where})'
  test = page.gain(results, 'test')
  test = '' if test is None else f' On the test split: {signed(test)} points.'
  if 'teacher' not in results or not page.alike(results['teacher'], distill):
    return f'{text}.{test}'
  teacher = f'the teacher ({score["teacher"]})'
  gap = page.points(results['teacher']['miou'], results['student']['miou'])
  if gap <= 0:
    return f'{text}; {teacher} is no better than the student.{test}'
  if gain >= gap:
    return f'{text}; it reaches or passes {teacher}.{test}'
  if gain < 0.05 or gap < 0.5:
    return f'{text}; the teacher has {score["teacher"]}.{test}'
  closed = page.percent(gain / gap, 0)
  return f'{text}; that closes {closed} of the gap to {teacher}.{test}'


def _outcome(run, results=None):
  names = {'method': page.method(run), 'network': page.network(run, 'student')}
  return outcome(run.results if results is None else results, **names)


def _settings(config):
  """Those that make a run another experiment: not seed or folder."""
  pairs = leaves(config)
  return {k: str(v) for k, v in pairs if k not in ('seed', 'workdir')}


def _differences(runs):
  """For every run the settings in which the runs differ, as text."""
  settings = [_settings(run.config) for run in runs]
  keys = sorted(set().union(*settings))
  keys = [k for k in keys if len({s.get(k) for s in settings}) > 1]
  return [', '.join(f'{k}={s.get(k)}' for k in keys) for s in settings]


def _mean(runs):
  """Results of the first run with the mean mIoU of all."""
  results = {}
  for stage, result in runs[0].results.items():
    found = [run.results[stage] for run in runs if stage in run.results]
    if len(found) == len(runs):
      results[stage] = {**result, 'miou': np.mean([r['miou'] for r in found])}
      if all(r.get('test') for r in found):
        miou = np.mean([r['test']['miou'] for r in found])
        results[stage]['test'] = {'miou': miou}
  return results


def _make_page(runs):
  if len(runs) == 1:
    lead, body = _outcome(runs[0]), page.run_parts(runs[0], 4)
    if page.gain(runs[0].results) is not None:
      lead += ' One seed: a small difference can be chance.'
    return page.document(page.title(runs[0]), lead, body)
  rows, groups = [], {}
  for i, (run, text) in enumerate(zip(runs, _differences(runs), strict=True)):
    rows.append((run.path, f'#run-{i + 1}', text, [run]))
    groups.setdefault(text, []).append(run)
  for text, group in groups.items():
    if len({run.config.get('seed') for run in group}) == len(group) > 1:
      rows.append(('mean ± std', '', text, group))
  lead = f'Mean over {len(runs)} seeds: {_outcome(runs[0], _mean(runs))}'
  body = page.comparison(rows)
  for i, run in enumerate(runs):
    # Pictures are most of the bytes: fewer from each when there are many.
    parts = page.run_parts(run, max(1, 4 // len(runs)))
    body += page.section(f'run-{i + 1}', run.path, _outcome(run), parts)
  name = page.title(runs[0]) if len(groups) == 1 else 'Comparison'
  lead = lead if rows[-1][3] == runs else ''
  return page.document(f'{name}: {len(runs)} runs', lead, body)


def write_report(workdirs, output):
  """Writes one HTML page about the runs; an older page stays until it is whole.

  Args:
    workdirs: run folders; one without a results.json is an InputError.
    output: path of the page; its folder is made if needed.
  """
  text = _make_page([read_run(workdir) for workdir in workdirs])
  output = pathlib.Path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_name(f'.{output.name}.{os.getpid()}')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, output)


def main(argv):
  if len(argv) < 2:
    raise InputError('No run folder: give one or more, as runs/quickstart.')
  write_report(argv[1:], flags.FLAGS.output)
  print(f'Wrote {flags.FLAGS.output}')


if __name__ == '__main__':
  from attnfd_jax import cli

  # Not at import: main and other verbs have an --output of their own.
  flags.DEFINE_string('output', 'report.html', 'The page to write.')
  cli.run(main, positional=True)
