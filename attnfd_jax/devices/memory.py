# SPDX-License-Identifier: Apache-2.0
"""Out of memory in one line, with a batch that would probably fit."""

import contextlib
import re

import jax

from attnfd_jax.errors import InputError


@contextlib.contextmanager
def explained(batch_size, *, devices, accumulate=None):
  """Turns RESOURCE_EXHAUSTED of a device into an InputError.

  Args:
    batch_size: global, of what is computed inside.
    devices: that a batch is split over.
    accumulate: parts of a batch of training; None for an evaluation.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    evaluating = accumulate is None
    key = 'config.eval.batch_size' if evaluating else 'config.batch_size'
    parts = accumulate or 1
    numbers = _numbers(text)
    fits = _fitting(numbers, batch_size, devices * parts)
    # Batch statistics need two images a part.
    if fits >= (1 if evaluating else 2 * parts):
      remedy = f'--{key}={fits} would probably fit'
    else:
      remedy = f'{key} is as small as it can be'
    if evaluating:
      remedy += '; --config.eval.short_side makes large images smaller'
    else:
      remedy += (
        '. For the same batch, --config.optim.remat=True computes blocks twice '
        f'and --config.optim.accumulate={2 * parts} computes it in parts, with '
        'statistics over a part'
      )
    sizes = ''
    if numbers:
      wanted, free = (f'{number / 1e9:.1f} GB' for number in numbers)
      sizes = f' ({wanted} wanted, {free} free)'
    raise InputError(
      f'Out of device memory at {key}={batch_size}{sizes}: {remedy}.'
    ) from error


def _numbers(text):
  """Bytes wanted and bytes free, None where nobody tells."""
  used = re.search(r'Used ([\d.]+)(\w) of ([\d.]+)(\w)', text)
  if used:  # A TPU's compiler.
    return _bytes(used[1], used[2]), _bytes(used[3], used[4])
  stats = jax.local_devices()[0].memory_stats() or {}
  wanted = re.search(r'allocat\w* ([\d.]+) ?(\w)', text)
  if not wanted or 'bytes_limit' not in stats:
    return None
  free = stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return _bytes(wanted[1], wanted[2]), free


def _bytes(number, unit):
  powers = {'K': 10, 'M': 20, 'G': 30, 'T': 40}
  return float(number) * 2 ** powers.get(unit, 0)


def _fitting(numbers, batch_size, unit):
  """A batch that would probably fit.

  Weights are there already: what is wanted beside them grows with the batch.
  """
  share = 0.5
  if numbers and numbers[1] < numbers[0]:  # Else memory is in pieces.
    share = 0.9 * numbers[1] / numbers[0]
  return int(share * batch_size) // unit * unit
