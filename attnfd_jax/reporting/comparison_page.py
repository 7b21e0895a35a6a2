# SPDX-License-Identifier: Apache-2.0
"""The page and the Markdown table of a comparison, from its compare.json."""

import json
import shlex

import numpy as np

from attnfd_jax import paths
from attnfd_jax.reporting import page
from attnfd_jax.reporting.run_folder import read_pictures
from attnfd_jax.runs import logs

_SCENES = 3
_TITLES = {
  'steps': 'Equal steps',
  'seconds': 'Equal seconds',
}


def write(found, workdir):
  """compare.md and compare.html in the folder of the comparison.

  `found` is compare.json; curves and pictures come from the runs beside it.
  """
  with paths.replacing(workdir / 'compare.md') as file:
    file.write(markdown(found).encode())
  palette, class_names = _classes(workdir, found)
  kinds = {row['equal'] for row in found['rows']} or {'steps'}
  tables = [_Table(found, kind, workdir) for kind in _TITLES if kind in kinds]
  page.render(
    'comparison.html',
    workdir / 'compare.html',
    found=found,
    tables=tables,
    splits=_splits(found),
    palette=palette,
    class_names=class_names,
    score=score,
    difference=difference,
    flags=shlex.join,
    to_json=json.dumps,
  )


def score(spread, show=page.number):
  """'43.51 ± 0.42' of {'mean', 'std', 'n'} of fractions, as percent."""
  if spread is None:
    return '–'
  text = show(100 * spread['mean'])
  return (
    text if spread['std'] is None else f'{text} ± {100 * spread["std"]:.2f}'
  )


def difference(spread):
  """'+1.20 ± 0.30' points."""
  return score(spread, page.signed)


def _splits(found):
  tested = found['baseline'].get('test') is not None
  return ('val', 'test') if tested else ('val',)


def markdown(found, level=2):
  """The tables of a compare.json as text, under headings of this level."""
  splits = _splits(found)
  titles = [f'mIoU {split} | difference' for split in splits]
  head = ['method', 'seeds', *titles, 'steps', 's a step', 'training', 'GB']
  lines = []
  kinds = {row['equal'] for row in found['rows']} or {'steps'}
  for kind, title in _TITLES.items():
    rows = [row for row in found['rows'] if row['equal'] == kind]
    if kind not in kinds:
      continue
    lines += [
      f'{"#" * level} {title}',
      '',
      f'| {" | ".join(head)} | parameters |',
    ]
    lines += [f'|{" --- |" * (len(head) + len(splits) + 1)}']
    for row in (found['baseline'], *in_order(rows)):
      lines += [_markdown_row(row, splits)]
    lines += ['']
  teacher = found['teacher']
  if teacher:
    scores = [f'val {page.percent(teacher["val"])}']
    if teacher.get('test') is not None:
      scores += [f'test {page.percent(teacher["test"])}']
    lines += [f'Teacher {teacher["name"]}: {", ".join(scores)}.', '']
  text = 'mIoU in percent, mean ± standard deviation over seeds (n − 1); the '
  text += 'difference to the baseline is paired by seed; parameters are those '
  lines += [f'{text}of the method, in training only.']
  return '\n'.join(lines) + '\n'


def _markdown_row(row, splits):
  title = _cell(row['title'])
  if 'failed' in row:
    return f'| {title} | failed: {_cell(row["failed"])} |'
  cells = [title, _cell(seeds(row))]
  for split in splits:
    cells += [
      score(row[split]),
      difference(row.get('difference', {}).get(split)),
    ]
  cells += [
    f'{row["num_steps"]:,}',
    f'{row["step_seconds"]:.3g}',
    logs.duration(row['seconds']),
    page.number(row['memory_bytes'], 1e-9),
    f'{row["method_params"]:,}',
  ]
  return f'| {" | ".join(cells)} |'


def _cell(text):
  return text.replace('|', '\\|')


def seeds(row):
  """'0, 1, 2 failed: Loss is not finite at step 3.'"""
  done = [str(run['seed']) for run in row['runs'] if 'val' in run]
  failed = [run for run in row['runs'] if 'failed' in run]
  texts = [f'{run["seed"]} failed: {run["failed"]}' for run in failed]
  return ', '.join(done + texts) or '–'


def in_order(rows):
  """The best on val first; what failed last."""

  def key(row):
    paired, value = row['difference']['val'], row['val']
    best = (paired or value or {'mean': 0})['mean']
    return value is None, paired is None, -best

  return sorted(rows, key=key)


class _Table:
  """What the page shows of the rows that are equal in steps, or in seconds."""

  def __init__(self, found, kind, workdir):
    self.title, self.kind = _TITLES[kind], kind
    self.rows = in_order([r for r in found['rows'] if r['equal'] == kind])
    self.failed = [row for row in self.rows if row['val'] is None]
    self.done = [row for row in self.rows if row['val'] is not None]
    baseline = found['baseline']
    self._workdir = workdir
    shown = [row for row in (baseline, *self.done) if row['val'] is not None]
    curves = {self._label(row): (row, _mean_curve(row)) for row in shown}
    curves = {k: (row, x) for k, (row, x) in curves.items() if x is not None}
    self.over_steps = {title: curve for title, (_, curve) in curves.items()}
    self.over_seconds = {
      title: curve * [[row['step_seconds']], [1]]
      for title, (row, curve) in curves.items()
    }
    self.classes = [
      (self._label(row), _class_differences(row, baseline)) for row in self.done
    ]
    self.pictures = [
      (self._label(row), arrays)
      for row in shown
      if (arrays := self._pictures(row))
    ]

  def _label(self, row):
    """Its title, or its name where two have the same title."""
    titles = [other['title'] for other in self.rows]
    return row['title'] if titles.count(row['title']) < 2 else row['name']

  def _folders(self, row):
    stage = 'distill' if row['method'] else 'student'
    for run in row['runs']:
      if 'val' in run:
        yield self._workdir / run['folder'] / stage

  def _pictures(self, row):
    """Of the first seed."""
    return next(
      (read_pictures(x / 'pictures.npz') for x in self._folders(row)), {}
    )

  @property
  def scenes(self):
    """(image, label, [(title, prediction)]) of some images."""
    if not self.pictures:
      return []
    first = self.pictures[0][1]
    same = [
      (title, arrays)
      for title, arrays in self.pictures
      if np.array_equal(arrays['label'], first['label'])
    ]
    return [
      (
        first['image'][i],
        first['label'][i],
        [(title, arrays['prediction'][i]) for title, arrays in same],
      )
      for i in range(min(len(first['image']), _SCENES))
    ]


def _mean_curve(row):
  """[2, n]: steps, and the mean over seeds of the mIoU on val; or None."""
  curves = [np.array(run['curve']).T for run in row['runs'] if 'val' in run]
  curves = [x for x in curves if x.size]
  same = [x for x in curves if np.array_equal(x[0], curves[0][0])]
  return np.mean(same, axis=0) if same else None


def _class_differences(row, baseline):
  """Class -> points over the baseline of the same seeds, None where unknown."""
  before = {run['seed']: run for run in baseline['runs']}
  pairs = [
    (run['iou_per_class'], before[run['seed']]['iou_per_class'])
    for run in row['runs']
    if 'val' in run and 'val' in before.get(run['seed'], {})
  ]
  found = {}
  for name in pairs[0][0] if pairs else ():
    values = [(a[name], b[name]) for a, b in pairs]
    values = [100 * (a - b) for a, b in values if None not in (a, b)]
    found[name] = float(np.mean(values)) if values else None
  return found


def _classes(workdir, found):
  """Palette [k, 3] and names in the order of ids, from a run's config.json."""
  for run in found['baseline']['runs']:
    path = workdir / run['folder'] / 'student' / 'config.json'
    if path.exists():
      config = json.loads(path.read_text())
      return np.array(config['palette'], np.uint8), config['class_names']
  return np.zeros((0, 3), np.uint8), []
