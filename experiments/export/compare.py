# SPDX-License-Identifier: Apache-2.0
r"""Exported students beside the networks they come from, on real images.

  python experiments/export/compare.py runs/a/student runs/b/student \
    --images=PATH/val [--output=F.json]

Writes each stage in float32 and keeps what `export` says of it: the share of
pixels with the same class, the largest difference of a logit, and milliseconds
an image beside attnfd_jax.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax

from attnfd_jax.exporting import student
from attnfd_jax.runs import logs

FOLDER = pathlib.Path(__file__).parent


def main():
  jax.config.update('jax_platforms', 'cpu')  # As the command.
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('checkpoints', nargs='+')
  parser.add_argument('--images', help='else the val split')
  parser.add_argument('--num_images', type=int, default=20)
  parser.add_argument('--formats', nargs='+', default=['stablehlo', 'onnx'])
  output = FOLDER / 'results' / 'agreement.json'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  options = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for checkpoint in options.checkpoints:
      for kind in options.formats:
        lines = student.export_student(
          checkpoint,
          pathlib.Path(folder) / f'student.{kind}',
          kind=kind,
          images=options.images,
          num_images=options.num_images,
          overwrite=True,
        )
        # Places of this machine say nothing.
        for path in filter(None, (folder, checkpoint, options.images)):
          lines = [x.replace(path, pathlib.Path(path).name) for x in lines]
        print('\n'.join(lines), flush=True)
        rows.append({'format': kind, 'lines': lines})
  found = {
    'command': [pathlib.Path(arg).name for arg in sys.argv],
    'device': logs.device_name(),
    'versions': logs.versions(),
    'rows': rows,
  }
  options.output.parent.mkdir(parents=True, exist_ok=True)
  options.output.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
