# SPDX-License-Identifier: Apache-2.0
r"""Copies the compare.json of a comparison into the repository.

  python experiments/collect_comparison.py runs/facade \
    experiments/methods/results/facade/2026-11-29.json

Paths of this machine become PATH, and RUN for the folder of the comparison.
"""

import argparse
import json
import pathlib
import re


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('target', type=pathlib.Path)
  options = parser.parse_args()
  text = (options.folder / 'compare.json').read_text()
  text = text.replace(str(options.folder.resolve()), 'RUN')
  # A path of at least two parts, in a string or after a flag's equals sign.
  text = re.sub(r'(?<=["=])(/[\w.-]+){2,}', 'PATH', text)
  options.target.parent.mkdir(parents=True, exist_ok=True)
  options.target.write_text(json.dumps(json.loads(text), indent=1) + '\n')


if __name__ == '__main__':
  main()
