# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of int8.json and int8_vnni.json into docs/deployment.md.

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


def with_speedup(cost, exact):
  """The time, and the speedup over `exact`, for one image size."""
  return f'{cost["ms"]:.1f} ({exact["ms"] / cost["ms"]:.1f}x)'


def cost_cells(costs, exact):
  """Time with the speedup over `exact`, and memory, of each image size."""
  cells = []
  for size, cost in costs.items():
    is_exact = costs is exact
    text = f'{cost["ms"]:.1f}' if is_exact else with_speedup(cost, exact[size])
    cells += [text, f'{cost["memory_mb"]:.0f}']
  return cells


def cost_head(costs):
  return [
    text
    for size in costs
    for text in (f'ms, {size.replace("x", " x ")}', 'memory, MB')
  ]


def stage_name(stage):
  width = stage['width_multiplier']
  return stage['network'] + (f' x{width:g}' if width != 1 else '')


def stage_table(stages):
  head = ['student', 'file', 'val mIoU, %', 'same class, %', 'MB']
  costs = stages[0]['rows']['float32']['costs']
  lines = method_rows.head([*head, *cost_head(costs)])
  for stage in stages:
    name = stage_name(stage)
    exact = stage['rows']['float32']
    for key, label in LABELS.items():
      row = stage['rows'][key]
      cells = [
        name,
        label,
        f'{100 * row["val_miou"]:.2f}',
        '',
        f'{row["mb"]:.1f}',
      ]
      if row is not exact:
        cells[0], cells[3] = '', f'{100 * row["same_class"]:.2f}'
      cells += cost_cells(row['costs'], exact['costs'])
      lines.append(method_rows.line(cells))
  return lines


def full_width_table(networks):
  costs = next(iter(networks.values()))['costs']['float32']
  lines = method_rows.head(['full width', 'file', 'MB', *cost_head(costs)])
  for name, network in networks.items():
    exact = network['costs']['float32']
    for key, row in network['costs'].items():
      first = name if row is exact else ''
      cells = [first, LABELS[key], f'{network["mb"][key]:.1f}']
      lines.append(method_rows.line([*cells, *cost_cells(row, exact)]))
  return lines


def short_table(found):
  """float32 and int8 in a row; networks of full width have times only."""
  sizes = found['stages'][0]['rows']['float32']['costs']
  head = ['student', 'val mIoU, %', 'same class, %']
  head += [f'ms, {size.replace("x", " x ")}' for size in sizes]
  lines = method_rows.head(head)

  def times(exact, int8):
    return [
      f'{exact[size]["ms"]:.1f} → {with_speedup(int8[size], exact[size])}'
      if size in exact
      else ''
      for size in sizes
    ]

  for stage in found['stages']:
    exact, int8 = (stage['rows'][x] for x in ('float32', 'int8'))
    scores = (f'{100 * row["val_miou"]:.2f}' for row in (exact, int8))
    cells = [stage_name(stage), ' → '.join(scores)]
    cells.append(f'{100 * int8["same_class"]:.2f}')
    lines.append(
      method_rows.line([*cells, *times(exact['costs'], int8['costs'])])
    )
  for name, network in found['full_width'].items():
    costs = network['costs']
    cells = [f'{name}, full width', '', '']
    cells += times(costs['float32'], costs['int8'])
    lines.append(method_rows.line(cells))
  return lines


def main():
  found, vnni = (
    json.loads((HERE / 'results' / f'{name}.json').read_text())
    for name in ('int8', 'int8_vnni')
  )
  lines = [*stage_table(found['stages']), '']
  lines += full_width_table(found['full_width'])
  page = HERE.parents[1] / 'docs' / 'deployment.md'
  fill_page.main(page, 'int8', '\n'.join(lines), description=__doc__)
  lines = short_table(vnni)
  fill_page.main(page, 'int8_vnni', '\n'.join(lines), description=__doc__)


if __name__ == '__main__':
  main()
