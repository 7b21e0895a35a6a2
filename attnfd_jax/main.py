# SPDX-License-Identifier: Apache-2.0
r"""Trains what is missing, distils, evaluates and writes a report.

  python -m attnfd_jax.main --config=configs/quickstart.py [--workdir=DIR] \
    [--config.optim.lr=0.02]

The same command resumes after an interruption. SIGTERM and Ctrl-C save the
last step first; the exit codes are then 143 and 130, see docs/resuming.md. For
several machines see docs/scaling.md.
"""

import os
import pathlib
import sys

from absl import flags

from attnfd_jax import cli
from attnfd_jax.devices import processes
from attnfd_jax.training import experiment
from attnfd_jax.training.stopping import Stop

cli.define_config()
flags.DEFINE_string('workdir', None, 'Folder or gs://...; else runs/NAME.')
flags.DEFINE_bool('deterministic', False, 'GPUs repeat their bits; slower.')
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0 of several.')
flags.DEFINE_integer('num_processes', None, 'Of the job; 1 is always alone.')
flags.DEFINE_integer('process_id', None, 'Of this process, from 0.')


def main():
  options = flags.FLAGS
  if options.deterministic:  # XLA reads it when JAX is first used.
    given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{given} --xla_gpu_deterministic_ops=true'
  place = ('coordinator', 'num_processes', 'process_id')
  processes.initialise(**{name: options[name].value for name in place})
  if not processes.is_first():
    sys.stdout = open(os.devnull, 'w')
  path, _, variant = options['config'].config_filename.partition(':')
  name = pathlib.Path(path).stem + (f'_{variant}' if variant else '')
  workdir = options.workdir or f'runs/{name}'
  with Stop().listening() as stop:
    results = experiment.train(options.config, workdir, stop=stop)
  print('\n'.join(experiment.summary_lines(results)))
  print(f'report: {workdir}/report.html')


if __name__ == '__main__':
  cli.run(main, required=['config'])
