# SPDX-License-Identifier: Apache-2.0
"""The bar of long work, with its speed and the time left."""

import sys

from tqdm.auto import tqdm


def progress(total, text=None, **options):
  """A bar over `total` images on terminals; elsewhere a line now and then.

  `text` stands before it; `options` are of tqdm, as `initial`.
  """
  options['mininterval'] = 0.2 if sys.stderr.isatty() else 10
  return tqdm(desc=text, total=total, unit=' images', **options)
