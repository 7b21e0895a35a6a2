# SPDX-License-Identifier: Apache-2.0
"""Where things are kept that can be made again."""

import os
import pathlib


def folder(name):
  """Path of `name` in the user's cache; it may not exist."""
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home) / 'attnfd_jax' / name
