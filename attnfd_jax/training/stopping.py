# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: training finishes the current step and saves it first."""

from collections.abc import Callable, Iterator
import contextlib
import signal
from types import FrameType
from typing import Any, TypeVar

import jax

_T = TypeVar('_T')


class Stopped(SystemExit):
  """A signal stopped the run; the exit code is 128 plus the signal."""

  def __init__(self, signum: int, message: str = ''):
    super().__init__(128 + signum)
    self.message = message


class Stop:
  """Records a request to stop the run.

  Where nothing can be lost, a signal raises Stopped at once. Inside `deferred`
  it only sets `signum`, which the loop checks after every step.
  """

  def __init__(self):
    self.signum: int | None = None
    self._deferred = False

  @property
  def name(self) -> str:
    """Name of the signal, for messages."""
    return 'Ctrl-C' if self.signum == signal.SIGINT else 'SIGTERM'

  @contextlib.contextmanager
  def listening(self) -> Iterator['Stop']:
    """Handles SIGTERM and Ctrl-C; for the main thread of a command.

    With several processes JAX handles them, so that all stop at the same step.
    """
    with contextlib.ExitStack() as stack:
      if not jax.distributed.is_initialized():
        for number in (signal.SIGINT, signal.SIGTERM):
          before = signal.signal(number, self._handle)
          stack.callback(signal.signal, number, before)
      yield self

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    del frame
    # Schedulers may send SIGTERM twice; a second Ctrl-C is a person in a hurry.
    insists = self.signum == signum == signal.SIGINT
    self.signum = signum
    if insists or not self._deferred:
      remedy = 'the same command resumes from the last checkpoint'
      raise Stopped(signum, f'Stopped by {self.name}; {remedy}.')

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Defers the first signal: it does not interrupt what runs inside."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def attempt(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
    """Calls `function` inside `deferred`, but lets a signal interrupt it.

    For work that a resumed run repeats. Returns None if it was interrupted.
    """
    self._deferred = False
    try:
      return None if self.signum else function(*arguments)
    except Stopped:
      return None
    finally:
      self._deferred = True
