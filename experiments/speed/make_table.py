# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/speed.md from the JSON files in results/.

python experiments/speed/make_table.py [--check]
"""

import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fill_page  # noqa: E402

FORMS = {
  'authors': "PyTorch as the authors' code runs it",
  'no_teacher_gradients': 'the same without gradients of the teacher',
  'best': 'PyTorch at its best',
  'predict': 'PyTorch, eager',
}
HEADER = """\
| student | recipe | compared with | PyTorch (s) | ours (s) | speedup | \
rounds | relative memory |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def middle(rounds, *path):
  """Median over the rounds of the value at `path`."""
  values = []
  for entry in rounds:
    for key in path:
      entry = entry[key]
    values.append(entry)
  return statistics.median(values)


def title_of(ours):
  height, width = ours['image_size']
  return (
    f'{ours["device"]}, {ours.get("batch_size", 1)} x {height} x {width}, '
    f'{ours["dtype"]} (jax {ours["versions"]["jax"]}'
  )


def rows_of(student, found):
  rounds, text = found['rounds'], ''
  for key, ratio in found['ratios'].items():
    recipe, form = key.split(', ')
    theirs = middle(rounds, 'peers', form, 'step_seconds')
    ours = middle(rounds, 'ours', recipe, 'step_seconds')
    times = f'{ratio["median"]:.2f}'
    if len(rounds) > 1:
      times += f' ({ratio["lowest"]:.2f} to {ratio["highest"]:.2f})'
    memory = rounds[0]['peers'][form]['peak_memory_bytes']
    share = ''
    if memory:
      share = f'{rounds[0]["ours"][recipe]["peak_memory_bytes"] / memory:.2f}'
    text += (
      f'| {student} | {recipe} | {FORMS[form]} | {theirs:.3g} | {ours:.3g} '
      f'| {times} | {len(rounds)} | {share} |\n'
    )
  return text


def make_tables(folder):
  """Markdown, one table for each machine."""
  text = ''
  for path in sorted(folder.glob('*.json')):
    results = json.loads(path.read_text())
    rounds = next(iter(results.values()))['rounds']
    ours = next(iter(rounds[0]['ours'].values()))
    torch = next(iter(rounds[0]['peers'].values()))['versions']['torch']
    text += f'\n{title_of(ours)}, torch {torch}):\n\n{HEADER}'
    for student, found in results.items():
      text += rows_of(student, found)
    if 'GPU' in ours['device'] or 'NVIDIA' in ours['device']:
      share = ours['flop_utilization']
      text += f'\nThat is {share:.0%} of the measured matmul throughput.\n'
  return text


if __name__ == '__main__':
  fill_page.main(
    HERE.parents[1] / 'docs' / 'speed.md',
    'speed',
    make_tables(HERE / 'results'),
    description=__doc__,
  )
