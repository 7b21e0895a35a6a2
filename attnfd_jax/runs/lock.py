# SPDX-License-Identifier: Apache-2.0
"""Locks a run's folder: two writers would delete each other's checkpoints."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import socket
from typing import TextIO

from attnfd_jax import paths
from attnfd_jax.errors import InputError
from attnfd_jax.types import AnyPath

# On some network file systems, which do not support locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(InputError):
  """Another process has locked the folder."""


@contextlib.contextmanager
def locked(
  workdir: AnyPath, *, name: str = '.lock', wait: bool = False
) -> Iterator[None]:
  """Locks `workdir` for this process; the kernel unlocks it when it ends.

  The lock file is never removed: otherwise two processes could lock two files
  of the same name. At gs:// there are no locks.

  Args:
    workdir: folder of a run.
    name: of the lock file; different names are different locks.
    wait: whether to wait for another process that holds the lock.

  Raises:
    InUse: if another process holds the lock, and `wait` is false.
  """
  if paths.is_remote(workdir):
    yield
    return
  with open(workdir / name, 'a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      raise InUse(
        f'{workdir} is in use by {_owner(file)}; wait, or change --workdir.'
      ) from None
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      text = 'this disk has no locks; use this folder in one process only'
      print(f'{workdir}: {text}.', flush=True)
    file.truncate(0)
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    yield


def _owner(file: TextIO) -> str:
  file.seek(0)
  try:
    return 'process {pid} on {host}'.format(**json.load(file))
  except (ValueError, KeyError):
    return 'another process'  # It has not written its id yet.
