# SPDX-License-Identifier: Apache-2.0
r"""Trains what is missing, distils, evaluates and writes a report.

  python -m attnfd_jax.main --config=configs/quickstart.py [--workdir=DIR] \
    [--config.optim.lr=0.02]

The same command goes on after an interruption. SIGTERM and Ctrl-C save the
last step first; the exit codes are then 143 and 130, see docs/resuming.md. For
several machines see docs/scaling.md.
"""

import contextlib
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from attnfd_jax import cli
from attnfd_jax.devices import processes
from attnfd_jax.reporting.page import write_report
from attnfd_jax.training import stages
from attnfd_jax.training.stopping import Stop

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'configs/NAME.py or configs/NAME.py:VARIANT.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; runs/NAME by default.'
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


def _default_workdir():
  path, _, variant = flags.FLAGS['config'].config_filename.partition(':')
  name = pathlib.Path(path).stem
  return pathlib.Path('runs') / (f'{name}_{variant}' if variant else name)


def main(argv):
  del argv
  if DETERMINISTIC.value:
    cli.make_deterministic()
  processes.initialise(
    coordinator=COORDINATOR.value,
    num_processes=NUM_PROCESSES.value,
    process_id=PROCESS_ID.value,
  )
  cli.enable_compilation_cache()
  workdir = pathlib.Path(WORKDIR.value or _default_workdir())
  with Stop().listening() as stop:
    _run(workdir, stop)


def _run(workdir, stop):
  if not processes.is_first():
    with open(os.devnull, 'w') as quiet, contextlib.redirect_stdout(quiet):
      stages.run(CONFIG.value, workdir, stop=stop)
    return
  results = stages.run(CONFIG.value, workdir, stop=stop)
  write_report([workdir], workdir / 'report.html')
  for name, result in results.items():
    test = result.get('test')
    print(
      f'{name:8} {result["network"]:20} val mIoU {100 * result["miou"]:6.2f}'
      + (f'   test mIoU {100 * test["miou"]:6.2f}' if test else '')
    )
  print(f'report: {workdir / "report.html"}')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
