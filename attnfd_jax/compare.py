# SPDX-License-Identifier: Apache-2.0
r"""One student under several methods, from one teacher: which one pays?

  python -m attnfd_jax.compare --config=configs/camvid.py \
    --methods=attnfd,kd,cwd --seeds=0,1,2 --workdir=runs/compare \
    [--equal=steps|seconds] [--tune=distill.attnfd.weight:0.3,1,3] \
    [--vary=distill.attnfd.norm_scope:batch,pixel]

Trains the teacher once, unless the config gives one, then the baseline and
every method with every seed, and writes compare.json, compare.md and
compare.html into the workdir. The same command resumes; with other methods or
seeds it adds rows to the same table; started twice, both share the work.

--equal=seconds gives a method as many steps as fit into the baseline's seconds
of training. --tune chooses on val, with --tune_seed, which no row uses; --vary
makes a row of each value. See docs/comparing.md.
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


def main():
  options = flags.FLAGS
  cli.join_processes()
  with Stop().listening() as stop:
    found = running.compare(
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
    print(f'\n{comparison_page.markdown(found)}')
    print(f'page: {options.workdir}/compare.html')


def _numbers(texts):
  try:
    return [int(text) for text in texts]
  except ValueError:
    text = ','.join(texts)
    raise InputError(f'--seeds={text}: give numbers, as 0,1,2.') from None


def _main_command(argv):
  found = ['python', '-m', 'attnfd_jax.main']
  for argument, following in itertools.pairwise([*argv[1:], '']):
    if re.match('--?config', argument):
      found.append(argument)
      if '=' not in argument and not following.startswith('-'):
        found.append(following)  # --config FILE
  return found


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
  flags.DEFINE_list('methods', None, 'Names or sums, such as attnfd,kd,kd+cwd.')
  flags.DEFINE_list('seeds', ['0'], 'Of the students, such as 0,1,2.')
  flags.DEFINE_string('equal', 'steps', 'steps or seconds.')
  flags.DEFINE_float('seconds_factor', 1.0, "Times the baseline's seconds.")
  flags.DEFINE_multi_string('tune', [], 'distill.KEY:VALUE,VALUE; best on val.')
  flags.DEFINE_multi_string('vary', [], 'distill.KEY:VALUE,VALUE; a row each.')
  flags.DEFINE_integer('tune_seed', 1000, 'Of --tune; none of --seeds.')
  cli.define_processes()
  cli.run(main, required=['config', 'methods', 'workdir'])
