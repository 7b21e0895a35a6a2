# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of results/ into README.md here, and the first one, with
fewer columns, into the README of the repository.

  python experiments/methods/make_table.py [--check]

Each folder of results/ is one setting; its files are compare.json of one or
several comparisons, whose rows and seeds are put together.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402
import method_rows  # noqa: E402

from attnfd_jax.comparison import table  # noqa: E402
from attnfd_jax.reporting import comparison_page  # noqa: E402


def merged(tables):
  """One compare.json of several with one teacher and one student."""
  found, *others = tables
  rows = {(row['equal'], row['name']): row for row in found['rows']}
  for other in others:
    _add_runs(found['baseline'], other['baseline'])
    for row in other['rows']:
      key = row['equal'], row['name']
      if key in rows:
        _add_runs(rows[key], row)
      else:
        rows[key] = row
    found['tuning'] += other['tuning']
  started = [row for row in rows.values() if row['runs'] or 'failed' in row]
  found['rows'] = started
  tried = [x for x in found['tuning'] if x['val'] or x['failed']]
  found['tuning'] = tried
  table.set_statistics(found)
  return found


def _add_runs(row, other):
  seeds = {run['seed'] for run in row['runs']}
  row['runs'] += [run for run in other['runs'] if run['seed'] not in seeds]


def read_setting(folder):
  files = sorted(folder.glob('*.json'))
  return merged([json.loads(path.read_text()) for path in files])


def tuning_table(found):
  lines = ['| row | val | |', '| --- | --- | --- |']
  for entry in found['tuning']:
    score = entry['failed'] or f'{100 * entry["val"]:.2f}'
    chosen = 'chosen' if entry['chosen'] else ''
    lines.append(f'| {entry["title"]} | {score} | {chosen} |')
  return '\n'.join(lines)


def short_table(found):
  """Equal steps, rows of several seeds, the best on val first."""
  rows = [row for row in found['rows'] if row['equal'] == 'steps']
  rows = [row for row in rows if row['val'] and row['val']['n'] > 1]
  baseline = found['baseline']
  lines = method_rows.head(method_rows.HEAD)
  for row in (baseline, *comparison_page.in_order(rows)):
    lines.append(method_rows.line(method_rows.cells(row, baseline)))
  return '\n'.join(lines)


def main():
  titles = json.loads((HERE / 'settings.json').read_text())
  settings = {x: read_setting(HERE / 'results' / x) for x in titles}
  parts = []
  for name, title in titles.items():
    found = settings[name]
    text = f'### {title}\n\n{comparison_page.markdown(found, level=4)}'
    if found['tuning']:
      text += f'\nWeights that were tried:\n\n{tuning_table(found)}\n'
    parts.append(text)
  fill_page.main(
    HERE / 'README.md', 'tables', '\n'.join(parts), description=__doc__
  )
  name, title = next(iter(titles.items()))
  fill_page.main(
    HERE.parents[1] / 'README.md',
    'methods',
    f'\n{title}:\n\n{short_table(settings[name])}\n',
    description=__doc__,
  )


if __name__ == '__main__':
  main()
