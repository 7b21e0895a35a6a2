# SPDX-License-Identifier: Apache-2.0
r"""Measures the speed of training, data loading and prediction.

  python -m attnfd_jax.benchmark train [--config=configs/camvid.py] \
    [--student=resnet18] [--teacher=resnet101] [--batch=16] [--json]
  python -m attnfd_jax.benchmark data --config=configs/camvid.py \
    [--config.data.root=PATH] [--json]

train: time of a training step, memory, compilation time and utilization.
Without --teacher_checkpoint the teacher has random weights; --method=none
trains without one. data: images per second that the training pipeline prepares.
predict: time from an image to its class ids, with --student, --height and
--width as for train. With --json the last line is one JSON object.
"""

import json

from absl import flags

from attnfd_jax import cli
from attnfd_jax.benchmarks import data, predict, train
from attnfd_jax.errors import InputError

# Functions of the flags, which print a summary and return the JSON.
COMMANDS = {'train': train.run, 'data': data.run, 'predict': predict.run}


def main(*given: str) -> None:
  """Runs the benchmark named by the first argument."""
  if len(given) != 1 or given[0] not in COMMANDS:
    names, got = ', '.join(COMMANDS), ' '.join(given) or 'nothing'
    raise InputError(f'Expected one of {names} after benchmark, got {got}.')
  result = COMMANDS[given[0]](flags.FLAGS)
  if flags.FLAGS.json:
    print(json.dumps({'benchmark': given[0]} | result))


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
  for name, key in train.FLAGS.items():
    flags.DEFINE_string(name, '', f'train: replaces config.{key}.')
  for name in ('batch', 'height', 'width'):
    flags.DEFINE_integer(name, 0, 'train: of the images; 0: as in the config.')
  flags.DEFINE_string('trace', '', 'train: folder for a profile of the steps.')
  flags.DEFINE_integer('num_classes', 21, 'train: number of classes.')
  flags.DEFINE_integer('steps', 10, 'train: steps to take the median of.')
  flags.DEFINE_integer('rounds', 5, 'data: rounds to take the median of.')
  flags.DEFINE_float('seconds', 2.0, 'data: minimum duration of a round.')
  cli.run(main, positional=True)
