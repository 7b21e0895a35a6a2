# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file finds what its network finds, on real images."""

import json
import operator
import os
import subprocess
import sys
import tempfile

from flax import traverse_util
import numpy as np

from attnfd_jax import metrics
from attnfd_jax.data import masks, sources, transforms
from attnfd_jax.data.synthetic import StreetScenes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import fresh_process
from attnfd_jax.exporting.stablehlo import SMALLEST
from attnfd_jax.inference import evaluation, image_files
from attnfd_jax.pytorch import files, names

# What is compared: a few images, and no more pixels than fit on any disk.
NUM_IMAGES, _NUM_PIXELS = 8, 1 << 22
AGREEMENT = 0.9999  # The least share of pixels that have the same class.


def split_source(info, split='val'):
  """A split of a stage's data set, or None if it is not here."""
  try:
    data = sources.load_dataset(info['data'], splits=(split,))
    return data.splits.get(split)
  except (InputError, OSError):
    return None


def spread(source, count, *, read, short_side):
  """At most `count` images, uint8 [h, w, 3], spread evenly over a source, as
  the network sees them.
  """
  chosen = np.linspace(0, len(source) - 1, min(count, len(source)))
  images = (read(source[round(i)]) for i in chosen)
  return [transforms.fit_image(x, short_side) for x in images]


def check_sizes(images, name, *, option):
  """Raises InputError if some are smaller than what a network can see."""
  h, w = np.min([x.shape[:2] for x in images], 0)
  if min(h, w) < SMALLEST:
    problem = f'The {name} are {h}x{w} for the network'
    remedy = f'name some of at least {SMALLEST}x{SMALLEST} by {option}'
    raise InputError(f'{problem}; {remedy}.')


def make_batches(pattern, info, *, short_side, count):
  """At most `count` images as the network sees them, uint8 [1, h, w, 3], two of
  another size as the last batch, and a text that names them.

  They are those of a file, a folder or a glob; by default of the val split, and
  if that is not here, drawn scenes.
  """
  dataset, read = info['data']['name'], operator.itemgetter('image')
  if pattern:
    name, read = f'images of {pattern}', masks.read_image
    source = [*image_files.find_images(pattern, option='--images').values()]
  elif source := split_source(info):
    name = f'images of the val split of {dataset}'
  else:
    name = f'drawn scenes ({dataset} cannot be read here; see --images)'
    height = max(short_side or 240, SMALLEST)
    source = StreetScenes(count, height=height, width=2 * height, seed=0)
  images = spread(source, count, read=read, short_side=short_side)
  check_sizes(images, name, option='--images')
  largest = max(x[..., 0].size for x in images)
  images = images[: max(_NUM_PIXELS // largest, 1)]
  h, w = (max(n * 7 // 8, SMALLEST) for n in images[0].shape[:2])
  part = images[0][:h, :w]
  other = np.stack([part, part[:, ::-1]])
  return [*(x[None] for x in images), other], f'{len(images)} {name}'


def run_fresh(kind, path, images, options):
  """What `fresh_process` finds and measures, run as a process of its own."""
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_TRACEBACK_FILTERING': 'off',  # Errors end in what is wrong.
    'PYTHONPATH': os.pathsep.join(map(os.path.abspath, sys.path)),
  }
  with tempfile.TemporaryDirectory() as folder:
    np.savez(f'{folder}/images.npz', *images)
    command = [sys.executable, '-P', fresh_process.__file__]
    command += [kind, path, folder, json.dumps(options)]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode:
      lines = ['it was killed', *process.stderr.strip().splitlines()]
      problem = f'The {kind} file cannot be run by a fresh process'
      raise InputError(f'{problem}: {lines[-1]}')
    with np.load(f'{folder}/found.npz') as arrays:
      *found, seconds = arrays.values()
    return found, seconds


def require_equal(variables, tensors):
  """InputError unless {name: array}, with names of names.flatten, has all
  variables bit for bit.
  """
  for name, array in names.flatten(variables).items():
    if not np.array_equal(array, tensors.get(name), equal_nan=True):
      raise InputError(f'{name} is not in the file as it is in the network.')


def read_back(path, variables):
  """`variables` as a .safetensors file has them; InputError if they differ."""
  tensors = files.read_torch(path)['state_dict']
  require_equal(variables, tensors)
  return traverse_util.unflatten_dict(tensors, sep='/')


def compare(expected, found):
  """Largest difference, largest logit, share of equal classes, number of those
  in `expected`; of lists of float logits [b, h, w, k] or class ids [b, h, w].
  """
  difference, largest, same, total, seen = 0.0, 0.0, 0, 0, set()
  for ours, theirs in zip(expected, found, strict=True):
    if ours.shape != theirs.shape:
      raise InputError(f'The file finds {theirs.shape}, not {ours.shape}.')
    if np.issubdtype(ours.dtype, np.floating):
      # NaN stays NaN: np.maximum passes it on, max does not.
      difference = np.maximum(difference, np.max(np.abs(ours - theirs)))
      largest = np.maximum(largest, np.max(np.abs(ours)))
      ours, theirs = ours.argmax(-1), theirs.argmax(-1)
    same += np.sum(ours == theirs)
    total += ours.size
    seen |= {*np.unique(ours).tolist()}
  return float(difference), float(largest), float(same / total), len(seen)


def describe(expected, found, text):
  """A line about `compare`, begun by `text`, and whether both agree."""
  difference, largest, share, num_classes = compare(expected, found)
  if np.issubdtype(expected[0].dtype, np.floating):
    limit = f'{difference:.2g} at logits up to {largest:.3g}'
    text += f'largest logit difference {limit}, '
  text += f'same class at {100 * share:.4f} % of the pixels; '
  text += f'{num_classes} classes occur'
  return text, share >= AGREEMENT and np.isfinite(difference)


def describe_mious(network, candidates, info):
  """The mIoU on val of each of {name: variables}, or '' if it is not here."""
  source = split_source(info)
  if not source:
    return ''
  keys = ('protocol', 'short_side', 'batch_size', 'size_multiple')
  options = {key: info['eval'][key] for key in keys if key in info['eval']}
  options['threads'] = info['data']['threads']
  options['num_classes'] = len(info['class_names'])
  options['mesh'] = sharding.make_mesh()
  scores = []
  for name, variables in candidates.items():
    counts = evaluation.evaluate(network, variables, source, **options)
    scores.append(f'{100 * metrics.mean_iou(counts):.2f} with {name}')
  return f'val mIoU {", ".join(scores)}'
