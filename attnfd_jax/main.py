# SPDX-License-Identifier: Apache-2.0
r"""Trains what is missing, distils, evaluates and writes a report.

  python -m attnfd_jax.main --config=configs/quickstart.py [--workdir=DIR] \
    [--config.optim.lr=0.02]

The same command resumes after an interruption. SIGTERM and Ctrl-C save the
last step first; the exit codes are then 143 and 130, see docs/resuming.md. For
several machines see docs/scaling.md.
"""

import pathlib

from absl import flags

from attnfd_jax import cli
from attnfd_jax.training import experiment
from attnfd_jax.training.stopping import Stop

cli.define_config()
flags.DEFINE_string('workdir', None, 'Folder or gs://...; else runs/NAME.')
cli.define_processes()


def main():
  options = flags.FLAGS
  cli.join_processes()
  path, _, variant = options['config'].config_filename.partition(':')
  name = pathlib.Path(path).stem + (f'_{variant}' if variant else '')
  workdir = options.workdir or f'runs/{name}'
  with Stop().listening() as stop:
    results = experiment.train(options.config, workdir, stop=stop)
  print('\n'.join(experiment.summary_lines(results)))
  print(f'report: {workdir}/report.html')


if __name__ == '__main__':
  cli.run(main, required=['config'])
