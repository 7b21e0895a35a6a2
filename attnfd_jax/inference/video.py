# SPDX-License-Identifier: Apache-2.0
"""A video file of frames, one after the other."""

import contextlib
import os

import cv2

from attnfd_jax.errors import InputError, within

CODECS = {'.avi': 'MJPG', '.mp4': 'mp4v'}


def check(path, fps):
  """Raises InputError unless a video can have this path and rate."""
  if path.suffix.lower() not in CODECS:
    ends = ' or '.join(CODECS)
    raise InputError(f'--video={path}: expected a file that ends in {ends}.')
  try:
    str(path).encode()
  except UnicodeEncodeError as error:  # It would end OpenCV, and Python.
    raise InputError('--video: its name is no text.') from error
  # FFmpeg's codecs refuse others, or write another rate.
  within('--fps', fps, 1, 1000)


@contextlib.contextmanager
def writer(path, size, fps):
  """Yields a function that appends a frame, uint8 RGB [*size, 3].

  `path` is replaced when the block ends and all frames are in the file; else,
  and without a frame, it stays as it was. FFmpeg cuts odd sides by a pixel.
  """
  if path.is_dir():
    raise InputError(f'--video={path} is a folder; name a file.')
  temporary = path.with_name(f'.{os.getpid()}{path.suffix}')  # Never too long.
  temporary.touch()  # OpenCV does not say why it cannot.
  codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
  (h, w), file, count = size, cv2.VideoWriter(), 0

  def write(frame):
    nonlocal count
    if frame.shape[:2] != (h, w):  # OpenCV would leave it out.
      raise ValueError(f'{frame.shape=} must be that of {h}x{w}.')
    file.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    count += 1

  try:
    if not file.open(str(temporary), cv2.CAP_FFMPEG, codec, fps, (w, h)):
      what = f'{w}x{h} at {fps:g} frames a second as {path.suffix}'
      raise InputError(f'--video={path}: OpenCV cannot write {what}.')
    yield write
    file.release()
    if not count:
      return
    # FFmpeg raises nothing, and headers count frames that a full disk lost.
    written = cv2.VideoCapture(str(temporary), cv2.CAP_FFMPEG)
    if sum(iter(written.grab, False)) != count:
      raise InputError(f'{path} could not be written whole; is the disk full?')
    temporary.replace(path)
  finally:
    file.release()
    temporary.unlink(missing_ok=True)
