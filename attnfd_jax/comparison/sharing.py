# SPDX-License-Identifier: Apache-2.0
"""Coordinates commands that share a folder, and the processes of a job."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import time
from typing import Any

from etils import epath
import jax

from attnfd_jax.devices import processes
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.runs import lock, logs

_POLL_SECONDS = 5


@contextlib.contextmanager
def holding(
  folder: epath.Path, *, name: str = '.lock', wait: bool = False
) -> Iterator[None]:
  """Holds a lock of a folder, in all processes of a job or in none.

  Args:
    folder: created if it does not exist.
    name: see lock.locked.
    wait: see lock.locked.

  Raises:
    InUse: if another command holds it, and not `wait`.
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


def until_done(attempts: Sequence[Callable[[], object]], text: str) -> None:
  """Calls each attempt until it no longer raises InUse.

  While all of them do, waits and tries again, after printing `text` once.
  """
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


def say(text: str) -> None:
  """Prints a line, in the first process only."""
  if processes.is_first():
    print(f'[compare] {text}', flush=True)


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a file in the first process, and returns its content in all.

  Only the first process writes the file; another one might read it too early.
  """
  return processes.from_first(
    logs.read_json(path) if processes.is_first() else {}
  )


def is_of_one_row(error: BaseException) -> bool:
  """Whether an error concerns one row only: the others can still be trained."""
  if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
    return False  # A full disk is not the method's fault.
  if jax.process_count() > 1:
    # All processes raise an InputError of the method. After any other error
    # they would wait for the one that failed.
    return isinstance(error, InputError) and not isinstance(error, DataError)
  return True
