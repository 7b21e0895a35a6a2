# SPDX-License-Identifier: Apache-2.0
r"""Writes a trained network for other programs, and proves that it agrees.

  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=stablehlo|onnx|safetensors|pth --output=FILE [--overwrite] \
    [--uint8] [--argmax] [--weights=float32|bfloat16|int8] [--images=FOLDER] \
    [--num_images=8]

Only the network is written: no teacher, no connectors, no optimiser. The file
is then run by a fresh process on real images, and has its name only if it
finds the classes that the network finds. --uint8 puts the normalisation into
the file, --argmax the choice of the class, --weights stores them in fewer bits.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from typing import NamedTuple

from absl import flags
import jax
from jax import export as jax_export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from attnfd_jax import cli
from attnfd_jax import convert
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import agreement
from attnfd_jax.exporting import fresh_process as exported
from attnfd_jax.inference import predictor
from attnfd_jax.models import layers
from attnfd_jax.models.deeplab import IMAGE_MEAN
from attnfd_jax.models.deeplab import IMAGE_STD
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.runs import loading

# Format -> how its files end.
FORMATS = {
  'stablehlo': '.stablehlo',
  'onnx': '.onnx',
  'safetensors': '.safetensors',
  'pth': '.pth',
}
WEIGHTS = ('float32', 'bfloat16', 'int8')
PLATFORMS = ('cpu', 'cuda', 'tpu')
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
    'b, h, w', constraints=[f'{n} >= {agreement.SMALLEST}' for n in 'hw']
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

    from attnfd_jax.exporting import onnx_graph as onnx_writer

    metadata = {
      'class_names': info['class_names'],
      'palette': info['palette'].tolist(),
      'mean': IMAGE_MEAN,
      'std': IMAGE_STD,
      'short_side': agreement.short_side_of(info),
    }
    model = onnx_writer.make_model(
      network, stored, uint8=uint8, argmax=argmax, metadata=metadata
    )
    onnx.save(model, path)
  else:
    return convert.export_stage(checkpoint, path)[1:]
  return []


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
  num_images=agreement.NUM_IMAGES,
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
    images, num_images: what it is compared on; see agreement.find_images.
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
  if not checkpoint:
    raise InputError(
      '--checkpoint is missing; name the folder of a stage, such as '
      '--checkpoint=runs/quickstart/distill.'
    )
  network, variables, info = loading.load_network(checkpoint)
  network, variables = network.clone(dtype=None), jax.device_get(variables)
  stored = shrink(variables, weights)
  shown, text = agreement.find_images(images, info, num_images)
  batches = agreement.make_batches(shown)
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
    found, theirs = agreement.run_fresh(
      kind, temporary, batches, _options(network)
    )
    forward = make_forward(network, uint8=uint8, argmax=argmax)
    rounded = jax.device_get(grow(stored))
    expected, ours = exported.measure(lambda x: forward(rounded, x), batches)
    lines = [
      f'{predictor.describe(checkpoint, info)}, as {kind}, weights {weights}',
      agreement.check(expected, found, f'In a fresh process, on {text}'),
      # The last batch has two images of another size.
      f'{1e3 * np.median(theirs[:-1]):.1f} ms an image on this CPU, '
      f'{1e3 * np.median(ours[:-1]):.1f} ms by attnfd_jax',
    ]
    if weights != 'float32':
      exact = [np.asarray(forward(variables, x)) for x in batches]
      lines.append(agreement.describe_loss(exact, found, weights))
      source = agreement.val_source(info)
      if source:
        before, after = (
          100 * agreement.miou(network, x, source, info)
          for x in (variables, rounded)
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


def _describe(network, info, uint8, argmax):
  """What goes into a program, and what comes out."""
  image = 'uint8 RGB' if uint8 else 'normalised float32'
  found = 'class ids uint8 [b, h, w]'
  if not argmax:
    found = f'logits float32 [b, h, w, {network.num_classes}]'
  short_side = agreement.short_side_of(info)
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
    num_images=options.num_images,
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
  flags.DEFINE_integer(
    'num_images', agreement.NUM_IMAGES, 'How many of them, at most.', 1
  )
  cli.run(main)
