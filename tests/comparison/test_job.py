# SPDX-License-Identifier: Apache-2.0
"""A comparison by one job of two processes: one table, written by the first."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import tiny_run
import xla_flags

SCRIPT = pathlib.Path(__file__).with_name('process_compare.py')


@pytest.mark.slow
def test_two_processes_are_one_comparison(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    'XLA_FLAGS': xla_flags.quick(2),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'PYTHONPATH': os.pathsep.join(map(str, (tiny_run.ROOT, SCRIPT.parents[1]))),
  }
  workers = [
    subprocess.Popen(
      [
        sys.executable,
        SCRIPT,
        f'--config={SCRIPT}',
        f'--workdir={tmp_path / "c"}',
        '--methods=kd,ofd',  # The second fails in all processes.
        '--equal=seconds',
        f'--process_id={process}',
        '--num_processes=2',
        f'--coordinator=127.0.0.1:{port}',
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
    )
    for process in (0, 1)
  ]
  try:
    printed = [worker.communicate(timeout=200)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.returncode for worker in workers] == [0, 0], printed
  assert '| KD | 0 |' in printed[0] and '[compare]' not in printed[1]
  found = json.loads((tmp_path / 'c' / 'compare.json').read_text())
  kd, ofd = found['rows']
  assert kd['val']['n'] == 1 and kd['equal'] == 'seconds'
  assert 'has no map' in ofd['failed']
