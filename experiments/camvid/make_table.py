# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/results.md from the JSON files in results/.

  python experiments/camvid/make_table.py [--check]

Each file is a stage's result.json with its command, number of epochs and curve
of val mIoU. Rows that differ only in their seed are averaged.
"""

import collections
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402

HEADER = """\
| network | learns from | epochs | val mIoU | test mIoU | seeds |
| --- | --- | --- | --- | --- | --- |
"""


def read_results(folder):
  """All results, teachers first, then by method."""
  files = sorted(folder.glob('*.json'))
  return [json.loads(path.read_text()) for path in files]


def method_of(result):
  """Name of a distilled result's method, and AttnFD's weight or None.

  Results of before version 2 have the weight as `attn_lambda`.
  """
  method = result['method']
  if isinstance(method, str):
    return method, result['attn_lambda'] if 'attnfd' in method else None
  return method['name'], method['options'].get('attnfd', {}).get('weight')


def teacher_label(result):
  """What a distilled row names as its teacher, with that teacher's score."""
  teacher = result['teacher']
  if isinstance(teacher, str):  # As in `method_of`.
    teacher = {'name': teacher, 'miou': result['teacher_miou']}
  return f'{teacher["name"]} ({100 * teacher["miou"]:.1f})'


def row_key(result):
  """What rows are averaged over: everything but the seed."""
  source = 'labels'
  if result['stage'] == 'distill':
    method, weight = method_of(result)
    weight = '' if weight is None else f', lambda {weight:g}'
    source = f'{method}{weight}, {teacher_label(result)}'
  role = 'teacher' if result['stage'] == 'teacher' else 'student'
  attention = ' with CBAM' if result.get('in_path_attention') else ''
  network = f'{result["network"]}{attention} ({role})'
  return result['group'], network, source, result['num_epochs']


def spread(values):
  """'60.3 +- 0.4' in percent, sample standard deviation."""
  values = [100 * value for value in values]
  mean = f'{statistics.mean(values):.1f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(values):.1f}'


def make_table(results):
  """Markdown, one table for each group of results."""
  rows = collections.defaultdict(list)
  for result in results:
    rows[row_key(result)].append(result)
  text, last = '', None
  order = {'teacher': 0, 'student': 1, 'distill': 2}
  for key, group in sorted(
    rows.items(),
    key=lambda item: (item[0][0], order[item[1][0]['stage']], item[0]),
  ):
    name, network, source, epochs = key
    if name != last:
      title = json.loads((HERE / 'groups.json').read_text())[name]
      text += f'\n{title}\n\n{HEADER}'
      last = name
    val = spread([result['miou'] for result in group])
    test = spread([result['test']['miou'] for result in group])
    text += (
      f'| {network} | {source} | {epochs:g} | {val} | {test} | {len(group)} |\n'
    )
  return text


if __name__ == '__main__':
  fill_page.main(
    HERE.parents[1] / 'docs' / 'results.md',
    'results',
    make_table(read_results(HERE / 'results')),
    description=__doc__,
  )
