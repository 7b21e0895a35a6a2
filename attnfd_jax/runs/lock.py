# SPDX-License-Identifier: Apache-2.0
"""One writer for a run's folder: two would delete each other's checkpoints."""

import contextlib
import errno
import fcntl
import json
import os
import socket

from attnfd_jax import paths
from attnfd_jax.errors import InputError

# Some network disks have no locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(InputError):
  """Another process writes there."""


@contextlib.contextmanager
def locked(workdir, *, name='.lock', wait=False):
  """Holds `workdir` for this process; the kernel lets go when it ends.

  The file stays: removing it would let two processes hold two files of one
  name. At gs:// there are no locks. InUse if another process holds it, unless
  this is to `wait`. Each `name` of a file is a lock of its own.
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
      text = 'this disk has no locks; let one process write there'
      print(f'{workdir}: {text}.', flush=True)
    file.truncate(0)
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    yield


def _owner(file):
  file.seek(0)
  try:
    return 'process {pid} on {host}'.format(**json.load(file))
  except (ValueError, KeyError):
    return 'another process'  # It has not written who it is yet.
