# SPDX-License-Identifier: Apache-2.0
"""Writes the network of a stage to a file, and proves that it agrees."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import tempfile

import jax
import numpy as np

from attnfd_jax.errors import InputError, one_of
from attnfd_jax.exporting import agreement, fresh_process, stablehlo
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.runs import conversion, loading

FORMATS = tuple(fresh_process.LOADERS)  # Also how their files end.
# Formats that are programs -> the extra with what they need, and that.
_PROGRAMS = {
  'stablehlo': ('export', 'flatbuffers'),
  'onnx': ('onnx', 'onnx', 'onnxruntime'),
}


def _check_quantization(kind, quantize, options):
  """The options that are given; InputError where they cannot be used."""
  given = {name: x for name, x in options.items() if x is not None}
  if quantize:
    one_of('--quantize', quantize, ('int8',))
    if kind != 'onnx':
      other = '--weights=int8 is for small files of --format=stablehlo'
      raise InputError(f'--quantize=int8 is for --format=onnx; {other}.')
  elif given:
    raise InputError(f'--{min(given)} is of --quantize=int8; add it.')
  return given


def require_packages(kind, needed_by=None):
  """InputError with the remedy if a package of a format is not installed."""
  extra, *modules = _PROGRAMS.get(kind, ('',))
  for name in modules:
    if importlib.util.find_spec(name) is None:
      remedy = f"pip install 'attnfd_jax[{extra}]'"
      raise InputError(f'--format={needed_by or kind} needs {name}; {remedy}.')


def _check_arguments(checkpoint, output, kind, form, weights, overwrite):
  """The path to write; raises InputError for what cannot be done."""
  one_of('--format', kind, FORMATS)
  one_of('--weights', weights, stablehlo.WEIGHTS)
  for name, value in form.items():
    if value and kind not in _PROGRAMS:
      raise InputError(f'--{name} needs a program: --format=stablehlo or onnx.')
  if weights != 'float32' and kind != 'stablehlo':
    raise InputError(f'--weights={weights} is for --format=stablehlo.')
  require_packages(kind)
  if not checkpoint:
    raise InputError('--checkpoint is missing; name the folder of a stage.')
  if not output:
    raise InputError('--output is missing; name a file.')
  path = pathlib.Path(output)
  if (ending := path.suffix[1:]) in {*FORMATS} - {kind}:
    raise InputError(f'--output={output} ends as {ending}, not as {kind}.')
  if path.is_dir():
    raise InputError(f'--output={output} is a folder; name a file.')
  if path.exists() and not overwrite:
    raise InputError(f'{output} exists; add --overwrite to replace it.')
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
  quantize=None,
  calibrate=None,
  calibration=None,
  keep_float=None,
  max_drop=None,
  overwrite=False,
  allow_code=False,
):
  """Writes a file from a stage's folder; returns lines to print.

  Args:
    checkpoint: folder of a stage; its best checkpoint is taken, and computes
      in float32 in the file.
    output: file; replaced in one step, or not at all.
    kind: of FORMATS; 'onnx' and 'pth' are for DeepLabV3Plus.
    uint8, argmax: see stablehlo.make_forward; of stablehlo and onnx.
    weights: of stablehlo.WEIGHTS; the others than float32 are of stablehlo.
    images, num_images: what it is compared on; see agreement.make_batches.
    quantize: 'int8' for a file of 'onnx' that computes in it, or None.
    calibrate, calibration, keep_float, max_drop: of quantized.write; None is
      the default there.
    overwrite: replace a file that exists.
    allow_code: see loading.load_network.

  Raises:
    InputError: whenever the user can fix it, and if the file does not agree;
      nothing is written then.
  """
  form = {'uint8': uint8, 'argmax': argmax}
  options = {'calibrate': calibrate, 'calibration': calibration}
  options |= {'keep_float': keep_float, 'max_drop': max_drop}
  quantizing = _check_quantization(kind, quantize, options)
  path = _check_arguments(checkpoint, output, kind, form, weights, overwrite)
  if quantize:
    from attnfd_jax.exporting import quantized  # Needs what was looked for.

    quantized.check_options(**quantizing)
  loaded = loading.load_network(checkpoint, allow_code=allow_code)
  network, variables, info = loaded
  conversion.check_format(network, kind)
  if hasattr(network, 'dtype'):
    network = network.clone(dtype=None)
  variables = jax.device_get(variables)
  stored = stablehlo.shrink(variables, weights)
  rounded = jax.device_get(stablehlo.grow(stored))
  forward = stablehlo.make_forward(network, **form)
  short_side = predictor.seen_short_side_of(info)
  batches, text = agreement.make_batches(
    images, info, short_side=short_side, count=num_images
  )
  if not uint8:
    batches = [np.asarray(normalise(x)) for x in batches]
  name = predictor.describe(checkpoint, info)
  lines = [f'{name}, as {kind}, weights {weights}']
  remarks, is_program = [], kind in _PROGRAMS
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory('', f'.{path.name}.', path.parent) as folder:
    new = pathlib.Path(folder, f'student.{kind}')
    if kind == 'stablehlo':
      new.write_bytes(stablehlo.make_program(forward, stored, uint8=uint8))
    elif kind == 'onnx':
      from attnfd_jax.exporting import onnx_graph

      facts = conversion.describe_data(info) | {
        'short_side': short_side,
        'training': conversion.describe_stage(info),
      }
      model = onnx_graph.make_model(network, variables, metadata=facts, **form)
      new.write_bytes(model.SerializeToString())
    else:
      _, remarks = conversion.write_weights(
        new, checkpoint, network, variables, info
      )
    run = functools.partial(forward, rounded)
    expected, ours = fresh_process.measure(run, batches)
    if is_program or networks.is_ours(network):
      where = 'In a fresh process'
      fields = () if is_program else dataclasses.fields(network)
      # Those that every Flax module has are None.
      fields = {x.name: getattr(network, x.name) for x in fields}
      fields.pop('extra_taps', None)  # Of training; JSON knows no tuples.
      found, theirs = agreement.run_fresh(kind, new, batches, fields)
    else:
      where = 'Read back array by array, no other process having its code'
      run = functools.partial(forward, agreement.read_back(new, variables))
      found, theirs = fresh_process.measure(run, batches)
    line, agrees = agreement.describe(expected, found, f'{where}, on {text}: ')
    if not agrees:
      least = f'less than {100 * agreement.AGREEMENT:g} % or not finite'
      raise InputError(f'{line}; {least}, so nothing was kept.')
    # The last batch has two images of another size.
    theirs, ours = (1e3 * np.median(x[:-1]) for x in (theirs, ours))
    speed = f'{theirs:.1f} ms an image on this CPU, {ours:.1f} ms by attnfd_jax'
    lines += [line] if quantize else [line, speed]
    if weights != 'float32':
      exact = [np.asarray(forward(variables, x)) for x in batches]
      line, _ = agreement.describe(exact, found, f'Rounding to {weights}: ')
      candidates = {'float32 weights': variables, weights: rounded}
      scores = agreement.describe_mious(network, candidates, info)
      lines += filter(None, [line, scores])
    if quantize:
      new, described = quantized.write(
        new,
        info,
        batches,
        expected=expected,
        text=text,
        short_side=short_side,
        **quantizing,
      )
      lines += described
    os.replace(new, path)
  size = f'{path}: {path.stat().st_size / 1e6:.1f} MB'
  if not is_program:
    return [*lines, *remarks, f'{size} of weights']
  image = 'uint8 RGB' if uint8 else 'normalised float32'
  scale = f', of a short side of {short_side}' if short_side else ''
  logits = f'logits float32 [b, h, w, {len(info["class_names"])}]'
  result = 'class ids uint8 [b, h, w]' if argmax else logits
  return [*lines, f'{size}; {image} [b, h, w, 3]{scale} -> {result}']
