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

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, or gs://...; runs/NAME by default.'
)
DETERMINISTIC = flags.DEFINE_bool(
  'deterministic', False, 'On a GPU: kernels that repeat their bits, slower.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, if there are several.'
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'In the whole job; 1 is alone, even on a cluster.'
)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Of this one, from 0.')


def main():
  if DETERMINISTIC.value:  # XLA reads it when JAX is first used.
    given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{given} --xla_gpu_deterministic_ops=true'
  processes.initialise(
    coordinator=COORDINATOR.value,
    num_processes=NUM_PROCESSES.value,
    process_id=PROCESS_ID.value,
  )
  if not processes.is_first():
    sys.stdout = open(os.devnull, 'w')
  path, _, variant = flags.FLAGS['config'].config_filename.partition(':')
  name = pathlib.Path(path).stem + (f'_{variant}' if variant else '')
  workdir = WORKDIR.value or f'runs/{name}'
  with Stop().listening() as stop:
    results = experiment.train(CONFIG.value, workdir, stop=stop)
  for line in experiment.summary_lines(results):
    print(line)
  print(f'report: {workdir}/report.html')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
