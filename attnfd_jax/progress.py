# SPDX-License-Identifier: Apache-2.0
"""Progress bars with speed and time left."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm


def write(text: str, *, file: TextIO | None = None) -> None:
  """Prints a line above any progress bar, on stderr by default."""
  stream = file or sys.stderr
  tqdm.write(text, file=stream)
  stream.flush()


def steps(done: int, total: int, text: str, *, shown: bool = True) -> tqdm:
  """A bar over the steps of training; only shown on a terminal.

  It takes the place of lines on stdout, which must be on the terminal as well.
  """
  terminal = sys.stdout.isatty() and sys.stderr.isatty()
  return tqdm(
    desc=text,
    initial=done,
    total=total,
    unit=' steps',
    disable=not (shown and terminal),
    dynamic_ncols=True,
  )


def progress(
  total: int | None, text: str | None = None, **options: Any
) -> tqdm:
  """A tqdm bar over `total` images; on a pipe, a line every ten seconds."""
  options = {'unit': ' images'} | options
  options['mininterval'] = 0.2 if sys.stderr.isatty() else 10
  return tqdm(desc=text, total=total, **options)
