# SPDX-License-Identifier: Apache-2.0
"""Copies the numbers of finished stages into results/, for make_table.py.

  python experiments/camvid/collect.py --group=cpu runs/seed0/* runs/seed1/*

`--group` is a key of groups.json. Each file is the stage's result.json with its
command, number of epochs and curve of val mIoU.
"""

import argparse
import json
import pathlib
import re

from make_table import method_of

HERE = pathlib.Path(__file__).parent


def read_stage(folder, group):
  """The entry of a finished stage."""
  result = json.loads((folder / 'result.json').read_text())
  environment = json.loads((folder / 'environment.json').read_text())
  config = json.loads((folder / 'config.json').read_text())
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  role = 'teacher' if result['stage'] == 'teacher' else 'student'
  if role == 'teacher':
    result['in_path_attention'] = config['teacher']['in_path_attention']
  return result | {
    'group': group,
    'command': ['python', '-m', 'attnfd_jax.main', *environment['command'][1:]],
    'num_epochs': config[role]['num_epochs'],
    'curve': [
      {'step': entry['step'], 'miou': round(entry['miou'], 5)}
      for entry in map(json.loads, lines)
      if 'miou' in entry
    ],
  }


def file_name(entry):
  """E.g. 'cpu_attnfd_resnet18_x0.25_lambda0.3_seed1.json'."""
  source, weight = entry['stage'], None
  if source == 'distill':
    source, weight = method_of(entry)
  parts = [entry['group'], source, entry['network']]
  if weight is not None:
    parts.append(f'lambda{weight:g}')
  name = '_'.join([*parts, f'seed{entry["seed"]}'])
  return re.sub(r'[^\w.+]+', '_', name) + '.json'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folders', nargs='+', type=pathlib.Path)
  parser.add_argument('--group', required=True)
  options = parser.parse_args()
  for folder in options.folders:
    if not (folder / 'result.json').is_file():
      continue
    entry = read_stage(folder, options.group)
    path = HERE / 'results' / file_name(entry)
    path.write_text(json.dumps(entry, indent=1, sort_keys=True) + '\n')
    print(path.name)


if __name__ == '__main__':
  main()
