# SPDX-License-Identifier: Apache-2.0
r"""Checks whether this machine is ready for training.

  python -m attnfd_jax.doctor [--workdir=DIR]

Reports versions, devices (and why an accelerator is not used), memory and disk,
and runs a convolution forward and backward on each device. Each problem comes
with a remedy, and the exit code is then 1.
"""

import sys

from absl import flags

from attnfd_jax import cli
from attnfd_jax.devices import diagnosis
from attnfd_jax.runs import logs


def main() -> None:
  """Prints the findings and exits with 1 if there is a problem."""
  problems = 0
  for finding in diagnosis.find_all(flags.FLAGS.workdir):
    problems += bool(finding.remedy)
    print(f'{"WRONG" if finding.remedy else "ok   "} {finding.text}')
    if finding.remedy:
      print(f'      -> {finding.remedy}', flush=True)
  if problems:
    print(f'{logs.count_text(problems, "problem")} found.')
    sys.exit(1)
  print('Ready.')


if __name__ == '__main__':
  # Not at import: main has a --workdir of its own.
  flags.DEFINE_string('workdir', 'runs', 'Folder of the runs.')
  cli.run(main)
