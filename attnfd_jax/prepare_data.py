# SPDX-License-Identifier: Apache-2.0
r"""Packs a data set into ArrayRecord shards that train the same way.

  python -m attnfd_jax.prepare_data --config=configs/cityscapes.py \
    --target=DIR [--workers=N]

Every pair is checked on the way. Interrupted, the same command goes on with the
first unfinished shard. Train from it with --config.data.prepared=DIR.
"""

import concurrent.futures
import pathlib
import shutil
import threading

from absl import flags
from ml_collections import config_flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import prepared
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress


def prepare(dataset, target, *, workers):
  """Writes a TFDS data set below `target`.

  Args:
    dataset: Dataset of files.
    target: folder.
    workers: threads; decoding and encoding release the interpreter lock.

  Returns:
    Its folder, and {split: number of records}.

  Raises:
    DataError: names the first file that cannot be used. Finished shards stay.
    InputError: if the data set cannot be prepared or is there already.
  """
  for source in dataset.splits.values():
    if not hasattr(source, 'encoded'):
      raise InputError(
        f'{dataset.name} is not a data set of files: nothing to prepare.'
      )
  done = target / dataset.name / prepared.VERSION
  if done.exists():
    raise InputError(f'{done} exists; remove it, or give another --target.')
  staged = target / f'.{dataset.name}.shards'
  staged.mkdir(parents=True, exist_ok=True)
  total = sum(len(source) for source in dataset.splits.values())
  lock = threading.Lock()
  with (
    progress(total, dataset.name) as bar,
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):

    def advance(count):
      with lock:
        bar.update(count)

    futures = {}
    for split, source in dataset.splits.items():
      bounds = prepared.shards(source)
      paths = [
        staged / f'{split}-{i:05d}.array_record' for i in range(len(bounds))
      ]
      futures[split] = [
        (
          path,
          pool.submit(
            prepared.write_shard,
            source,
            part,
            path,
            advance,
          ),
        )
        for path, part in zip(paths, bounds, strict=True)
      ]
    try:
      splits = {
        split: [(path, future.result()) for path, future in parts]
        for split, parts in futures.items()
      }
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  folder = prepared.finish(dataset, splits, staged, target)
  shutil.rmtree(staged)
  return folder, {
    split: sum(note['count'] for _, note in parts)
    for split, parts in splits.items()
  }


def main(argv):
  del argv
  options = flags.FLAGS
  if not options.target:
    raise InputError('--target is missing; name the folder to write to.')
  if options.workers < 1:
    raise InputError(f'--workers={options.workers} must be positive.')
  config = resolve(options.config)
  if config.data.prepared:
    raise InputError('config.data.prepared is set: this is prepared already.')
  with config.unlocked():
    config.data.cache = False  # Every pair is read once.
  dataset = load_dataset(config.data)
  folder, counts = prepare(
    dataset, pathlib.Path(options.target), workers=options.workers
  )
  found = ', '.join(f'{split} {count}' for split, count in counts.items())
  print(f'{folder}: {found} records')
  print(f'train from it: --config.data.prepared={options.target}')


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py or configs/NAME.py:VARIANT.'
  )
  flags.DEFINE_string('target', None, 'Folder to write to.')
  flags.DEFINE_integer('workers', 4, 'Threads that read and pack.')
  flags.mark_flag_as_required('config')
  cli.run(main)
