# SPDX-License-Identifier: Apache-2.0
r"""Measures speed on this machine.

  python -m attnfd_jax.benchmark data --config=configs/camvid.py \
    [--config.data.root=PATH] [--compare] [--json]

data: how many images a second the training pipeline prepares. With --json the
last line is one JSON object.
"""

import json

from absl import flags
from ml_collections import config_flags

from attnfd_jax import cli
from attnfd_jax.benchmarks import data
from attnfd_jax.errors import InputError

# Name -> function of the flags; prints for people, returns what is JSON.
COMMANDS = {'data': data.run}


def main(argv):
  if len(argv) != 2 or argv[1] not in COMMANDS:
    given = ' '.join(argv[1:]) or 'nothing'
    raise InputError(
      f'Expected one of {", ".join(COMMANDS)}, got {given}; for example '
      'python -m attnfd_jax.benchmark data --config=configs/quickstart.py.'
    )
  result = COMMANDS[argv[1]](flags.FLAGS)
  if flags.FLAGS.json:
    print(json.dumps({'benchmark': argv[1]} | result))


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py or configs/NAME.py:VARIANT.'
  )
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
  flags.DEFINE_bool(
    'compare', False, "data: against PIL and NumPy, by the authors' recipe."
  )
  flags.DEFINE_integer('rounds', 5, 'data: the result is their median.')
  flags.DEFINE_float('seconds', 2.0, 'data: of a round, at least.')
  cli.run(main, positional=True)
