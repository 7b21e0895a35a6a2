# SPDX-License-Identifier: Apache-2.0
"""A job of two processes with two devices each, as a user starts it."""

import os
import pathlib
import socket
import subprocess
import sys

import tiny_run
import xla_flags


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def start(script, *arguments):
  """Both processes of `script`, which is its own --config."""
  tests = pathlib.Path(__file__).parent
  environment = os.environ | {
    'XLA_FLAGS': xla_flags.quick(2),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',  # Not always the default.
    'PYTHONPATH': os.pathsep.join(map(str, (tiny_run.ROOT, tests))),
  }
  address = f'127.0.0.1:{free_port()}'
  return [
    subprocess.Popen(
      [
        sys.executable,
        script,
        f'--config={script}',
        f'--process_id={process}',
        '--num_processes=2',
        f'--coordinator={address}',
        *arguments,
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
    )
    for process in (0, 1)
  ]


def output_of(workers):
  """What each printed; all must end well."""
  try:
    printed = [worker.communicate(timeout=200)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  assert [worker.returncode for worker in workers] == [0, 0], printed
  return printed
