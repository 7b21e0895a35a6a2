# SPDX-License-Identifier: Apache-2.0
"""Writes the table of README.md, and the curve if there are two points.

  python experiments/unlabeled/make_page.py [--check]

Each file of results/facade/ is the compare.json of one number of labels.
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

# Okabe and Ito, as in the report.
COLORS = {
  'baseline': '#E69F00',
  'pseudo': '#8C8C8C',
  'kd': '#56B4E9',
  'attnfd': '#CC79A7',
  'attnfd+kd': '#009E73',
}


def read():
  """{number of labels: compare.json}, ascending."""
  tables = {}
  for path in (HERE / 'results' / 'facade').glob('*.json'):
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


def draw(tables, path):
  figure = Figure(figsize=(6, 3.6))
  axes = figure.subplots()
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
      title = rows_of(tables[int(labels[0])])[name]['title']
      axes.errorbar(
        labels, means, stds, fmt='o-', color=color, capsize=3, label=title
      )
  axes.set_xscale('log')
  axes.set_xticks([*tables], [str(labels) for labels in tables])
  axes.minorticks_off()
  axes.set_xlabel('labeled images')
  axes.set_ylabel('mIoU val, %')
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)
  axes.legend(frameon=False, ncols=2)
  figure.savefig(path, dpi=150, bbox_inches='tight')


def spread(row):
  return 100 * row['val']['mean'], 100 * (row['val']['std'] or 0)


def table_text(tables):
  head = ('labels', *method_rows.HEAD)
  lines = method_rows.head(head)
  for labels, table in tables.items():
    teacher = f'{100 * table["teacher"]["val"]:.2f}'
    lines.append(
      method_rows.line((str(labels), 'Teacher', teacher, '', '', ''))
    )
    for row in rows_of(table).values():
      cells = method_rows.cells(row, table['baseline'])
      lines.append(method_rows.line(('', *cells)))
  return '\n'.join(lines)


def main():
  tables = read()
  if len(tables) > 1 and '--check' not in sys.argv:
    draw(tables, HERE.parents[1] / 'docs' / 'images' / 'unlabeled.png')
  fill_page.main(
    HERE / 'README.md', 'table', table_text(tables), description=__doc__
  )


if __name__ == '__main__':
  main()
