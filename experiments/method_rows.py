# SPDX-License-Identifier: Apache-2.0
"""Rows of the short tables of methods, from compare.json."""

from attnfd_jax.reporting import comparison_page

HEAD = ('method', 'mIoU val, %', 'gain', 'seeds', 'relative time')


def cells(row, baseline):
  """Under HEAD; the gain is paired by seed, the time relative to `baseline`."""
  return (
    row['title'],
    comparison_page.score(row['val']),
    comparison_page.difference(row.get('difference', {}).get('val')),
    comparison_page.seeds(row),
    f'{row["seconds"] / baseline["seconds"]:.2f}',
  )


def line(texts):
  """A line of a Markdown table."""
  return f'| {" | ".join(texts)} |'


def head(texts):
  """The first two lines of one."""
  return [line(texts), line(['---'] * len(texts))]
