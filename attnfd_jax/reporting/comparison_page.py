# SPDX-License-Identifier: Apache-2.0
"""The page and the Markdown table of a comparison, from its compare.json."""

import functools
import itertools
import shlex

import numpy as np

from attnfd_jax import paths
from attnfd_jax.reporting import page
from attnfd_jax.reporting.run_folder import read_pictures
from attnfd_jax.runs import logs

_SCENES = 3
_BAR = '\\|'  # Which does not end a cell of Markdown.
# In what rows can be equal to the baseline.
TITLES = {'steps': 'Equal steps', 'seconds': 'Equal seconds'}


def write(found, workdir):
  """compare.md and compare.html in the folder of the comparison.

  `found` is compare.json; curves and pictures come from the runs beside it.
  """
  with paths.replacing(workdir / 'compare.md') as file:
    file.write(markdown(found).encode())
  palette, class_names = _classes(workdir, found)
  page.render(
    'comparison.html',
    workdir / 'compare.html',
    found=found,
    tables=[_Table(found, kind, workdir) for kind in _kinds(found)],
    head=_head(found),
    cells=functools.partial(_cells, found),
    palette=palette,
    class_names=class_names,
    difference=difference,
    flags=shlex.join,
  )


def score(spread, show=page.number):
  """'43.51 ± 0.42' of {'mean', 'std', 'n'} of fractions, as percent."""
  if spread is None:
    return '–'
  std = spread['std']
  return page.plus_minus(100 * spread['mean'], std and 100 * std, show)


def difference(spread):
  """'+1.20 ± 0.30' points."""
  return score(spread, page.signed)


def _splits(found):
  tested = found['baseline'].get('test') is not None
  return ('val', 'test') if tested else ('val',)


def markdown(found, level=2):
  """The tables of a compare.json as text, under headings of this level."""
  lines, head = [], ['method', 'seeds', *_head(found)]
  for kind in _kinds(found):
    rows = [row for row in found['rows'] if row['equal'] == kind]
    lines += [f'{"#" * level} {TITLES[kind]}', '', f'| {" | ".join(head)} |']
    lines += [f'|{" --- |" * len(head)}']
    lines += [_line(found, row) for row in (found['baseline'], *in_order(rows))]
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


def _kinds(found):
  """Those that have rows."""
  return [
    kind
    for kind in TITLES
    if any(row['equal'] == kind for row in found['rows'])
  ] or ['steps']


def _head(found):
  """Of the columns after method and seeds."""
  of_splits = [(f'mIoU {split}, %', 'difference') for split in _splits(found)]
  costs = ('steps', 's a step', 'training', 'GB', 'parameters')
  return [*itertools.chain(*of_splits), *costs]


def _cells(found, row):
  """Of a row that was measured, as text."""
  differences = row.get('difference', {})  # Not of the baseline.
  scores = (
    (score(row[split]), difference(differences.get(split)))
    for split in _splits(found)
  )
  return [
    *itertools.chain(*scores),
    f'{row["num_steps"]:,}',
    f'{row["step_seconds"]:.3g}',
    logs.duration(row['seconds']),
    page.number(row['memory_bytes'], 1e-9),
    f'{row["method_params"]:,}',
  ]


def _line(found, row):
  """Of Markdown."""
  if 'failed' in row:
    cells = [row['title'], f'failed: {row["failed"]}']
  else:
    cells = [row['title'], seeds(row), *_cells(found, row)]
  return f'| {" | ".join(x.replace("|", _BAR) for x in cells)} |'


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
    self.title = TITLES[kind]
    self.rows = in_order([r for r in found['rows'] if r['equal'] == kind])
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
      (self._label(row), row['difference']['iou_per_class'])
      for row in self.done
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


def _classes(workdir, found):
  """Palette [k, 3] and names in the order of ids, from a run's config.json."""
  for run in found['baseline']['runs']:
    path = workdir / run['folder'] / 'student' / 'config.json'
    if config := logs.read_json(path):
      return np.array(config['palette'], np.uint8), config['class_names']
  return np.zeros((0, 3), np.uint8), []
