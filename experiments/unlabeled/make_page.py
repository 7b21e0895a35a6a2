# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md, and the picture of the curves.

  python experiments/unlabeled/make_page.py [--check]

Each file of results/facade/ and results/camvid/ is the compare.json of one
number of labels.
"""

import json
import pathlib
import sys

from matplotlib.figure import Figure
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402
import method_rows  # noqa: E402

from attnfd_jax.reporting import comparison_page  # noqa: E402

TITLES = {
  'facade': 'LabelMeFacade at 96 pixels, 838 images',
  'camvid': 'CamVid at 120 pixels, 367 images',
}
# Okabe and Ito, as in the report.
COLORS = {
  'baseline': '#E69F00',
  'pseudo': '#8C8C8C',
  'kd': '#56B4E9',
  'attnfd': '#CC79A7',
  'attnfd+kd': '#009E73',
}


def read(name):
  """{number of labels: compare.json} of a data set, ascending."""
  tables = {}
  for path in (HERE / 'results' / name).glob('*.json'):
    table = json.loads(path.read_text())
    tables[number_of_labels(table)] = table
  return dict(sorted(tables.items()))


def number_of_labels(table):
  """That of the student; the teacher has the same."""
  prefix = '--config.student.labeled_limit='
  for argument in table['command'].split():
    if argument.startswith(prefix):
      return int(argument.removeprefix(prefix))
  raise ValueError(f'No {prefix} in {table["command"]}.')


def rows_of(table):
  """Baseline first, then the methods in the order of COLORS."""
  rows = {row['name']: row for row in table['rows'] if row['val']}
  return {'baseline': table['baseline']} | {
    x: rows[x] for x in COLORS if x in rows
  }


def draw(axes, tables, title):
  teachers = [100 * table['teacher']['val'] for table in tables.values()]
  axes.plot([*tables], teachers, 's--', color='#0072B2', label='Teacher')
  for name, color in COLORS.items():
    points = [
      (labels, *spread(rows_of(table)[name]))
      for labels, table in tables.items()
      if name in rows_of(table)
    ]
    if points:
      labels, means, stds = np.array(points).T
      label = rows_of(tables[int(labels[0])])[name]['title']
      axes.errorbar(
        labels, means, stds, fmt='o-', color=color, capsize=3, label=label
      )
  axes.set_xscale('log')
  axes.set_xticks([*tables], [str(labels) for labels in tables])
  axes.minorticks_off()
  axes.set_title(title, fontsize='medium')
  axes.set_xlabel('labeled images')
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)


def spread(row):
  return 100 * row['val']['mean'], 100 * (row['val']['std'] or 0)


def table_lines(tables):
  """Scores on test as well, where the data set has that split."""
  has_test = any(table['baseline']['test'] for table in tables.values())
  test_head = ('mIoU test, %', 'gain, test') if has_test else ()
  lines = method_rows.head(('labels', *method_rows.HEAD, *test_head))
  for labels, table in tables.items():
    teacher = table['teacher']
    cells = [str(labels), 'Teacher', f'{100 * teacher["val"]:.2f}', '', '', '']
    if has_test:  # A teacher that was given is evaluated on val only.
      test = teacher.get('test')
      cells += [f'{100 * test:.2f}' if test else '', '']
    lines.append(method_rows.line(cells))
    for row in rows_of(table).values():
      cells = ['', *method_rows.cells(row, table['baseline'])]
      if has_test:
        gain = row.get('difference', {}).get('test')
        cells.append(comparison_page.score(row['test']))
        cells.append(comparison_page.difference(gain))
      lines.append(method_rows.line(cells))
  return lines


def main():
  sets = {name: read(name) for name in TITLES}
  if '--check' not in sys.argv:
    figure = Figure(figsize=(9, 3.6))
    panels = figure.subplots(1, len(sets), width_ratios=(5, 3))
    for axes, (name, tables) in zip(panels, sets.items(), strict=True):
      draw(axes, tables, TITLES[name])
    panels[0].set_ylabel('mIoU val, %')
    panels[0].legend(frameon=False, ncols=2)
    path = HERE.parents[1] / 'docs' / 'images' / 'unlabeled.png'
    figure.savefig(path, dpi=150, bbox_inches='tight')
  lines = []
  for name, tables in sets.items():
    lines += [f'#### {TITLES[name]}', '', *table_lines(tables), '']
  fill_page.main(
    HERE / 'README.md', 'table', '\n'.join(lines[:-1]), description=__doc__
  )


if __name__ == '__main__':
  main()
