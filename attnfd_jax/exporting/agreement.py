# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file finds what its network finds, on real images."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from attnfd_jax import metrics
from attnfd_jax.data import sources
from attnfd_jax.data import transforms
from attnfd_jax.data.synthetic import StreetScenes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import fresh_process as exported
from attnfd_jax.inference import evaluation
from attnfd_jax.inference import image_files
from attnfd_jax.inference import predictor

# Smaller images have maps of single pixels.
SMALLEST = 32
# What is compared: a few images, and no more pixels than fit on any disk.
NUM_IMAGES, _NUM_PIXELS = 8, 1 << 22
# The least share of pixels that have the same class.
AGREEMENT = 0.9999


def short_side_of(info):
  return predictor.seen_short_side(
    info['eval']['protocol'], info['eval'].get('short_side', 0)
  )


def val_source(info):
  """The val split of a stage's data set, or None if it is not here."""
  try:
    return sources.load_dataset(info['data']).splits.get('val') or None
  except (InputError, OSError):
    return None


def find_images(pattern, info, count=NUM_IMAGES):
  """A few real images as the network sees them, and a text that names them.

  Args:
    pattern: a file, a folder or a glob; by default images of the val split,
      and if that is not here, drawn scenes.
    info: of the stage.
    count: how many, at most.

  Raises:
    InputError: if there are none, or one cannot be used.
  """
  short_side = short_side_of(info)
  if pattern:
    try:
      paths = image_files.find_images(pattern)
    except InputError as error:
      text = str(error).replace('--input', '--images')
      raise InputError(text) from error
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths)))
    images = [sources.read_image(paths[round(i)]) for i in chosen]
    images = [transforms.fit_image(x, short_side) for x in images]
    name = f'images of {pattern}'
  elif source := val_source(info):
    records = evaluation.chosen_records(source, count, short_side=short_side)
    images = [record['image'] for record in records]
    name = f'images of the val split of {info["data"]["name"]}'
  else:
    height = max(short_side or 240, SMALLEST)
    scenes = StreetScenes(count, height=height, width=2 * height, seed=0)
    images = [scenes[i]['image'] for i in range(count)]
    name = (
      f'drawn scenes ({info["data"]["name"]} cannot be read here; name real '
      'images by --images)'
    )
  h, w = np.min([x.shape[:2] for x in images], 0)
  if min(h, w) < SMALLEST:
    raise InputError(
      f'The {name} are {h}x{w} for the network; name some of at least '
      f'{SMALLEST}x{SMALLEST} by --images.'
    )
  largest = max(x[..., 0].size for x in images)
  most = int(np.clip(_NUM_PIXELS // largest, 1, len(images)))
  return images[:most], f'{most} {name}'


def make_batches(images):
  """Each image, and two of another size as one batch."""
  h, w = (max(n * 7 // 8, SMALLEST) for n in images[0].shape[:2])
  part = images[0][:h, :w]
  return [*(x[None] for x in images), np.stack([part, part[:, ::-1]])]


def run_fresh(kind, path, images, options):
  """What a file makes of images in a process of its own, and the seconds.

  Args:
    kind: a key of FORMATS.
    path: of the file.
    images: list of arrays [b, h, w, 3].
    options: of DeepLabV3Plus, for the formats of PyTorch.

  Raises:
    InputError: if it cannot be loaded or run.
  """
  package = pathlib.Path(exported.__file__)
  paths = [str(package.parents[1]), os.environ.get('PYTHONPATH', '')]
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_TRACEBACK_FILTERING': 'off',  # Errors end in what is wrong.
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
  }
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for i, image in enumerate(images):
      np.save(folder / f'{i}.npy', image)
    # Without its own folder among the places of modules.
    arguments = (kind, path, folder, json.dumps(options))
    process = subprocess.run(
      [sys.executable, '-P', package, *map(str, arguments)],
      capture_output=True,
      text=True,
      env=environment,
      check=False,
    )
    if process.returncode:
      lines = process.stderr.strip().splitlines() or ['it was killed']
      raise InputError(
        f'The {kind} file cannot be run by a fresh process: {lines[-1]}'
      )
    found = [np.load(folder / f'{i}_found.npy') for i in range(len(images))]
    return found, json.loads((folder / 'seconds.json').read_text())


def compare(expected, found):
  """Largest difference of logits, largest logit, share of equal classes.

  Args:
    expected, found: lists of float logits [b, h, w, k], or of class ids [b, h,
      w], whose differences are not counted.

  Returns:
    the three, and the number of classes that are expected somewhere.
  """
  difference, largest, same, total, seen = 0.0, 0.0, 0, 0, set()
  for ours, theirs in zip(expected, found, strict=True):
    if ours.shape != theirs.shape:
      raise InputError(
        f'The file finds {theirs.shape}, the network {ours.shape}.'
      )
    if np.issubdtype(ours.dtype, np.floating):
      # NaN stays NaN: np.maximum passes it on, max does not.
      difference = np.maximum(difference, np.max(np.abs(ours - theirs)))
      largest = np.maximum(largest, np.max(np.abs(ours)))
      ours, theirs = ours.argmax(-1), theirs.argmax(-1)
    same += np.sum(ours == theirs)
    total += ours.size
    seen |= {*np.unique(ours).tolist()}
  return float(difference), float(largest), float(same / total), len(seen)


def check(expected, found, text):
  """A line about it; raises InputError if they do not agree."""
  difference, largest, share, num_classes = compare(expected, found)
  words = [f'same class at {100 * share:.4f} % of the pixels']
  if np.issubdtype(expected[0].dtype, np.floating):
    words = [
      f'largest logit difference {difference:.2g} at logits up to '
      f'{largest:.3g}',
      *words,
    ]
  line = f'{text}: {", ".join(words)}; {num_classes} classes occur'
  if share < AGREEMENT or not np.isfinite(difference):
    raise InputError(
      f'{line}; less than {100 * AGREEMENT:g} % or not finite, so nothing was '
      'kept.'
    )
  return line


def miou(network, variables, source, info):
  """mIoU of float32 variables on a source, as the stage was scored."""
  options = info['eval']
  counts = evaluation.evaluate(
    network,
    variables,
    source,
    num_classes=network.num_classes,
    mesh=sharding.make_mesh(),
    protocol=options['protocol'],
    short_side=options.get('short_side', 0),
    batch_size=options['batch_size'],
    size_multiple=options['size_multiple'],
    threads=info['data']['threads'],
  )
  return metrics.mean_iou(counts)


def describe_loss(exact, found, weights):
  difference, _, share, _ = compare(exact, found)
  words = f'Rounding to {weights}: same class at {100 * share:.3f} %'
  if difference:
    words += f', largest logit difference {difference:.2g}'
  return words
