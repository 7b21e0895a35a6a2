# SPDX-License-Identifier: Apache-2.0
"""Puts what a script made between two marks of a page."""

import argparse
import sys


def main(page, name, text, *, description):
  """Writes `text` into `page`; with --check it only compares.

  Args:
    page: Path with the marks <!-- name:begin --> and <!-- name:end -->.
    name: of the marks.
    text: Markdown.
    description: for --help.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    '--check', action='store_true', help='Only compare; exit 1 if it differs.'
  )
  check = parser.parse_args().check
  begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
  old = page.read_text()
  before, _, rest = old.partition(begin)
  _, _, after = rest.partition(end)
  if not after:
    sys.exit(f'{page.name} lacks {begin} or {end}.')
  new = f'{before}{begin}\n{text}\n{end}{after}'
  if check and new != old:
    sys.exit(f'{page.name}: the tables are not what results/ gives.')
  if not check:
    page.write_text(new)
  print(text)
