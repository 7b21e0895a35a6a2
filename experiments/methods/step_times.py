# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step of each method, ResNet-101 to ResNet-18 at 2 x 257 x 257.

  python experiments/methods/step_times.py results/step_times.json

Each method is measured by `benchmark train --method=...`, right after `attnfd`
in the same way: the ratio is to that. Half an hour on two idle cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from attnfd_jax.distill import METHODS

FLAGS = ('--student=resnet18', '--teacher=resnet101', '--batch=2')
FLAGS += ('--height=257', '--width=257', '--steps=10', '--json')


def measure(method):
  command = [sys.executable, '-m', 'attnfd_jax.benchmark', 'train', *FLAGS]
  command.append(f'--method={method}')
  text = subprocess.run(command, capture_output=True, text=True, check=True)
  return json.loads(text.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('output', type=pathlib.Path)
  output, rows = parser.parse_args().output, {}
  for method in ('none', *METHODS):
    base, found = measure('attnfd'), measure(method)
    rows[method] = {
      'step_seconds': found['step_seconds'],
      'over_attnfd': found['step_seconds'] / base['step_seconds'],
      'memory_bytes': found['peak_memory_bytes'],
    }
    print(method, rows[method], flush=True)
  keys = ('student', 'teacher', 'batch_size', 'image_size', 'dtype', 'recipe')
  facts = {key: found[key] for key in (*keys, 'device', 'versions')}
  output.write_text(json.dumps(facts | {'methods': rows}, indent=1) + '\n')


if __name__ == '__main__':
  main()
