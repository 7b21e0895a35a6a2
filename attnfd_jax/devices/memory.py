# SPDX-License-Identifier: Apache-2.0
"""Turns out-of-memory errors into one line with a batch size that may fit."""

from collections.abc import Iterator
import contextlib
import re

import jax

from attnfd_jax.errors import InputError


@contextlib.contextmanager
def explain_exhaustion(
  batch_size: int, *, devices: int, accumulate: int | None = None
) -> Iterator[None]:
  """Turns RESOURCE_EXHAUSTED of a device into an InputError.

  Args:
    batch_size: of all devices together.
    devices: number of devices that share a batch.
    accumulate: number of parts of a training batch; None for evaluation.
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
        '. To keep the batch size, --config.optim.remat=True recomputes blocks '
        f'in the backward pass, and --config.optim.accumulate={2 * parts} '
        'splits each batch into parts, with batch statistics of a part'
      )
    sizes, share = '', 0.5
    if numbers := _needed_and_free(str(error)):
      needed, free = numbers
      sizes = f' ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)'
      if free < needed:  # Else memory is fragmented.
        # Weights are already allocated; what is needed grows with the batch.
        share = 0.9 * free / needed
    unit = devices * parts
    fits = int(share * batch_size) // unit * unit
    remedy = f'--{key}={fits} would probably fit'
    if fits < least:
      remedy = f'{key} is as small as it can be'
    raise InputError(
      f'Out of device memory at {key}={batch_size}{sizes}: {remedy}{more}.'
    ) from error


def _needed_and_free(text: str) -> tuple[float, float] | None:
  """Bytes needed and bytes free, if the error or the device has them."""
  if used := re.search(r'Used ([\d.]+\w) of ([\d.]+\w)', text):
    return _bytes(used[1]), _bytes(used[2])  # From the compiler for TPUs.
  stats = jax.local_devices()[0].memory_stats() or {}
  needed = re.search(r'allocat\w* ([\d.]+ ?\w)', text)
  if not needed or 'bytes_limit' not in stats:
    return None
  return _bytes(needed[1]), stats['bytes_limit'] - stats.get('bytes_in_use', 0)


def _bytes(text: str) -> float:
  """Parses '20.00G' or '300 b'."""
  powers = {'K': 10, 'M': 20, 'G': 30, 'T': 40}
  return float(text[:-1]) * 2 ** powers.get(text[-1], 0)
