# SPDX-License-Identifier: Apache-2.0
"""Copies the compare.json of a comparison into results/, for make_table.py.

  python experiments/methods/collect.py runs/facade facade/2026-11-29.json

Paths of this machine become PATH, and RUN for the folder of the comparison.
"""

import argparse
import json
import pathlib
import re

HERE = pathlib.Path(__file__).parent


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('target', help='Below results/.')
  options = parser.parse_args()
  text = (options.folder / 'compare.json').read_text()
  text = text.replace(str(options.folder.resolve()), 'RUN')
  # A path of at least two parts, in a string or after a flag's equals sign.
  text = re.sub(r'(?<=["=])(/[\w.-]+){2,}', 'PATH', text)
  target = HERE / 'results' / options.target
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text(json.dumps(json.loads(text), indent=1) + '\n')
  print(target)


if __name__ == '__main__':
  main()
