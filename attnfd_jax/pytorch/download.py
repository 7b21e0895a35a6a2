# SPDX-License-Identifier: Apache-2.0
"""A file from an address: resumed, checked, and under its name only if whole.

The standard library alone, so that proxies are those of its environment
variables (https_proxy, no_proxy).
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import socket
import urllib.error
import urllib.parse
import urllib.request

from attnfd_jax.progress import progress, write

_CHUNK = 2**18  # Bytes, at most, between two looks at the bar.
_TIMEOUT = 30  # Seconds in which nothing comes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # Network disks.


class DownloadError(Exception):
  """Why there is no file, as the first part of a line."""


def sha256_of(path):
  """Hex digest of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def download(address, path, *, sha256):
  """Leaves the file of an address at `path`, in a folder that is made.

  What came before an interruption lies beside it, NAME.part, and the next call
  adds the rest. Of several processes one downloads and the others wait.

  Raises:
    DownloadError: without an answer, for another answer than the file, for
      other bytes than those of the digest, or if they cannot be written.
  """
  host = urllib.parse.urlsplit(address).hostname or address
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as part:
      if path.exists():
        return  # It is that of the process that was waited for.
      resumed = _size(part) > 0
      _fetch(address, part, host)
      found = sha256_of(part)
      if found != sha256 and resumed:  # Its beginning was of something else.
        part.unlink()
        _fetch(address, part, host)
        found = sha256_of(part)
      if found != sha256:
        part.unlink()
        raise DownloadError(
          f'what {host} sent has SHA-256 {found[:16]}..., not {sha256[:16]}...,'
          ' and was removed'
        )
      with open(part, 'rb') as file:
        os.fsync(file.fileno())  # The name must not be there before the bytes.
      part.replace(path)
  except OSError as error:  # Of the disk: those of the network are caught.
    remedy = 'make room' if error.errno in _FULL else 'make it writable'
    raise DownloadError(
      f'{path.parent} cannot be written ({error.strerror}), {remedy} or use '
      'another folder'
    ) from error


@contextlib.contextmanager
def _locked(path):
  """The file that belongs to this process alone while the context lasts."""
  with open(path.with_name(f'.{path.name}.lock'), 'a') as lock:
    part = path.with_name(f'{path.name}.part')
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      write(f'waiting for the process that downloads {path.name}')
      fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      # A file of its own, for which nobody comes back.
      own = f'{path.name}.{socket.gethostname()}.{os.getpid()}.part'
      part = path.with_name(own)
      try:
        yield part
      finally:
        part.unlink(missing_ok=True)
      return
    yield part


def _size(part):
  return part.stat().st_size if part.exists() else 0


def _fetch(address, part, host):
  """Adds to `part` until it is whole; DownloadError when no more comes."""
  while True:
    before = _size(part)
    problem = _transfer(address, part, before, host)
    if problem is None:
      return
    if _size(part) <= before:
      raise DownloadError(problem)


def _transfer(address, part, start, host):
  """One request for the bytes from `start` on; None, or why they end early."""
  headers = {'User-Agent': 'attnfd_jax'}  # Some servers refuse urllib's.
  if start:
    headers['Range'] = f'bytes={start}-'
  try:
    request = urllib.request.Request(address, headers=headers)
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    with error:
      if start and error.code == 416:
        return None  # There are no more bytes; the digest tells if it is right.
      return f'{host} answers {error.code} {error.reason}'
  except (OSError, ValueError, http.client.HTTPException) as error:
    return f'no answer from {host} ({_reason(error)})'
  with response, open(part, 'ab') as file:
    if start and response.status != 206:  # The server does not resume.
      file.truncate(0)
      start = 0
    length = response.headers.get('Content-Length', '')
    total = start + int(length) if length.isdecimal() else None
    ended = ''
    options = {'initial': start, 'unit': 'B', 'unit_scale': True}
    with progress(total, part.name.removesuffix('.part'), **options) as bar:
      while True:
        try:
          data = response.read1(_CHUNK)  # What is there, and keeps it.
        except (OSError, http.client.HTTPException) as error:
          ended = f' ({_reason(error)})'
          break
        if not data:
          break
        file.write(data)
        bar.update(len(data))
        start += len(data)
  if ended or (total is not None and start < total):
    of = '' if total is None else f' of {total}'
    return (
      f'the transfer from {host} ended after {start}{of} bytes{ended}, the same'
      ' command resumes it'
    )
  return None


def _reason(error):
  """What went wrong, without the wrapper of urllib."""
  error = getattr(error, 'reason', error)
  text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
  return ' '.join(text.split())[:200]
