# SPDX-License-Identifier: Apache-2.0
"""Writes a video file frame by frame."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib

import cv2
import numpy as np

from attnfd_jax.data.records import Size
from attnfd_jax.errors import check_range, InputError

CODECS = {'.avi': 'MJPG', '.mp4': 'mp4v'}


def check(path: pathlib.Path, fps: float) -> None:
  """Raises InputError unless a video can have this path and frame rate."""
  if path.suffix.lower() not in CODECS:
    ends = ' or '.join(CODECS)
    raise InputError(f'--video={path}: expected a file that ends in {ends}.')
  try:
    str(path).encode()
  except UnicodeEncodeError as error:  # OpenCV would abort the process.
    raise InputError(
      '--video: the name is not valid UTF-8; rename it.'
    ) from error
  # FFmpeg's codecs refuse other rates, or write a different one.
  check_range('--fps', fps, 1, 1000)


@contextlib.contextmanager
def writer(
  path: pathlib.Path, size: Size, fps: float
) -> Iterator[Callable[[np.ndarray], None]]:
  """Yields a function that appends a frame, uint8 RGB [h, w, 3].

  `path` is replaced when the block ends and the file has all frames. After an
  error, and without frames, it stays as it was. FFmpeg drops the last row or
  column of frames with an odd height or width.

  Args:
    path: a file that `check` accepts, in a folder that exists.
    size: (height, width) of all frames.
    fps: frames per second.

  Raises:
    InputError: if OpenCV cannot write such a video, or the disk is full.
  """
  if path.is_dir():
    raise InputError(f'--video={path} is a folder; name a file.')
  temporary = path.with_name(f'.{os.getpid()}{path.suffix}')  # Never too long.
  temporary.touch()  # Raises the reason, which OpenCV does not report.
  codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
  (h, w), file, count = size, cv2.VideoWriter(), 0

  def write(frame):
    nonlocal count
    if frame.shape[:2] != (h, w):  # OpenCV would silently skip it.
      raise ValueError(f'{frame.shape=} must be ({h}, {w}, 3).')
    file.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    count += 1

  try:
    if not file.open(str(temporary), cv2.CAP_FFMPEG, codec, fps, (w, h)):
      form = f'{w}x{h} at {fps:g} frames per second as {path.suffix}'
      raise InputError(f'--video={path}: OpenCV cannot write {form}.')
    yield write
    file.release()
    if not count:
      return
    # FFmpeg raises nothing, and headers count frames that a full disk lost.
    written = cv2.VideoCapture(str(temporary), cv2.CAP_FFMPEG)
    if sum(iter(written.grab, False)) != count:
      raise InputError(f'{path} was not written completely; is the disk full?')
    temporary.replace(path)
  finally:
    file.release()
    temporary.unlink(missing_ok=True)
