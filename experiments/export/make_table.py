# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of int8.json into docs/deployment.md.

python experiments/export/make_table.py [--check]
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402
import method_rows  # noqa: E402

LABELS = {
  'float32': 'float32, ONNX',
  'int8 weights': 'int8 weights, StableHLO',
  'int8': 'int8, ONNX',
}


def name(stage):
  width = stage['width_multiplier']
  return stage['network'] + (f' x{width:g}' if width != 1 else '')


def rows(stages):
  """Lines of both tables, one stage after the other."""
  head = ('student', 'file', 'val mIoU, %', 'same class, %', 'MB')
  sizes = [*stages[0]['rows']['float32']['costs']]
  costs = [f'ms at {x.replace("x", " x ")}' for x in sizes]
  memory = [f'memory, MB, at {x.replace("x", " x ")}' for x in sizes]
  lines = method_rows.head((*head, *costs, *memory))
  for stage in stages:
    exact = stage['rows']['float32']
    for key, label in LABELS.items():
      row, cells = stage['rows'][key], []
      for size in sizes:
        ms = row['costs'][size]['ms']
        text = f'{ms:.1f}'
        if row is not exact:
          text += f' ({exact["costs"][size]["ms"] / ms:.1f}x)'
        cells.append(text)
      cells += [f'{row["costs"][x]["memory_mb"]:.0f}' for x in sizes]
      same = ''
      if row is not exact:
        same = f'{100 * row["same_class"]:.2f}'
      first = name(stage) if row is exact else ''
      miou = f'{100 * row["val_miou"]:.2f}'
      lines.append(
        method_rows.line((first, label, miou, same, f'{row["mb"]:.1f}', *cells))
      )
  return '\n'.join(lines)


def main():
  found = json.loads((HERE / 'results' / 'int8.json').read_text())
  page = HERE.parents[1] / 'docs' / 'deployment.md'
  fill_page.main(page, 'int8', rows(found['stages']), description=__doc__)


if __name__ == '__main__':
  main()
