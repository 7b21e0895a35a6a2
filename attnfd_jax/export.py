# SPDX-License-Identifier: Apache-2.0
r"""Writes a trained network for other programs, and proves that it agrees.

  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=stablehlo|onnx|safetensors|pth --output=FILE [--overwrite] \
    [--uint8] [--argmax] [--weights=float32|bfloat16|int8] [--images=FOLDER]

Only the network is written: no teacher, no connectors, no optimiser. The file
is then run by a fresh process on real images, and has its name only if it
finds the classes that the network finds. --uint8 puts the normalisation into
the file, --argmax the choice of the class, --weights stores them in fewer bits.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

from absl import flags
import jax
from jax import export as jax_export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from attnfd_jax import cli
from attnfd_jax import convert
from attnfd_jax import evaluate
from attnfd_jax import exported
from attnfd_jax import metrics
from attnfd_jax import predict
from attnfd_jax.data import sources
from attnfd_jax.data import transforms
from attnfd_jax.data.synthetic import StreetScenes
from attnfd_jax.errors import InputError
from attnfd_jax.models import layers
from attnfd_jax.models.deeplab import IMAGE_MEAN
from attnfd_jax.models.deeplab import IMAGE_STD
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.training import evaluation
from attnfd_jax.training import sharding

# Format -> how its files end.
FORMATS = {
  'stablehlo': '.stablehlo',
  'onnx': '.onnx',
  'safetensors': '.safetensors',
  'pth': '.pth',
}
WEIGHTS = ('float32', 'bfloat16', 'int8')
PLATFORMS = ('cpu', 'cuda', 'tpu')
# The least share of pixels that have the same class.
AGREEMENT = 0.9999
# Of a StableHLO file: the maps of smaller images are single pixels.
_SMALLEST = 32
# What is compared: a few images, and no more pixels than fit on any disk.
_NUM_IMAGES, _NUM_PIXELS = 8, 1 << 22
_EXTRAS = {
  'stablehlo': ('export', ('flatbuffers',)),
  'onnx': ('onnx', ('onnx', 'onnxruntime')),
}


class Small(NamedTuple):
  """A kernel in fewer bits: `values` times `scale`, [features] or 1."""

  values: np.ndarray
  scale: np.ndarray


def _is_small(x):
  return isinstance(x, Small)


def shrink(variables, weights):
  """The variables with convolution kernels as `Small`; all else stays as it is.

  int8 is symmetric with one scale for each output channel.
  """

  def store(x):
    if x.ndim != 4:
      return x
    if weights == 'bfloat16':
      return Small(x.astype(ml_dtypes.bfloat16), np.ones((), np.float32))
    largest = np.max(np.abs(x), (0, 1, 2))
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Small(np.rint(x / scale).astype(np.int8), scale)

  return variables if weights == 'float32' else jax.tree.map(store, variables)


def grow(stored):
  """float32 variables of what `shrink` returns."""

  def load(x):
    if not _is_small(x):
      return x
    values = jnp.asarray(x.values).astype(jnp.float32)
    return values * layers.per_channel(jnp.asarray(x.scale).ravel(), values)

  return jax.tree.map(load, stored, is_leaf=_is_small)


@functools.lru_cache
def make_forward(network, *, uint8, argmax):
  """Jitted (variables, image) -> what a file finds in images [b, h, w, 3].

  Args:
    network: called with (variables, image, train=False).
    uint8: images are RGB of uint8, else normalised float32.
    argmax: class ids, uint8 [b, h, w], else float32 logits [b, h, w, k].
  """

  @jax.jit
  def forward(variables, image):
    image = normalise(image) if uint8 else image
    logits = network.apply(variables, image, train=False)['logits']
    return jnp.argmax(logits, -1).astype(jnp.uint8) if argmax else logits

  return forward


def stablehlo(forward, stored, *, uint8):
  """Bytes that jax.export.deserialize reads, for any [b, h, w] from 32 x 32.

  Args:
    forward: of make_forward.
    stored: variables, see `shrink`; they are part of the program.
    uint8: see make_forward.
  """
  sizes = jax_export.symbolic_shape(
    'b, h, w', constraints=[f'{n} >= {_SMALLEST}' for n in 'hw']
  )
  dtype = jnp.uint8 if uint8 else jnp.float32
  image = jax.ShapeDtypeStruct((*sizes, 3), dtype)
  program = jax.jit(lambda image: forward(grow(stored), image))
  return jax_export.export(program, platforms=PLATFORMS)(image).serialize()


def _write(kind, path, checkpoint, network, stored, info, *, uint8, argmax):
  """Writes the file, to any path of the right ending; returns remarks."""
  if kind == 'stablehlo':
    forward = make_forward(network, uint8=uint8, argmax=argmax)
    path.write_bytes(stablehlo(forward, stored, uint8=uint8))
  elif kind == 'onnx':
    import onnx

    from attnfd_jax import onnx_writer

    metadata = {
      'class_names': info['class_names'],
      'palette': info['palette'].tolist(),
      'mean': IMAGE_MEAN,
      'std': IMAGE_STD,
      'short_side': _short_side(info),
    }
    model = onnx_writer.make_model(
      network, stored, uint8=uint8, argmax=argmax, metadata=metadata
    )
    onnx.save(model, path)
  else:
    return convert.export_stage(checkpoint, path)[1:]
  return []


def _short_side(info):
  return evaluate.seen_short_side(info, info['eval']['protocol'])


def _seen(image, short_side):
  """The image at the scale that the network knows."""
  if not short_side:
    return image
  size = transforms.fit_short_side(image.shape[:2], short_side)
  return transforms.resize_image(image, size)


def _val_source(info):
  """The val split of a stage's data set, or None if it is not here."""
  try:
    return sources.load_dataset(info['data']).splits.get('val') or None
  except (InputError, OSError):
    return None


def find_images(pattern, info):
  """A few real images as the network sees them, and a text that names them.

  Args:
    pattern: a file, a folder or a glob; by default images of the val split,
      and if that is not here, drawn scenes.
    info: of the stage.

  Raises:
    InputError: if there are none, or one cannot be used.
  """
  short_side = _short_side(info)
  if pattern:
    try:
      paths = predict.find_images(pattern)
    except InputError as error:
      text = str(error).replace('--input', '--images')
      raise InputError(text) from error
    chosen = np.linspace(0, len(paths) - 1, min(_NUM_IMAGES, len(paths)))
    images = [sources.read_image(paths[round(i)]) for i in chosen]
    images = [_seen(x, short_side) for x in images]
    name = f'images of {pattern}'
  elif source := _val_source(info):
    records = evaluation.chosen_records(
      source, _NUM_IMAGES, short_side=short_side
    )
    images = [record['image'] for record in records]
    name = f'images of the val split of {info["data"]["name"]}'
  else:
    height = max(short_side or 240, _SMALLEST)
    scenes = StreetScenes(_NUM_IMAGES, height=height, width=2 * height, seed=0)
    images = [scenes[i]['image'] for i in range(_NUM_IMAGES)]
    name = (
      f'drawn scenes ({info["data"]["name"]} cannot be read here; name real '
      'images by --images)'
    )
  h, w = np.min([x.shape[:2] for x in images], 0)
  if min(h, w) < _SMALLEST:
    raise InputError(
      f'The {name} are {h}x{w} for the network; name some of at least '
      f'{_SMALLEST}x{_SMALLEST} by --images.'
    )
  largest = max(x[..., 0].size for x in images)
  most = int(np.clip(_NUM_PIXELS // largest, 1, len(images)))
  return images[:most], f'{most} {name}'


def _batches(images):
  """Each image, and two of another size as one batch."""
  h, w = (max(n * 7 // 8, _SMALLEST) for n in images[0].shape[:2])
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


def _check_agreement(expected, found, text):
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


def _miou(network, variables, source, info):
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


def _check_arguments(output, kind, *, uint8, argmax, weights, overwrite):
  """The path to write; raises InputError for what cannot be done."""
  if kind not in FORMATS:
    raise InputError(f'--format={kind} must be one of {", ".join(FORMATS)}.')
  if weights not in WEIGHTS:
    raise InputError(
      f'--weights={weights} must be one of {", ".join(WEIGHTS)}.'
    )
  if kind not in _EXTRAS and (uint8 or argmax):
    raise InputError(
      f'--{"uint8" if uint8 else "argmax"} needs a program, and --format={kind}'
      ' holds weights alone; use stablehlo or onnx.'
    )
  if weights != 'float32' and kind != 'stablehlo':
    raise InputError(f'--weights={weights} is for --format=stablehlo.')
  extra, modules = _EXTRAS.get(kind, ('', ()))
  for name in modules:
    if importlib.util.find_spec(name) is None:
      raise InputError(
        f"--format={kind} needs {name}; pip install 'attnfd_jax[{extra}]'."
      )
  if not output:
    raise InputError('--output is missing; name a file.')
  path = pathlib.Path(output)
  for other, ending in FORMATS.items():
    if path.suffix == ending and other != kind:
      raise InputError(f'--output={output} ends as {other}, not as {kind}.')
  if path.is_dir():
    raise InputError(f'--output={output} is a folder; name a file.')
  if path.exists() and not overwrite:
    raise InputError(
      f'--output={output}: exists; add --overwrite to replace it, or name '
      'another one.'
    )
  return path


def export_student(
  checkpoint,
  output,
  *,
  kind,
  uint8=False,
  argmax=False,
  weights='float32',
  images=None,
  overwrite=False,
):
  """Writes a file from a stage's folder; returns lines to print.

  Args:
    checkpoint: folder of a stage; its best checkpoint is taken, and computes
      in float32 in the file.
    output: file; replaced in one step, or not at all.
    kind: a key of FORMATS.
    uint8, argmax: see make_forward; of stablehlo and onnx.
    weights: of WEIGHTS; the others than float32 are of stablehlo.
    images: see find_images.
    overwrite: replace a file that exists.

  Raises:
    InputError: whenever the user can mend it, and if the file does not agree;
      nothing is written then.
  """
  path = _check_arguments(
    output,
    kind,
    uint8=uint8,
    argmax=argmax,
    weights=weights,
    overwrite=overwrite,
  )
  network, variables, info = evaluate.load_network(checkpoint)
  network, variables = network.clone(dtype=None), jax.device_get(variables)
  stored = shrink(variables, weights)
  shown, text = find_images(images, info)
  batches = _batches(shown)
  if not uint8:
    batches = [np.asarray(normalise(x)) for x in batches]
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}{FORMATS[kind]}')
  try:
    remarks = _write(
      kind,
      temporary,
      checkpoint,
      network,
      stored,
      info,
      uint8=uint8,
      argmax=argmax,
    )
    found, theirs = run_fresh(kind, temporary, batches, _options(network))
    forward = make_forward(network, uint8=uint8, argmax=argmax)
    rounded = jax.device_get(grow(stored))
    expected, ours = exported.measure(lambda x: forward(rounded, x), batches)
    lines = [
      f'{evaluate.describe(checkpoint, info)}, as {kind}, weights {weights}',
      _check_agreement(expected, found, f'In a fresh process, on {text}'),
      # The last batch has two images of another size.
      f'{1e3 * np.median(theirs[:-1]):.1f} ms an image on this CPU, '
      f'{1e3 * np.median(ours[:-1]):.1f} ms by attnfd_jax',
    ]
    if weights != 'float32':
      exact = [np.asarray(forward(variables, x)) for x in batches]
      lines.append(_describe_loss(exact, found, weights))
      source = _val_source(info)
      if source:
        before, after = (
          100 * _miou(network, x, source, info) for x in (variables, rounded)
        )
        lines.append(
          f'val mIoU {before:.2f} with float32 weights, {after:.2f} with '
          f'{weights}'
        )
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  lines += remarks
  size = f'{path.stat().st_size / 1e6:.1f} MB'
  if kind not in _EXTRAS:
    return [*lines, f'{path}: {size} of weights']
  return [*lines, f'{path}: {size}; {_describe(network, info, uint8, argmax)}']


def _options(network):
  """Arguments of DeepLabV3Plus, without those of every Flax module."""
  names = {x.name for x in dataclasses.fields(network)}
  return {
    name: getattr(network, name) for name in names - {'parent', 'name', 'dtype'}
  }


def _describe_loss(exact, found, weights):
  difference, _, share, _ = compare(exact, found)
  words = f'Rounding to {weights}: same class at {100 * share:.3f} %'
  if difference:
    words += f', largest logit difference {difference:.2g}'
  return words


def _describe(network, info, uint8, argmax):
  """What goes into a program, and what comes out."""
  image = 'uint8 RGB' if uint8 else 'normalised float32'
  found = 'class ids uint8 [b, h, w]'
  if not argmax:
    found = f'logits float32 [b, h, w, {network.num_classes}]'
  short_side = _short_side(info)
  scale = f', of a short side of {short_side}' if short_side else ''
  return f'{image} [b, h, w, 3]{scale} -> {found}'


def main(argv):
  del argv
  # Neither the program nor the comparison may depend on the machine.
  jax.config.update('jax_platforms', 'cpu')
  cli.enable_compilation_cache()
  options = flags.FLAGS
  lines = export_student(
    options.checkpoint,
    options.output,
    kind=options.format,
    uint8=options.uint8,
    argmax=options.argmax,
    weights=options.weights,
    images=options.images,
    overwrite=options.overwrite,
  )
  print('\n'.join(lines))


if __name__ == '__main__':
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('format', 'stablehlo', ', '.join(FORMATS))
  flags.DEFINE_string('output', None, 'File to write.')
  flags.DEFINE_bool('overwrite', False, 'Replace a file that exists.')
  flags.DEFINE_bool('uint8', False, 'Images are RGB bytes, normalised inside.')
  flags.DEFINE_bool('argmax', False, 'Class ids in place of logits.')
  flags.DEFINE_string('weights', 'float32', ', '.join(WEIGHTS))
  flags.DEFINE_string('images', None, "To compare on: folder or 'pattern'.")
  cli.run(main)
