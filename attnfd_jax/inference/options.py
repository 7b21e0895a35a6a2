# SPDX-License-Identifier: Apache-2.0
"""The flags that `evaluate` and `predict` share."""

import contextlib
import math

from absl import flags

from attnfd_jax.errors import InputError

flags.disclaim_key_flags()  # They are of the command: its --help has them.
_OF_CHECKPOINTS = ('step', 'allow_code', 'data_root')  # --config has its own.


def define():
  text = 'Folder of a stage, such as runs/quickstart/distill.'
  flags.DEFINE_string('checkpoint', None, text)
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  flags.DEFINE_bool('allow_code', False, 'Run Python files of the folder.')
  flags.DEFINE_string('scales', '1', 'Mean over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Mean with the mirror image.')
  flags.DEFINE_string('tile', None, 'HEIGHTxWIDTH seen at a time.')
  flags.DEFINE_float('overlap', None, 'Share of a tile; 0.25 by default.')


def checkpoint(values):
  """The folder of --checkpoint, or None for the teacher of --config."""
  if values.config is None:
    return values.checkpoint
  if values.checkpoint:
    raise InputError('--checkpoint and --config: name one network, not two.')
  for name in _OF_CHECKPOINTS:
    if name in values and values[name].present:
      what = 'goes with --checkpoint; --config names its own data and code'
      raise InputError(f'--{name} {what}.')
  return None


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
