# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: in training the step is finished and saved first."""

import contextlib
import signal

import jax


class Stopped(SystemExit):
  """The run was told to stop; the exit code is 128 plus the signal."""

  def __init__(self, signum, message=''):
    super().__init__(128 + signum)
    self.message = message


class Stop:
  """Whether somebody asked the run to stop.

  Where nothing can be lost a signal raises Stopped at once; inside `deferred`
  it only sets `signum`, which the loop looks at after every step.
  """

  def __init__(self):
    self.signum = None
    self._deferred = False

  @property
  def name(self):
    return 'Ctrl-C' if self.signum == signal.SIGINT else 'SIGTERM'

  @contextlib.contextmanager
  def listening(self):
    """Handles SIGTERM and Ctrl-C; for the main thread of a command.

    With several processes JAX listens itself, so that all stop at one step.
    """
    with contextlib.ExitStack() as stack:
      if not jax.distributed.is_initialized():
        for number in (signal.SIGINT, signal.SIGTERM):
          before = signal.signal(number, self._handle)
          stack.callback(signal.signal, number, before)
      yield self

  def _handle(self, signum, frame):
    del frame
    # Schedulers send SIGTERM twice; only a person who insists is in a hurry.
    insists = self.signum == signum == signal.SIGINT
    self.signum = signum
    if insists or not self._deferred:
      remedy = 'the same command goes on where the last checkpoint is'
      raise Stopped(signum, f'Stopped by {self.name}; {remedy}.')

  @contextlib.contextmanager
  def deferred(self):
    """Inside, the first signal waits."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def attempt(self, function, *arguments):
    """Inside `deferred`: function(*arguments), or None if a signal ends it; for
    what the next start does again.
    """
    self._deferred = False
    try:
      return None if self.signum else function(*arguments)
    except Stopped:
      return None
    finally:
      self._deferred = True
