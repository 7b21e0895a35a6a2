# SPDX-License-Identifier: Apache-2.0
"""The bar of long work, with its speed and the time left."""

import sys

from tqdm.auto import tqdm


def write(text):
  """Prints a line on stderr, above any bar."""
  tqdm.write(text, file=sys.stderr)


def progress(total, text=None, **options):
  """A bar of tqdm over `total` images; off terminals a line now and then."""
  options = {'unit': ' images'} | options
  options['mininterval'] = 0.2 if sys.stderr.isatty() else 10
  return tqdm(desc=text, total=total, **options)
