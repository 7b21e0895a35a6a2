# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/camvid_curves.png from the curves in results/cpu_*.json.

python experiments/camvid/make_figure.py
"""

import collections
import json
import pathlib

from make_table import method_of
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
TARGET = HERE.parents[1] / 'docs' / 'images' / 'camvid_curves.png'
STEPS_PER_EPOCH = 367 / 16
LOOKS = {
  'labels alone': ('#777777', ':'),
  'KD': ('#c26a00', '--'),
  'AttnFD': ('#0b6cb0', '-'),
}


def read_curves(folder):
  """{what the student learns from: [[(epoch, val mIoU in percent)]]}."""
  names = {'kd': 'KD', 'attnfd': 'AttnFD'}
  curves = collections.defaultdict(list)
  for path in sorted(folder.glob('cpu_*.json')):
    result = json.loads(path.read_text())
    if result['stage'] == 'teacher':
      continue
    distilled = result['stage'] == 'distill'
    name = names[method_of(result)[0]] if distilled else 'labels alone'
    curves[name].append(
      [
        (point['step'] / STEPS_PER_EPOCH, 100 * point['miou'])
        for point in result['curve']
        if point['step']  # At step 0 stands the score of the teacher.
      ]
    )
  return curves


def main():
  curves = read_curves(HERE / 'results')
  figure = Figure(figsize=(6, 3.6), layout='constrained')
  axes = figure.subplots()
  for name, (color, line) in LOOKS.items():
    for i, curve in enumerate(curves[name]):
      label = f'{name}, {len(curves[name])} seeds' if i == 0 else None
      axes.plot(*zip(*curve, strict=True), line, color=color, label=label)
  axes.set(xlabel='epoch', ylabel='val mIoU, %')
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(TARGET, dpi=110)


if __name__ == '__main__':
  main()
