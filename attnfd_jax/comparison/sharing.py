# SPDX-License-Identifier: Apache-2.0
"""Work that commands with one folder share, and the processes of a job."""

import contextlib
import time

import jax

from attnfd_jax.devices import processes
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.runs import lock, logs

_POLL_SECONDS = 5


@contextlib.contextmanager
def holding(folder, *, name='.lock', wait=False):
  """A lock of a folder, which is made, as of lock.locked: for all processes of
  a job or, InUse, for none.
  """
  with contextlib.ExitStack() as stack:
    reason = ''
    if processes.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      try:
        stack.enter_context(lock.locked(folder, name=name, wait=wait))
      except lock.InUse as error:
        reason = str(error)
    if reason := processes.from_first(reason):
      raise lock.InUse(reason)
    yield


def until_done(attempts, text):
  """Calls each until it is not InUse; while all are, says `text` once."""
  waiting = False
  while attempts:
    busy = []
    for attempt in attempts:
      try:
        attempt()
      except lock.InUse:
        busy.append(attempt)
    if len(busy) == len(attempts):
      if not waiting:
        say(f'waiting: {text}')
      waiting = True
      time.sleep(_POLL_SECONDS)
    attempts = busy


def say(text):
  """A line of the first process."""
  if processes.is_first():
    print(f'[compare] {text}', flush=True)


def read_json(path):
  """What is in a file, in all processes what the first one reads: it writes,
  and the others may be early.
  """
  return processes.from_first(
    logs.read_json(path) if processes.is_first() else {}
  )


def is_of_one_row(error):
  """Whether an error is that of one row, after which others can be trained."""
  if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
    return False  # A full disk is no fault of a method.
  if jax.process_count() > 1:
    # Only what all processes find; after the rest they would wait for another.
    return isinstance(error, InputError) and not isinstance(error, DataError)
  return True
