# SPDX-License-Identifier: Apache-2.0
"""Defines and reads the flags that `evaluate` and `predict` share."""

from collections.abc import Callable
import contextlib
import math
from typing import Any

from absl import flags

from attnfd_jax.data.records import Size
from attnfd_jax.errors import InputError
from attnfd_jax.inference import onnx_model
from attnfd_jax.runs import loading
from attnfd_jax.types import StrPath

flags.disclaim_key_flags()  # Lets --help list them as flags of the command.
# Flags that only work with --checkpoint: a config gives its own data and code,
# and the computation of an exported file is fixed.
_NOT_WITH = {
  'config': ('step', 'allow_code', 'data_root'),
  'model': ('step', 'allow_code', 'scales', 'flip'),
}
_REASONS = {
  'config': 'gives its own data and code',
  'model': 'is an exported file, whose computation is fixed',
}


def define() -> None:
  """Defines the flags."""
  text = 'Folder of a stage, such as runs/quickstart/distill.'
  flags.DEFINE_string('checkpoint', None, text)
  text = 'ONNX file of export --format=onnx, in place of a folder.'
  flags.DEFINE_string('model', None, text)
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  flags.DEFINE_bool('allow_code', False, 'Run Python files of the folder.')
  flags.DEFINE_string('scales', '1', 'Average over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Average with the mirror image.')
  text = 'HEIGHTxWIDTH: process larger images in overlapping tiles.'
  flags.DEFINE_string('tile', None, text)
  flags.DEFINE_float('overlap', None, 'Fraction of a tile; 0.25 by default.')


def checkpoint(
  values: flags.FlagValues, *, load_teacher: Callable[[], Any]
) -> StrPath | loading.Loaded:
  """What Predictor takes, from the one flag of --checkpoint, --model, --config.

  `load_teacher` is called for the network of --config.
  """
  given = [name for name in ('checkpoint', 'model') if values[name].value]
  if values.config is not None:
    given.append('config')
  if len(given) > 1:
    raise InputError(
      f'--{given[0]} and --{given[1]}: name one network, not two.'
    )
  (kind,) = given
  for name in _NOT_WITH.get(kind, ()):
    if name in values and values[name].present:
      problem = f'goes with --checkpoint; --{kind} {_REASONS[kind]}'
      raise InputError(f'--{name} {problem}.')
  if kind == 'model':
    return onnx_model.load(values.model)
  return values.checkpoint if kind == 'checkpoint' else load_teacher()


def read(values: flags.FlagValues) -> dict[str, Any]:
  """Keyword arguments of `Predictor` from the flags; InputError if unusable."""
  if values.overlap is not None and values.tile is None:
    raise InputError('--overlap needs tiles; add --tile=HEIGHTxWIDTH.')
  copied = ('step', 'allow_code', 'flip')
  return {name: getattr(values, name) for name in copied} | {
    'scales': parse_scales(values.scales),
    'tile': parse_tile(values.tile),
    'overlap': 0.25 if values.overlap is None else values.overlap,
  }


def parse_scales(text: str) -> tuple[float, ...]:
  """(0.75, 1.0) from '0.75,1'."""
  with contextlib.suppress(ValueError):
    scales = tuple(map(float, text.split(',')))
    if all(0 < scale < math.inf for scale in scales):
      return scales
  expected = 'positive numbers separated by commas, e.g. --scales=0.75,1,1.25'
  raise InputError(f'--scales={text}: expected {expected}.')


def parse_tile(text: str | None) -> Size | None:
  """(512, 1024) from '512x1024', height first; None from None."""
  if text is None:
    return None
  with contextlib.suppress(ValueError):
    height, width = map(int, text.lower().split('x'))
    if min(height, width) >= 32:
      return height, width
  expected = 'HEIGHTxWIDTH, both at least 32, such as --tile=512x1024'
  raise InputError(f'--tile={text}: expected {expected}.')
