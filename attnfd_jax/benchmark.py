# SPDX-License-Identifier: Apache-2.0
r"""Measures speed on this machine.

  python -m attnfd_jax.benchmark train [--config=configs/camvid.py] \
    [--student=resnet18] [--teacher=resnet101] [--batch=16] [--json]
  python -m attnfd_jax.benchmark data --config=configs/camvid.py \
    [--config.data.root=PATH] [--json]

train: seconds of a training step, its memory, its compilation and the share of
what the device can do. A teacher without --teacher_checkpoint has random
weights; --method=none is without one. data: how many images a second the
training pipeline prepares. predict: seconds from an image to its class ids,
with --student, --height and --width as for train. With --json the last line is
one JSON object.
"""

import json

from absl import flags

from attnfd_jax import cli
from attnfd_jax.benchmarks import data, predict, train
from attnfd_jax.errors import InputError

# Name -> function of the flags; prints for people, returns what is JSON.
COMMANDS = {'train': train.run, 'data': data.run, 'predict': predict.run}


def main(*given):
  if len(given) != 1 or given[0] not in COMMANDS:
    names, found = ', '.join(COMMANDS), ' '.join(given) or 'nothing'
    raise InputError(f'Expected one of {names} after benchmark, got {found}.')
  result = COMMANDS[given[0]](flags.FLAGS)
  if flags.FLAGS.json:
    print(json.dumps({'benchmark': given[0]} | result))


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
  for name, key in train.FLAGS.items():
    flags.DEFINE_string(name, '', f'train: in place of config.{key}.')
  for name in ('batch', 'height', 'width'):
    flags.DEFINE_integer(name, 0, 'train: of the images; 0 is as the config.')
  flags.DEFINE_string('trace', '', 'train: folder for a profile of the steps.')
  flags.DEFINE_integer('num_classes', 21, 'train: of both networks.')
  flags.DEFINE_integer('steps', 10, 'train: the result is their median.')
  flags.DEFINE_integer('rounds', 5, 'data: the result is their median.')
  flags.DEFINE_float('seconds', 2.0, 'data: of a round, at least.')
  cli.run(main, positional=True)
