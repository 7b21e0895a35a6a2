# SPDX-License-Identifier: Apache-2.0
"""The package as users install it: a wheel, away from the repository."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# With the commands: it needs a network, and takes minutes.
pytestmark = [pytest.mark.commands, pytest.mark.slow]


def run(*command, cwd):
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  process = subprocess.run(
    [*map(str, command)],
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stdout + process.stderr
  return process.stdout


def test_a_wheel_runs_anywhere(tmp_path):
  """By way of the sdist, which must hold all that the wheel needs."""
  run(sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  run(sys.executable, '-m', 'venv', tmp_path / 'venv', cwd=tmp_path)
  scripts, empty = tmp_path / 'venv' / 'bin', tmp_path / 'empty'
  empty.mkdir()
  run(scripts / 'pip', 'install', '-q', wheel, cwd=empty)
  listed = run(scripts / 'attnfd', 'configs', cwd=empty)
  assert 'quickstart' in listed and 'camvid' in listed
  command = scripts / 'attnfd', 'train', '--config=quickstart:debug'
  printed = run(*command, cwd=empty)
  assert 'report: runs/quickstart_debug/report.html' in printed
  assert (empty / 'runs/quickstart_debug/report.html').stat().st_size > 10_000
  run(scripts / 'attnfd', 'copy-config', 'quickstart', 'mine.py', cwd=empty)
  finished = run(
    scripts / 'attnfd', 'train', '--config=mine.py:debug', cwd=empty
  )
  assert 'report: runs/mine_debug/report.html' in finished
