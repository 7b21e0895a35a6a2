# SPDX-License-Identifier: Apache-2.0
"""Of several processes the first decides which checkpoint can be read."""

import shutil
import socket
import subprocess
import sys

import pytest
import restore_process
import tiny_run
import xla_flags

from attnfd_jax.runs import checkpoints


def restore_in_two(folders):
  """What each process printed."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  started = [
    subprocess.Popen(
      [sys.executable, restore_process.__file__]
      + [f'localhost:{port}', str(index), str(folder)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=tiny_run.environment() | {'XLA_FLAGS': xla_flags.quick()},
    )
    for index, folder in enumerate(folders)
  ]
  second = started[1].communicate(timeout=120)[0]
  if 'refused' in second:  # The first one waits for it, as long as JAX does.
    started[0].kill()
  return started[0].communicate(timeout=120)[0], second


@pytest.mark.slow
@pytest.mark.parametrize('damaged', [0, 1])
def test_the_first_process_decides(tmp_path, damaged):
  """Before, each process took the newest that it could read itself: with a
  disk that is not the same for all, they went on from different steps.
  """
  folders = [tmp_path / f'{i}' / 'student' / 'checkpoints' for i in (0, 1)]
  with checkpoints.managed(folders[0]) as manager:
    for step in (1, 2):
      state = restore_process.make_state(step)
      checkpoints.save(manager, step, state, restore_process.RUN, miou=0.1)
  shutil.copytree(folders[0], folders[1])
  files = [x for x in (folders[damaged] / '2/state').rglob('*') if x.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(b'')
  first, second = restore_in_two(folders)
  if damaged == 0:
    assert 'restored 1 1.0' in first and 'restored 1 1.0' in second
    assert 'checkpoint 2 cannot be read' in first
  else:
    assert 'restored 1' not in first + second
    assert 'process 1 cannot read it' in second
