# SPDX-License-Identifier: Apache-2.0
r"""Packs a data set into ArrayRecord shards that train the same way.

  python -m attnfd_jax.prepare_data --config=configs/cityscapes.py \
    --target=DIR [--workers=N]

Every pair is checked on the way. After an interruption the same command resumes
with the first unfinished shard. Train from it with --config.data.prepared=DIR.
"""

import pathlib

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import prepared
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError


def main():
  options = flags.FLAGS
  config = resolve(options.config)
  if config.data.prepared:
    raise InputError('config.data.prepared is set: this is prepared already.')
  config.data.cache = False  # Every pair is read once.
  dataset, target = load_dataset(config.data), pathlib.Path(options.target)
  for note in dataset.notes:
    print(note)
  folder, counts = prepared.prepare(dataset, target, workers=options.workers)
  found = ', '.join(f'{split} {count}' for split, count in counts.items())
  print(f'{folder}: {found} records')
  print(f'train from it: --config.data.prepared={options.target}')


if __name__ == '__main__':
  cli.define_config()
  flags.DEFINE_string('target', None, 'Folder to write to.')
  flags.DEFINE_integer('workers', 4, 'Threads that read and pack.', 1)
  cli.run(main, required=['config', 'target'])
