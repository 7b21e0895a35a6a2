# SPDX-License-Identifier: Apache-2.0
"""The flags that `evaluate` and `predict` share."""

import contextlib
import math

from absl import flags

from attnfd_jax.errors import InputError
from attnfd_jax.inference import onnx_model

flags.disclaim_key_flags()  # They are of the command: its --help has them.
# Flags that only go with --checkpoint: a config has its own data and code, and
# a file computes what it was exported for.
_NOT_WITH = {
  'config': ('step', 'allow_code', 'data_root'),
  'model': ('step', 'allow_code', 'scales', 'flip'),
}
_REASONS = {
  'config': 'names its own data and code',
  'model': 'is a file that computes one thing',
}


def define():
  text = 'Folder of a stage, such as runs/quickstart/distill.'
  flags.DEFINE_string('checkpoint', None, text)
  text = 'File of export --format=onnx, in place of a folder.'
  flags.DEFINE_string('model', None, text)
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  flags.DEFINE_bool('allow_code', False, 'Run Python files of the folder.')
  flags.DEFINE_string('scales', '1', 'Mean over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Mean with the mirror image.')
  flags.DEFINE_string('tile', None, 'HEIGHTxWIDTH seen at a time.')
  flags.DEFINE_float('overlap', None, 'Share of a tile; 0.25 by default.')


def checkpoint(values, *, load_teacher):
  """What a Predictor takes, of the one flag of --checkpoint, --model, --config.

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
      what = f'goes with --checkpoint; --{kind} {_REASONS[kind]}'
      raise InputError(f'--{name} {what}.')
  if kind == 'model':
    return onnx_model.load(values.model)
  return values.checkpoint if kind == 'checkpoint' else load_teacher()


def read(values):
  """Keyword arguments of `Predictor` from the flags; InputError if unusable."""
  if values.overlap is not None and values.tile is None:
    raise InputError('--overlap is of tiles; add --tile=HEIGHTxWIDTH.')
  taken = ('step', 'allow_code', 'flip')
  return {name: getattr(values, name) for name in taken} | {
    'scales': parse_scales(values.scales),
    'tile': parse_tile(values.tile),
    'overlap': 0.25 if values.overlap is None else values.overlap,
  }


def parse_scales(text):
  """(0.75, 1.0) from '0.75,1'."""
  with contextlib.suppress(ValueError):
    scales = tuple(map(float, text.split(',')))
    if all(0 < scale < math.inf for scale in scales):
      return scales
  what = 'positive numbers between commas, such as --scales=0.75,1,1.25'
  raise InputError(f'--scales={text}: expected {what}.')


def parse_tile(text):
  """(512, 1024) from '512x1024', height first; None from None."""
  if text is None:
    return None
  with contextlib.suppress(ValueError):
    height, width = map(int, text.lower().split('x'))
    if min(height, width) >= 32:
      return height, width
  what = 'HEIGHTxWIDTH, both at least 32, such as --tile=512x1024'
  raise InputError(f'--tile={text}: expected {what}.')
