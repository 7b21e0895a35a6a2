# SPDX-License-Identifier: Apache-2.0
"""Writes a comparison as an HTML page and as Markdown tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import shlex
from typing import Any, TypeAlias

from etils import epath
import numpy as np

from attnfd_jax import paths
from attnfd_jax.reporting import page
from attnfd_jax.reporting.run_folder import read_pictures
from attnfd_jax.runs import logs

_SCENES = 3  # Images with predictions.
_BAR = '\\|'  # A bar that does not end a cell of Markdown.
# Values of --equal: what rows and baseline have in common.
TITLES = {'steps': 'Equal steps', 'seconds': 'Equal seconds'}

# The content of a compare.json, see docs/comparing.md, and parts of it.
_Comparison: TypeAlias = Mapping[str, Any]
_Row: TypeAlias = Mapping[str, Any]
_Spread: TypeAlias = Mapping[str, Any]  # {'mean', 'std', 'n'}


def write(comparison: _Comparison, workdir: epath.Path) -> None:
  """Writes compare.md and compare.html.

  Args:
    comparison: content of compare.json.
    workdir: folder of the comparison, with the runs' curves and pictures.
  """
  with paths.replacing(workdir / 'compare.md') as file:
    file.write(markdown(comparison).encode())
  palette, class_names = _classes(workdir, comparison)
  page.render(
    'comparison.html',
    workdir / 'compare.html',
    comparison=comparison,
    tables=[_Table(comparison, kind, workdir) for kind in _kinds(comparison)],
    head=_head(comparison),
    cells=functools.partial(_cells, comparison),
    palette=palette,
    class_names=class_names,
    difference=difference,
    flags=shlex.join,
  )


def score(
  spread: _Spread | None,
  show: Callable[[float | None], str] = page.number,
) -> str:
  """Formats a spread of fractions in percent, '43.51 ± 0.42'."""
  if spread is None:
    return '–'
  std = spread['std']
  return page.plus_minus(100 * spread['mean'], std and 100 * std, show)


def difference(spread: _Spread | None) -> str:
  """Formats a spread of differences in points, '+1.20 ± 0.30'."""
  return score(spread, page.signed)


def _splits(comparison: _Comparison) -> tuple[str, ...]:
  tested = comparison['baseline'].get('test') is not None
  return ('val', 'test') if tested else ('val',)


def markdown(comparison: _Comparison, level: int = 2) -> str:
  """Formats the tables of a comparison in Markdown.

  Args:
    comparison: content of compare.json.
    level: level of the headings.
  """
  lines, head = [], ['method', 'seeds', *_head(comparison)]
  for kind in _kinds(comparison):
    rows = [row for row in comparison['rows'] if row['equal'] == kind]
    lines += [f'{"#" * level} {TITLES[kind]}', '', f'| {" | ".join(head)} |']
    lines += [f'|{" --- |" * len(head)}']
    lines += [
      _line(comparison, row)
      for row in (comparison['baseline'], *in_order(rows))
    ]
    lines += ['']
  teacher = comparison['teacher']
  if teacher:
    scores = [f'val {page.percent(teacher["val"])}']
    if teacher.get('test') is not None:
      scores += [f'test {page.percent(teacher["test"])}']
    lines += [f'Teacher {teacher["name"]}: {", ".join(scores)}.', '']
  lines += [
    'mIoU in percent, mean ± standard deviation over seeds (n − 1). The gain '
    'over the baseline is paired by seed. Extra parameters are those of the '
    'method, which are not deployed.'
  ]
  return '\n'.join(lines) + '\n'


def _kinds(comparison: _Comparison) -> list[str]:
  """Returns the values of --equal that have rows."""
  return [
    kind
    for kind in TITLES
    if any(row['equal'] == kind for row in comparison['rows'])
  ] or ['steps']


def _head(comparison: _Comparison) -> list[str]:
  """Returns the headings of the columns after method and seeds."""
  of_splits = [(f'mIoU {split}, %', 'gain') for split in _splits(comparison)]
  costs = ('steps', 's/step', 'training time', 'GB', 'extra parameters')
  return [*itertools.chain(*of_splits), *costs]


def _cells(comparison: _Comparison, row: _Row) -> list[str]:
  """Returns the cells after method and seeds of a row that was measured."""
  differences = row.get('difference', {})  # The baseline has none.
  scores = (
    (score(row[split]), difference(differences.get(split)))
    for split in _splits(comparison)
  )
  return [
    *itertools.chain(*scores),
    f'{row["num_steps"]:,}',
    f'{row["step_seconds"]:.3g}',
    logs.duration(row['seconds']),
    page.number(row['memory_bytes'], 1e-9),
    f'{row["method_params"]:,}',
  ]


def _line(comparison: _Comparison, row: _Row) -> str:
  """Returns a row of a Markdown table."""
  if 'failed' in row:
    cells = [row['title'], f'failed: {row["failed"]}']
  else:
    cells = [row['title'], seeds(row), *_cells(comparison, row)]
  return f'| {" | ".join(x.replace("|", _BAR) for x in cells)} |'


def seeds(row: _Row) -> str:
  """Formats the seeds of a row, '0, 1, 2 failed: Loss is not finite.'."""
  done = [str(run['seed']) for run in row['runs'] if 'val' in run]
  failed = [run for run in row['runs'] if 'failed' in run]
  texts = [f'{run["seed"]} failed: {run["failed"]}' for run in failed]
  return ', '.join(done + texts) or '–'


def in_order(rows: Sequence[_Row]) -> list[_Row]:
  """Sorts rows: the best on val first, failed ones last."""

  def key(row):
    paired, value = row['difference']['val'], row['val']
    mean = (paired or value or {'mean': 0})['mean']
    return value is None, paired is None, -mean

  return sorted(rows, key=key)


class _Table:
  """The part of the page about one value of --equal.

  Attributes:
    rows: all rows, sorted.
    done: rows with at least one finished run.
    over_steps: title -> steps and mIoU [2, n].
    over_seconds: title -> seconds of training and mIoU [2, n].
    classes: pairs of a title and the difference of each class.
    pictures: pairs of a title and the arrays of a pictures.npz.
  """

  def __init__(self, comparison: _Comparison, kind: str, workdir: epath.Path):
    self.title = TITLES[kind]
    self.rows = in_order([r for r in comparison['rows'] if r['equal'] == kind])
    self.done = [row for row in self.rows if row['val'] is not None]
    baseline = comparison['baseline']
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

  def _label(self, row: _Row) -> str:
    """Returns a row's title, or its name if the title is not unique."""
    titles = [other['title'] for other in self.rows]
    return row['title'] if titles.count(row['title']) < 2 else row['name']

  def _folders(self, row: _Row) -> Iterator[epath.Path]:
    """Yields the stage folders of the finished runs."""
    stage = 'distill' if row['method'] else 'student'
    for run in row['runs']:
      if 'val' in run:
        yield self._workdir / run['folder'] / stage

  def _pictures(self, row: _Row) -> dict[str, np.ndarray]:
    """Reads the pictures of the first finished run."""
    return next(
      (read_pictures(x / 'pictures.npz') for x in self._folders(row)), {}
    )

  @property
  def scenes(
    self,
  ) -> list[tuple[np.ndarray, np.ndarray, list[tuple[str, np.ndarray]]]]:
    """Image, label and the prediction of each row, for some images."""
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


def _mean_curve(row: _Row) -> np.ndarray | None:
  """Returns steps and mean mIoU on val over the seeds [2, n], if there are any.

  Seeds that were evaluated at other steps than the first one do not count.
  """
  curves = [np.array(run['curve']).T for run in row['runs'] if 'val' in run]
  curves = [x for x in curves if x.size]
  same = [x for x in curves if np.array_equal(x[0], curves[0][0])]
  return np.mean(same, axis=0) if same else None


def _classes(
  workdir: epath.Path, comparison: _Comparison
) -> tuple[np.ndarray, Sequence[str]]:
  """Reads palette [k, 3] and class names from the config.json of a run."""
  for run in comparison['baseline']['runs']:
    path = workdir / run['folder'] / 'student' / 'config.json'
    if config := logs.read_json(path):
      return np.array(config['palette'], np.uint8), config['class_names']
  return np.zeros((0, 3), np.uint8), []
