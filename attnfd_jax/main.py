# SPDX-License-Identifier: Apache-2.0
r"""Trains teacher and student, distills, evaluates and writes a report.

  python -m attnfd_jax.main --config=configs/quickstart.py [--workdir=DIR] \
    [--config.optim.lr=0.02]

Finished stages are not run again, and the same command resumes after an
interruption. SIGTERM and Ctrl-C save the last step first; the exit codes are
then 143 and 130, see docs/resuming.md. For several machines see
docs/scaling.md.
"""

import pathlib
import shlex
from typing import Any

from absl import flags

from attnfd_jax import cli
from attnfd_jax.training import experiment
from attnfd_jax.training.stopping import Stop

cli.define_config()
flags.DEFINE_string(
  'workdir', None, 'Folder or gs://...; by default runs/NAME.'
)
cli.define_processes()


def main() -> None:
  """Trains what is missing and prints the summary."""
  options = flags.FLAGS
  cli.join_processes()
  flag: Any = options['config']
  path, _, variant = flag.config_filename.partition(':')
  name = pathlib.Path(path).stem + (f'_{variant}' if variant else '')
  workdir = options.workdir or f'runs/{name}'
  with Stop().listening() as stop:
    results = experiment.train(options.config, workdir, stop=stop)
  print('\n'.join(experiment.summary_lines(results)))
  print(f'report: {workdir}/report.html')
  if results:
    split = options.config.eval.test_split or 'val'
    commands = next_commands(workdir, stage=[*results][-1], split=split)
    print('\n  '.join(['next:', *commands]))


def next_commands(workdir: str, *, stage: str, split: str) -> list[str]:
  """The commands that people usually want after a run."""
  checkpoint = f'--checkpoint={shlex.quote(f"{workdir}/{stage}")}'
  return [
    f'python -m webbrowser {shlex.quote(f"{workdir}/report.html")}',
    f'python -m attnfd_jax.evaluate {checkpoint} --split={split}',
    f'python -m attnfd_jax.export {checkpoint} --format=folder --output=export',
  ]


if __name__ == '__main__':
  cli.run(main, required=['config'])
