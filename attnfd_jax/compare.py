# SPDX-License-Identifier: Apache-2.0
r"""Compares distillation methods: one teacher, one student, one table.

  python -m attnfd_jax.compare --config=configs/camvid.py \
    --methods=attnfd,kd,cwd --seeds=0,1,2 --workdir=runs/compare \
    [--equal=steps|seconds] [--tune=distill.attnfd.weight:0.3,1,3] \
    [--vary=distill.attnfd.norm_scope:batch,pixel]

Trains the teacher once, unless the config gives one, then the baseline and
every method with every seed, and writes compare.json, compare.md and
compare.html to the workdir. The same command resumes; with other methods or
seeds it adds rows to the table; if it is started twice, both processes share
the work.

--equal=seconds gives each method the number of steps that fit into the training
time of the baseline. --tune chooses a value on val, with a seed (--tune_seed)
that no row uses; --vary adds a row for each value. See docs/comparing.md.
"""

import itertools
import re
import sys

from absl import flags

from attnfd_jax import cli
from attnfd_jax.comparison import running
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.reporting import comparison_page
from attnfd_jax.training.stopping import Stop


def main() -> None:
  """Runs the comparison and prints its table."""
  options = flags.FLAGS
  cli.join_processes()
  with Stop().listening() as stop:
    table = running.compare(
      options.config,
      options.workdir,
      methods=options.methods,
      seeds=_numbers(options.seeds),
      equal=options.equal,
      seconds_factor=options.seconds_factor,
      tune=options.tune,
      vary=options.vary,
      tune_seed=options.tune_seed,
      command=_main_command(sys.argv),
      stop=stop,
    )
  if processes.is_first():
    print(f'\n{comparison_page.markdown(table)}')
    print(f'page: {options.workdir}/compare.html')


def _numbers(texts: list[str]) -> list[int]:
  try:
    return [int(text) for text in texts]
  except ValueError:
    text = ','.join(texts)
    raise InputError(f'--seeds={text}: give numbers, as 0,1,2.') from None


def _main_command(argv: list[str]) -> list[str]:
  """The command of `main` with the same config."""
  command = ['python', '-m', 'attnfd_jax.main']
  for argument, following in itertools.pairwise([*argv[1:], '']):
    if re.match('--?config', argument):
      command.append(argument)
      if '=' not in argument and not following.startswith('-'):
        command.append(following)  # --config FILE
  return command


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
  flags.DEFINE_list('methods', None, 'Names or sums, such as attnfd,kd,kd+cwd.')
  flags.DEFINE_list('seeds', ['0'], 'Seeds of the students, such as 0,1,2.')
  flags.DEFINE_string('equal', 'steps', 'steps or seconds.')
  flags.DEFINE_float(
    'seconds_factor', 1.0, "Multiple of the baseline's training time."
  )
  flags.DEFINE_multi_string(
    'tune', [], 'distill.KEY:VALUE,VALUE; the best on val.'
  )
  flags.DEFINE_multi_string('vary', [], 'distill.KEY:VALUE,VALUE; a row each.')
  flags.DEFINE_integer('tune_seed', 1000, 'Seed of --tune; not one of --seeds.')
  cli.define_processes()
  cli.run(main, required=['config', 'methods', 'workdir'])
