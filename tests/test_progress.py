# SPDX-License-Identifier: Apache-2.0
"""The bar of training takes the place of lines on a terminal alone."""

import sys

import pytest

from attnfd_jax import progress


@pytest.mark.parametrize('stdout', [True, False])
@pytest.mark.parametrize('stderr', [True, False])
@pytest.mark.parametrize('shown', [True, False])
def test_a_bar_needs_a_terminal(monkeypatch, capsys, stdout, stderr, shown):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: stdout)
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: stderr)
  with progress.steps(2, 5, 'distill', shown=shown) as bar:
    bar.update()
    assert bar.disable == (not (stdout and stderr and shown))
    assert bar.disable or (bar.n, bar.total) == (3, 5)


def test_lines_are_written_at_once(capsys):
  progress.write('a line')
  progress.write('another', file=sys.stdout)
  found = capsys.readouterr()
  assert (found.err, found.out) == ('a line\n', 'another\n')
