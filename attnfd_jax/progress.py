# SPDX-License-Identifier: Apache-2.0
"""The bar of long work, with its speed and the time left."""

import sys

from tqdm.auto import tqdm


def progress(total, text=None, *, initial=0, **options):
  """A bar on terminals; elsewhere a line now and then.

  Args:
    total: images.
    text: before the bar.
    initial: of the images, how many were done before.
    **options: of tqdm.
  """
  return tqdm(
    desc=text,
    total=total,
    initial=initial,
    unit=' images',
    mininterval=0.2 if sys.stderr.isatty() else 10,
    **options,
  )
