# SPDX-License-Identifier: Apache-2.0
r"""Says whether this machine is ready for training, and what to do if not.

  python -m attnfd_jax.doctor [--workdir=DIR]

Versions, devices and why there are no faster ones, memory, disk, and a
convolution forward and backward on each device. Exit code 1 if something is
wrong.
"""

import sys

from absl import flags

from attnfd_jax import cli
from attnfd_jax.devices import diagnosis


def main():
  problems = 0
  for finding in diagnosis.find_all(flags.FLAGS.workdir):
    problems += bool(finding.remedy)
    print(f'{"WRONG" if finding.remedy else "ok   "} {finding.text}')
    if finding.remedy:
      print(f'      -> {finding.remedy}', flush=True)
  if problems:
    print(f'{problems} problem{"s" * (problems > 1)} found.')
    sys.exit(1)
  print('Ready.')


if __name__ == '__main__':
  # Not at import: main has a --workdir of its own.
  flags.DEFINE_string('workdir', 'runs', 'Folder in which runs will be.')
  cli.run(main)
