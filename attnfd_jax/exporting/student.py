# SPDX-License-Identifier: Apache-2.0
"""Exports the network of a stage to a file, and verifies the file."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import importlib.util
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from attnfd_jax.errors import check_choice, InputError
from attnfd_jax.exporting import agreement, fresh_process, stablehlo
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.runs import conversion, loading
from attnfd_jax.types import StrPath

FORMATS = tuple(fresh_process.LOADERS)  # Also the extensions of their files.
# Formats that are programs -> the extra to install, and modules it provides.
_PROGRAMS = {
  'stablehlo': ('export', 'flatbuffers'),
  'onnx': ('onnx', 'onnx', 'onnxruntime'),
}


def _check_quantization(
  kind: str, quantize: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
  """The options that are given; InputError if they cannot be used."""
  given = {name: x for name, x in options.items() if x is not None}
  if quantize:
    check_choice('--quantize', quantize, ('int8',))
    if kind != 'onnx':
      other = '--weights=int8 is for small files of --format=stablehlo'
      raise InputError(f'--quantize=int8 is for --format=onnx; {other}.')
  elif given:
    raise InputError(f'--{min(given)} needs --quantize=int8; add it.')
  return given


def require_packages(kind: str, needed_by: str | None = None) -> None:
  """Raises InputError if a package that a format needs is not installed.

  Args:
    kind: of FORMATS.
    needed_by: the format to name in the error, if it is a different one.
  """
  extra, *modules = _PROGRAMS.get(kind, ('',))
  for name in modules:
    if importlib.util.find_spec(name) is None:
      remedy = f"pip install 'attnfd_jax[{extra}]'"
      raise InputError(f'--format={needed_by or kind} needs {name}; {remedy}.')


def _check_arguments(
  checkpoint: StrPath | None,
  output: StrPath | None,
  kind: str,
  form: Mapping[str, bool],
  weights: str,
  overwrite: bool,
) -> pathlib.Path:
  """The path to write; InputError for arguments that do not go together."""
  check_choice('--format', kind, FORMATS)
  check_choice('--weights', weights, stablehlo.WEIGHTS)
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
    raise InputError(
      f'--output={output} ends in .{ending}, but --format is {kind}; change '
      'one of them.'
    )
  if path.is_dir():
    raise InputError(f'--output={output} is a folder; name a file.')
  if path.exists() and not overwrite:
    raise InputError(f'{output} exists; add --overwrite to replace it.')
  return path


def export_student(
  checkpoint: StrPath | None,
  output: StrPath | None,
  *,
  kind: str,
  uint8: bool = False,
  argmax: bool = False,
  weights: str = 'float32',
  images: str | None = None,
  num_images: int = agreement.NUM_IMAGES,
  quantize: str | None = None,
  calibrate: str | None = None,
  calibration: str | None = None,
  keep_float: Sequence[str] | None = None,
  max_drop: float | None = None,
  overwrite: bool = False,
  allow_code: bool = False,
) -> list[str]:
  """Exports a stage's best checkpoint to a file; returns lines to print.

  The file computes in float32, unless it is quantized.

  Args:
    checkpoint: folder of a stage.
    output: file, replaced in one step; after an error it is as it was.
    kind: of FORMATS; 'onnx' and 'pth' are for DeepLabV3Plus.
    uint8: see stablehlo.make_forward; of stablehlo and onnx.
    argmax: see stablehlo.make_forward; of stablehlo and onnx.
    weights: of stablehlo.WEIGHTS; only stablehlo has others than float32.
    images: file, folder or glob of images for the comparison of file and
      network; see agreement.make_batches.
    num_images: number of these images, at most.
    quantize: 'int8' for an ONNX file that computes in int8, or None.
    calibrate: see quantized.write, as the next three; None is its default.
    calibration: see quantized.write.
    keep_float: see quantized.write.
    max_drop: see quantized.write.
    overwrite: replace an existing file.
    allow_code: see loading.load_network.

  Raises:
    InputError: for errors that the user can fix, and if the outputs of the file
      differ from those of the network.
  """
  form = {'uint8': uint8, 'argmax': argmax}
  options = {'calibrate': calibrate, 'calibration': calibration}
  options |= {'keep_float': keep_float, 'max_drop': max_drop}
  quantization = _check_quantization(kind, quantize, options)
  path = _check_arguments(checkpoint, output, kind, form, weights, overwrite)
  if quantize:
    from attnfd_jax.exporting import quantized  # Needs the packages above.

    quantized.check_options(**quantization)
  assert checkpoint  # By _check_arguments.
  loaded = loading.load_network(checkpoint, allow_code=allow_code)
  network, variables, info = loaded
  conversion.check_format(network, kind)
  if hasattr(network, 'dtype'):
    network = network.clone(dtype=None)
  variables = jax.device_get(variables)
  stored = stablehlo.shrink(variables, weights)
  rounded = jax.device_get(stablehlo.grow(stored))
  forward = stablehlo.make_forward(network, **form)
  short_side = predictor.stage_short_side(info)
  batches, text = agreement.make_batches(
    images, info, short_side=short_side, count=num_images
  )
  if not uint8:
    batches = [np.asarray(normalize(x)) for x in batches]
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
    expected, network_seconds = fresh_process.measure(run, batches)
    if is_program or networks.is_ours(network):
      where = 'In a fresh process'
      fields = () if is_program else dataclasses.fields(network)
      # The fields of every Flax module are None.
      fields = {x.name: getattr(network, x.name) for x in fields}
      fields.pop('extra_taps', None)  # For training; JSON has no tuples.
      outputs, seconds = agreement.run_fresh(kind, new, batches, fields)
    else:
      where = 'Read back array by array (a fresh process lacks its code)'
      run = functools.partial(forward, agreement.read_back(new, variables))
      outputs, seconds = fresh_process.measure(run, batches)
    line, agrees = agreement.describe(
      expected, outputs, f'{where}, on {text}: '
    )
    if not agrees:
      problem = f'less than {100 * agreement.AGREEMENT:g} % or not finite'
      raise InputError(f'{line}; {problem}, so no file was written.')
    # The last batch has two images of a different size.
    ms, network_ms = (
      1e3 * np.median(x[:-1]) for x in (seconds, network_seconds)
    )
    speed = f'{ms:.1f} ms per image on this CPU, {network_ms:.1f} ms in JAX'
    lines += [line] if quantize else [line, speed]
    if weights != 'float32':
      exact = [np.asarray(forward(variables, x)) for x in batches]
      line, _ = agreement.describe(exact, outputs, f'Rounding to {weights}: ')
      candidates = {'float32 weights': variables, weights: rounded}
      scores = agreement.describe_mious(network, candidates, info)
      lines += filter(None, [line, scores])
    if quantize:
      from attnfd_jax.exporting import quantized

      new, more_lines = quantized.write(
        new,
        info,
        batches,
        expected=expected,
        text=text,
        short_side=short_side,
        **quantization,
      )
      lines += more_lines
    os.replace(new, path)
  size = f'{path}: {path.stat().st_size / 1e6:.1f} MB'
  if not is_program:
    return [*lines, *remarks, f'{size} of weights']
  image = 'uint8 RGB' if uint8 else 'normalized float32'
  scale = f' with a short side of {short_side}' if short_side else ''
  logits = f'logits float32 [b, h, w, {len(info["class_names"])}]'
  result = 'class ids uint8 [b, h, w]' if argmax else logits
  return [*lines, f'{size}; {image} [b, h, w, 3]{scale} -> {result}']
