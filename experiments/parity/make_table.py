# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/parity.md from results/*.json of compare.py.

python experiments/parity/make_table.py [--check]
"""

import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402

TITLES = {'resnet18': 'ResNet-18', 'mobilenet_v2': 'MobileNetV2'}


def largest(errors, *words):
  """Of the entries whose name has one of the words and is no export."""
  return max(
    value
    for name, value in errors.items()
    if any(word in name for word in words) and 'exported' not in name
  )


def markdown(header, rows):
  lines = [header, ['---'] * len(header), *rows]
  return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def number(value):
  return f'{value:.1e}' if value else '0'


def one_step(columns):
  """Forward pass, terms and gradients; a column for each run."""

  def attention(run):
    return largest(run['eval'], ' attention ')

  def taps(run):
    return max(
      value
      for name, value in run['eval'].items()
      if name.split(' ', 1)[1] in ('backbone', 'aspp', 'decoder')
    )

  def middle_and_worst(key):
    def text(run):
      errors = run['gradients'][key]
      return f'{number(statistics.median(errors))}, {number(max(errors))}'

    return text

  rows = {
    'logits, both networks, eval mode': lambda run: number(
      largest(run['eval'], 'logits')
    ),
    'three taps, both networks': lambda run: number(taps(run)),
    'three attention maps, both': lambda run: number(attention(run)),
    'our `.pth`, strict load, their logits': lambda run: number(
      run['eval']['exported .pth, strict load, logits']
    ),
    'cross-entropy, worst of 4 batches': lambda run: number(
      max(run['gradients']['ce'])
    ),
    'attention term, worst of 4 batches': lambda run: number(
      max(run['gradients']['attention'])
    ),
    'worst gradient tensor: median of 4 batches, worst': middle_and_worst(
      'gradients'
    ),
    'the same, theirs against theirs in float64': middle_and_worst('rounding'),
  }
  body = [
    [title, *(cell(run) for run in columns.values())]
    for title, cell in rows.items()
  ]
  return markdown(['', *columns], body)


def training(columns):
  """Worst relative difference of a weight after each step."""
  header = ['step', 'epoch']
  for title in columns:
    header += [title, 'rounding alone']
  longest = max((run['trajectory'] for run in columns.values()), key=len)
  body = []
  for i, step in enumerate(longest):
    cells = [step['step'], step['epoch']]
    for run in columns.values():
      row = run['trajectory'][i : i + 1]
      cells += [number(x['weights']) for x in row] or ['']
      cells += [number(x['rounding']['weights']) for x in row] or ['']
    body.append(cells)
  return markdown(header, body)


def make_tables():
  files = {
    path.stem: json.loads(path.read_text())
    for path in sorted((HERE / 'results').glob('*.json'))
  }
  columns = {
    f'{TITLES[student]}, {precision}': run
    for precision, file in files.items()
    for student, run in file['results'].items()
  }
  first = next(iter(files.values()))
  versions = first['versions']
  tensors = ' and '.join(
    str(run['gradients']['tensors']) for run in first['results'].values()
  )
  return (
    f"Authors' commit {first['commit'][:7]}; torch {versions['torch']}, jax "
    f'{versions["jax"]}, {first["device"]}. {tensors} gradient tensors.\n\n'
    f'{one_step(columns)}\n{training(columns)}'
  )


if __name__ == '__main__':
  fill_page.main(
    HERE.parents[1] / 'docs/parity.md',
    'parity',
    f'\n{make_tables()}',
    description=__doc__,
  )
