# SPDX-License-Identifier: Apache-2.0
r"""Packs a data set into ArrayRecord shards for faster reading.

  python -m attnfd_jax.prepare_data --config=configs/cityscapes.py \
    --target=DIR [--workers=N]

Every pair is checked. After an interruption, the same command resumes at the
first unfinished shard. Train with --config.data.prepared=DIR; the results are
the same.
"""

import pathlib

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import prepared
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError


def main() -> None:
  """Writes the shards and prints their record counts."""
  options = flags.FLAGS
  config = resolve(options.config)
  if config.data.prepared:
    raise InputError(
      'config.data.prepared is set: the data is already prepared.'
    )
  config.data.cache = False  # Each pair is read only once.
  dataset, target = load_dataset(config.data), pathlib.Path(options.target)
  for note in dataset.notes:
    print(note)
  folder, counts = prepared.prepare(dataset, target, workers=options.workers)
  records = ', '.join(f'{split} {count}' for split, count in counts.items())
  print(f'{folder}: {records} records')
  print(f'to train: --config.data.prepared={options.target}')


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_string('target', None, 'Folder to write to.')
  flags.DEFINE_integer('workers', 4, 'Number of threads.', 1)
  cli.run(main, required=['config', 'target'])
