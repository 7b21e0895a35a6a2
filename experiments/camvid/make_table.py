# SPDX-License-Identifier: Apache-2.0
"""Writes the CamVid table into README.md from the JSON files in results/.

  python experiments/camvid/make_table.py [--check]

Each file is a stage's result.json with its command, number of epochs and curve
of val mIoU. Rows that differ only in their seed are averaged.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).parent
BEGIN, END = '<!-- results:begin -->', '<!-- results:end -->'
HEADER = """\
| network | learns from | epochs | val mIoU | test mIoU | seeds |
| --- | --- | --- | --- | --- | --- |
"""


def read_results(folder):
  """All results, teachers first, then by method."""
  files = sorted(folder.glob('*.json'))
  return [json.loads(path.read_text()) for path in files]


def teacher_label(result):
  """What a distilled row names as its teacher, with that teacher's score."""
  return f'{result["teacher"]} ({100 * result["teacher_miou"]:.1f})'


def row_key(result):
  """What rows are averaged over: everything but the seed."""
  source = 'labels'
  if result['stage'] == 'distill':
    weight = ''
    if 'attnfd' in result['method']:
      weight = f', lambda {result["attn_lambda"]:g}'
    source = f'{result["method"]}{weight}, {teacher_label(result)}'
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


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--check', action='store_true', help='Only compare; exit 1 if it differs.'
  )
  check = parser.parse_args().check
  readme = HERE.parents[1] / 'README.md'
  text = readme.read_text()
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  if not after:
    sys.exit(f'README.md lacks {BEGIN} or {END}.')
  table = make_table(read_results(HERE / 'results'))
  new = f'{before}{BEGIN}\n{table}\n{END}{after}'
  if check and new != text:
    sys.exit('README.md: the CamVid table is not what results/ gives.')
  if not check:
    readme.write_text(new)
  print(table)


if __name__ == '__main__':
  main()
