# SPDX-License-Identifier: Apache-2.0
"""Compares the outputs of an exported file and its network on real images."""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import operator
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from flax import traverse_util
import numpy as np

from attnfd_jax import metrics
from attnfd_jax.data import masks, sources, transforms
from attnfd_jax.data.records import Source
from attnfd_jax.data.synthetic import StreetScenes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import fresh_process
from attnfd_jax.exporting.stablehlo import SMALLEST
from attnfd_jax.inference import evaluation, image_files
from attnfd_jax.pytorch import files, names
from attnfd_jax.runs import logs
from attnfd_jax.types import PyTree, StrPath, Variables

# Number of images that are compared; their pixels must fit on any disk.
NUM_IMAGES, _NUM_PIXELS = 8, 1 << 22
AGREEMENT = 0.9999  # The least fraction of pixels with the same class.


def split_source(info: Mapping[str, Any], split: str = 'val') -> Source | None:
  """A split of a stage's data set; None if it cannot be read here."""
  try:
    data = sources.load_dataset(info['data'], splits=(split,))
    return data.splits.get(split)
  except (InputError, OSError):
    return None


def spread(
  source: Source | Sequence[Any],
  count: int,
  *,
  read: Callable[[Any], np.ndarray],
  short_side: int,
) -> list[np.ndarray]:
  """At most `count` images, spread evenly over a source.

  Args:
    source: of anything that `read` turns into an image, uint8 [h, w, 3].
    count: number of images.
    read: called for the chosen entries only.
    short_side: that images are resized to; 0 keeps their size.
  """
  chosen = np.linspace(0, len(source) - 1, min(count, len(source)))
  images = (read(source[round(i)]) for i in chosen)
  return [transforms.fit_image(x, short_side) for x in images]


def check_sizes(
  images: Sequence[np.ndarray], name: str, *, option: str
) -> None:
  """Raises InputError if some images are too small for a network."""
  h, w = np.min([x.shape[:2] for x in images], 0)
  if min(h, w) < SMALLEST:
    problem = f'The {name} are {h}x{w} for the network'
    remedy = f'name some of at least {SMALLEST}x{SMALLEST} by {option}'
    raise InputError(f'{problem}; {remedy}.')


def make_batches(
  pattern: str | None, info: Mapping[str, Any], *, short_side: int, count: int
) -> tuple[list[np.ndarray], str]:
  """Batches of images for a comparison, and a description of them.

  Args:
    pattern: a file, a folder or a glob; by default the val split is used or, if
      it cannot be read here, drawn scenes.
    info: config.json of the stage.
    short_side: that images are resized to; 0 keeps their size.
    count: number of images, at most.

  Returns:
    batches of one image, uint8 [1, h, w, 3], then one of two images of a
    different size; and a text such as '8 images of the val split of camvid'.
  """
  dataset, read = info['data']['name'], operator.itemgetter('image')
  kind = 'image'
  if pattern:
    origin, read = f' of {pattern}', masks.read_image
    source = [*image_files.find_images(pattern, option='--images').values()]
  elif source := split_source(info):
    origin = f' of the val split of {dataset}'
  else:
    kind = 'drawn scene'
    origin = f' ({dataset} cannot be read here; see --images)'
    height = max(short_side or 240, SMALLEST)
    source = StreetScenes(count, height=height, width=2 * height, seed=0)
  images = spread(source, count, read=read, short_side=short_side)
  check_sizes(images, f'{kind}s{origin}', option='--images')
  largest = max(x[..., 0].size for x in images)
  images = images[: max(_NUM_PIXELS // largest, 1)]
  h, w = (max(n * 7 // 8, SMALLEST) for n in images[0].shape[:2])
  part = images[0][:h, :w]
  other = np.stack([part, part[:, ::-1]])
  text = f'{logs.count_text(len(images), kind)}{origin}'
  return [*(x[None] for x in images), other], text


def run_fresh(
  kind: str,
  path: StrPath,
  images: Sequence[np.ndarray],
  options: Mapping[str, Any],
) -> tuple[list[np.ndarray], np.ndarray]:
  """Runs fresh_process.py; returns the outputs and the seconds of each."""
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_TRACEBACK_FILTERING': 'off',  # The error is then the last line.
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
      *outputs, seconds = arrays.values()
    return outputs, seconds


def require_equal(
  variables: Variables, tensors: Mapping[str, np.ndarray]
) -> None:
  """Raises InputError unless the tensors equal the variables bit for bit.

  Args:
    variables: of a network.
    tensors: as a file has them, with the names of names.flatten.
  """
  for name, array in names.flatten(variables).items():
    tensor = tensors.get(name)
    if tensor is None or not np.array_equal(array, tensor, equal_nan=True):
      raise InputError(f'{name}: the file differs from the network.')


def read_back(path: pathlib.Path, variables: Variables) -> PyTree:
  """Variables of a .safetensors file; InputError if they differ from these."""
  tensors = files.read_torch(path)['state_dict']
  require_equal(variables, tensors)
  return traverse_util.unflatten_dict(tensors, sep='/')


def compare(
  expected: Sequence[np.ndarray], found: Sequence[np.ndarray]
) -> tuple[float, float, float, int]:
  """Compares logits [b, h, w, k], or class ids [b, h, w], of several batches.

  Returns:
    the largest difference of logits, the largest logit, the fraction of pixels
    with the same class, and the number of classes in `expected`.

  Raises:
    InputError: if a shape differs.
  """
  difference, largest, same, total, classes = 0.0, 0.0, 0, 0, set()
  for ids, other_ids in zip(expected, found, strict=True):
    if ids.shape != other_ids.shape:
      raise InputError(
        f'The file returns {other_ids.shape}, the network {ids.shape}.'
      )
    if np.issubdtype(ids.dtype, np.floating):
      # NaN stays NaN: np.maximum passes it on, max does not.
      difference = np.maximum(difference, np.max(np.abs(ids - other_ids)))
      largest = np.maximum(largest, np.max(np.abs(ids)))
      ids, other_ids = ids.argmax(-1), other_ids.argmax(-1)
    same += np.sum(ids == other_ids)
    total += ids.size
    classes |= {*np.unique(ids).tolist()}
  return float(difference), float(largest), float(same / total), len(classes)


def describe(
  expected: Sequence[np.ndarray], found: Sequence[np.ndarray], text: str
) -> tuple[str, bool]:
  """A line about `compare` that begins with `text`, and whether they agree."""
  difference, largest, share, num_classes = compare(expected, found)
  if np.issubdtype(expected[0].dtype, np.floating):
    limit = f'{difference:.2g} at logits up to {largest:.3g}'
    text += f'largest logit difference {limit}, '
  text += f'same class at {100 * share:.4f} % of the pixels; '
  text += f'{num_classes} class{"es occur" if num_classes != 1 else " occurs"}'
  return text, share >= AGREEMENT and math.isfinite(difference)


def describe_mious(
  network: Any, candidates: Mapping[str, Variables], info: Mapping[str, Any]
) -> str:
  """Val mIoU with each of {name: variables}; '' if val cannot be read here."""
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
