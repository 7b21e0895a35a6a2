# SPDX-License-Identifier: Apache-2.0
"""Downloads a file: resumable, verified, visible only once it is complete.

Uses only the standard library, whose environment variables (https_proxy,
no_proxy) set the proxy.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import pathlib
import socket
import urllib.error
import urllib.parse
import urllib.request

from attnfd_jax.progress import progress, write
from attnfd_jax.types import StrPath

_CHUNK = 2**18  # Bytes, at most, between two updates of the progress bar.
_TIMEOUT = 30  # Seconds without data.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# On some network file systems.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DownloadError(Exception):
  """Why a download failed, as the first part of a one-line message."""


def sha256_of(path: StrPath) -> str:
  """SHA-256 of a file, as hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def download(address: str, path: pathlib.Path, *, sha256: str) -> None:
  """Downloads a URL to `path`, creating its folder if needed.

  An interrupted download leaves NAME.part beside `path`, and the next call
  resumes it. If several processes ask for the same file, one downloads and the
  others wait.

  Args:
    address: URL of the file.
    path: where to save it.
    sha256: expected SHA-256, as hexadecimal digits.

  Raises:
    DownloadError: if the server cannot be reached or does not send the file,
      the SHA-256 differs, or the file cannot be written.
  """
  host = urllib.parse.urlsplit(address).hostname or address
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as part:
      if path.exists():
        return  # Another process has downloaded it while this one waited.
      resumed = _size(part) > 0
      _fetch(address, part, host)
      digest = sha256_of(part)
      if digest != sha256 and resumed:  # The old part was of another file.
        part.unlink()
        _fetch(address, part, host)
        digest = sha256_of(part)
      if digest != sha256:
        part.unlink()
        raise DownloadError(
          f'the file from {host} has SHA-256 {digest[:16]}..., not '
          f'{sha256[:16]}..., and was removed'
        )
      with open(part, 'rb') as file:
        os.fsync(file.fileno())  # The bytes must be on disk before the name.
      part.replace(path)
  except OSError as error:  # Of the disk; _transfer catches network errors.
    remedy = 'make room' if error.errno in _FULL else 'make it writable'
    raise DownloadError(
      f'{path.parent} cannot be written ({error.strerror}), {remedy} or use '
      'another folder'
    ) from error


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the partial file, which no other process writes meanwhile."""
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
      # Without locks: a name of this process's own, which is never resumed.
      own = f'{path.name}.{socket.gethostname()}.{os.getpid()}.part'
      part = path.with_name(own)
      try:
        yield part
      finally:
        part.unlink(missing_ok=True)
      return
    yield part


def _size(part: pathlib.Path) -> int:
  return part.stat().st_size if part.exists() else 0


def _fetch(address: str, part: pathlib.Path, host: str) -> None:
  """Requests the file until it is complete, or a request adds nothing."""
  while True:
    size = _size(part)
    problem = _transfer(address, part, size, host)
    if problem is None:
      return
    if _size(part) <= size:
      raise DownloadError(problem)


def _transfer(
  address: str, part: pathlib.Path, start: int, host: str
) -> str | None:
  """Requests the bytes from `start` on; returns what went wrong, or None."""
  headers = {'User-Agent': 'attnfd_jax'}  # Some servers refuse urllib's.
  if start:
    headers['Range'] = f'bytes={start}-'
  try:
    request = urllib.request.Request(address, headers=headers)
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    with error:
      if start and error.code == 416:
        return None  # Already complete; the caller checks the digest.
      return f'{host} answers {error.code} {error.reason}'
  except (OSError, ValueError, http.client.HTTPException) as error:
    return f'no answer from {host} ({_reason(error)})'
  with response, open(part, 'ab') as file:
    if start and response.status != 206:  # The server does not resume.
      file.truncate(0)
      start = 0
    length = response.headers.get('Content-Length', '')
    total = start + int(length) if length.isdecimal() else None
    reason = ''
    options = {'initial': start, 'unit': 'B', 'unit_scale': True}
    with progress(total, part.name.removesuffix('.part'), **options) as bar:
      while True:
        try:
          data = response.read1(_CHUNK)  # Does not wait for a full chunk.
        except (OSError, http.client.HTTPException) as error:
          reason = f' ({_reason(error)})'
          break
        if not data:
          break
        file.write(data)
        bar.update(len(data))
        start += len(data)
  if reason or (total is not None and start < total):
    of = '' if total is None else f' of {total}'
    return (
      f'the transfer from {host} ended after {start}{of} bytes{reason}; run '
      'the same command to resume it'
    )
  return None


def _reason(error: Exception) -> str:
  """The text of an error, or of the one that a URLError wraps."""
  cause = getattr(error, 'reason', error)
  text = getattr(cause, 'strerror', None) or str(cause) or type(cause).__name__
  return ' '.join(text.split())[:200]
