# SPDX-License-Identifier: Apache-2.0
"""Settings of a process that reads and augments images all the time."""

import ctypes
import warnings

import cv2
from PIL import Image


def tune_process(*_):
  """Makes the whole process fast at images: for commands and Grain's workers.

  A process that only imports the package keeps its own settings.
  """
  cv2.setNumThreads(0)  # Grain's threads are the parallelism.
  # Images are allocated and freed all the time; glibc would give the pages
  # back and fault them in again, a seventh of the time of the pipeline.
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, in bytes: the most allowed.
    libc.mallopt(-1, 1 << 27)  # M_TRIM_THRESHOLD: kept by each arena.
  # Large images are large on purpose; twice Pillow's limit is still refused.
  warnings.simplefilter('ignore', Image.DecompressionBombWarning)
