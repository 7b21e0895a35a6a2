# SPDX-License-Identifier: Apache-2.0
r"""Writes one HTML page that compares finished runs.

  python -m attnfd_jax.report runs/a [runs/b ...] --output=report.html

The page is made from the files in the run folders alone and opens offline. Runs
that differ only in their seed are also summarized as mean and standard
deviation.
"""

from absl import flags

from attnfd_jax import cli
from attnfd_jax.errors import InputError
from attnfd_jax.reporting.page import write_report


def main(*folders: str) -> None:
  """Writes the page."""
  if not folders:
    raise InputError(
      'No run folder: give one or more, such as runs/quickstart.'
    )
  write_report(folders, flags.FLAGS.output)
  print(f'Wrote {flags.FLAGS.output}')


if __name__ == '__main__':
  flags.DEFINE_string('output', 'report.html', 'The page to write.')
  cli.run(main, positional=True)
