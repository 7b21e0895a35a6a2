# SPDX-License-Identifier: Apache-2.0
"""Out of memory in one line, with a batch that would probably fit."""

import contextlib
import re

import jax

from attnfd_jax.errors import InputError


@contextlib.contextmanager
def explained(batch_size, *, devices, accumulate=None):
  """Turns RESOURCE_EXHAUSTED of a device into an InputError.

  `batch_size` is the global one, split over `devices`; `accumulate` are the
  parts of a batch of training, None for an evaluation.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parts, key, least = 1, 'config.eval.batch_size', 1
    more = '; --config.eval.short_side makes large images smaller'
    if accumulate is not None:
      parts, key = accumulate, 'config.batch_size'
      least = 2 * parts  # For batch statistics.
      more = (
        '. For the same batch, --config.optim.remat=True computes blocks twice '
        f'and --config.optim.accumulate={2 * parts} computes it in parts, with '
        'statistics over a part'
      )
    sizes, share = '', 0.5
    if numbers := _numbers(str(error)):
      wanted, free = numbers
      sizes = f' ({wanted / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free)'
      if free < wanted:  # Else memory is in pieces.
        # Weights are there already: what is wanted grows with the batch.
        share = 0.9 * free / wanted
    unit = devices * parts
    fits = int(share * batch_size) // unit * unit
    remedy = f'--{key}={fits} would probably fit'
    if fits < least:
      remedy = f'{key} is as small as it can be'
    raise InputError(
      f'Out of device memory at {key}={batch_size}{sizes}: {remedy}{more}.'
    ) from error


def _numbers(text):
  """Bytes wanted and bytes free, None where nobody tells."""
  if used := re.search(r'Used ([\d.]+\w) of ([\d.]+\w)', text):
    return _bytes(used[1]), _bytes(used[2])  # A TPU's compiler.
  stats = jax.local_devices()[0].memory_stats() or {}
  wanted = re.search(r'allocat\w* ([\d.]+ ?\w)', text)
  if not wanted or 'bytes_limit' not in stats:
    return None
  return _bytes(wanted[1]), stats['bytes_limit'] - stats.get('bytes_in_use', 0)


def _bytes(text):
  """Of '20.00G' or '300 b'."""
  powers = {'K': 10, 'M': 20, 'G': 30, 'T': 40}
  return float(text[:-1]) * 2 ** powers.get(text[-1], 0)
