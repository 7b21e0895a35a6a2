# SPDX-License-Identifier: Apache-2.0
r"""The training pipeline beside the authors' recipe in Pillow and NumPy.

  python experiments/speed/compare_data.py --config=configs/camvid.py \
    --root=PATH [--batch=16] [--threads=2] [--rounds=15] [--output=F.json]

Both run in turn in one process, by the same order of images and with the same
threads; a ratio is ours over theirs in the same round, the result the median
of the rounds. Photometric distortion, rotation, balancing and caches, which
the authors' recipe does not have, are off.
"""

import argparse
import io
import json
import pathlib
import runpy
import statistics

from absl import flags
import grain
import numpy as np
import PIL
from PIL import Image, ImageFilter, ImageOps

from attnfd_jax.benchmarks import data as benchmark
from attnfd_jax.config import resolve
from attnfd_jax.data import masks, pipeline, transforms
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.models import layers


class PilSource:
  """Records as PIL images, decoded by PIL."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if hasattr(self._source, 'pairs'):
      data = io.BytesIO(self._source.pairs[index].image.read())
      image = Image.open(data).convert('RGB')
      label = self._label(index)
    else:  # Drawn: there is nothing to decode.
      record = self._source[index]
      image, label = Image.fromarray(record['image']), record['label']
    return {'image': image, 'label': Image.fromarray(label)}

  def _label(self, index):
    read = self._source.read_label
    if not isinstance(read, masks.IndexLabels):
      return self._source.label(index)
    file = self._source.pairs[index].mask
    ids = np.asarray(Image.open(io.BytesIO(file.read())))
    return read.from_ids(file, ids)


class PilAugment(grain.transforms.RandomMap):
  """The recipe in the authors' order, of whole images and with floats.

  custom_transforms.py:50-123: flip, resize, pad, crop, blur, normalize.
  """

  def __init__(self, augment):
    self._options = augment

  def random_map(self, record, rng):
    options = self._options
    image, label = record['image'], record['label']
    if rng.random() < options.flip:
      image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    low, high = (int(x * options.base_size) for x in options.scale_range)
    short = int(rng.integers(low, high + 1))
    size = transforms.fit_short_side(image.size, short)
    image = image.resize(size, Image.Resampling.BILINEAR)
    label = label.resize(size, Image.Resampling.NEAREST)
    crop = options.crop_size[::-1]
    border = [max(c - n, 0) for c, n in zip(crop, size, strict=True)]
    if any(border):
      image = ImageOps.expand(image, (0, 0, *border), 0)
      label = ImageOps.expand(label, (0, 0, *border), options.label_fill)
    left, top = (
      int(rng.integers(n - c + 1))
      for n, c in zip(image.size, crop, strict=True)
    )
    box = (left, top, left + crop[0], top + crop[1])
    image, label = image.crop(box), label.crop(box)
    if rng.random() < options.blur:
      image = image.filter(ImageFilter.GaussianBlur(rng.random()))
    image = np.array(image).astype(np.float32) / np.float32(255)
    image -= np.array(layers.IMAGE_MEAN, np.float32)
    image /= np.array(layers.IMAGE_STD, np.float32)
    return {'image': image, 'label': np.array(label)}


def compare(config, *, rounds, seconds):
  """Prints a line for each round; returns all rounds, medians and facts.

  Args:
    config: of a file in configs/; it stays as it is.
    rounds: of both pipelines.
    seconds: of either in a round, at least.
  """
  config = config.copy_and_resolve_references()
  data = config.data
  data.photometric = data.rotation = data.balanced = 0.0
  data.cache, data.decoded_cache = False, ''
  config = resolve(config)
  dataset = load_dataset(config.data)
  ours = pipeline.configured_batches(config, dataset)
  theirs = pipeline.train_batches(
    PilSource(dataset.splits['train']),
    PilAugment(pipeline.make_augment(config)),
    batch_size=config.batch_size,
    seed=config.seed,
    threads=config.data.threads,
    workers=config.data.workers,
  )
  found = []
  for i in range(rounds):
    mine = benchmark.measure(ours, config, seconds=seconds)
    pil = benchmark.measure(theirs, config, seconds=seconds)
    rates = [x['images_per_second'] for x in (mine, pil)]
    cpus = [x['cpu_seconds_per_image'] for x in (mine, pil)]
    found.append(
      {
        'images_per_second': rates[0],
        'cpu_seconds_per_image': cpus[0],
        'pil_images_per_second': rates[1],
        'pil_cpu_seconds_per_image': cpus[1],
        'ratio': rates[0] / rates[1],
        'cpu_ratio': cpus[1] / cpus[0],
      }
    )
    if not i:  # A process' peak is never forgotten: ours alone.
      memory = mine['peak_memory_bytes']
    shown = ', '.join(f'{key} {x:.4g}' for key, x in found[-1].items())
    print(f'round {i + 1}: {shown}', flush=True)
  medians = {key: statistics.median(x[key] for x in found) for key in found[0]}
  print(f'median ratio: {medians["ratio"]:.2f}')
  facts = benchmark.describe(config, dataset)
  facts['versions'] |= {'pillow': PIL.__version__}
  return medians | facts | {'peak_memory_bytes': memory, 'rounds': found}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--config', default='configs/quickstart.py')
  parser.add_argument('--root', help='as config.data.root')
  parser.add_argument('--batch', type=int, help='as config.batch_size')
  parser.add_argument('--threads', type=int, help='as config.data.threads')
  parser.add_argument('--workers', type=int, help='as config.data.workers')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=2.0)
  parser.add_argument('--output', type=pathlib.Path)
  options = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  masks.tune_process()  # As the command `benchmark data` does.
  config = runpy.run_path(options.config)['get_config']()
  for name in ('root', 'threads', 'workers'):
    if getattr(options, name) is not None:
      config.data[name] = getattr(options, name)
  if options.batch is not None:
    config.batch_size = options.batch
  found = compare(config, rounds=options.rounds, seconds=options.seconds)
  if options.output:
    text = json.dumps(found, indent=2, sort_keys=True)
    options.output.write_text(f'{text}\n')


if __name__ == '__main__':
  main()
