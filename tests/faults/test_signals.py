# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, and a disk that fills up, as a user's own process meets them."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
import xla_flags

from attnfd_jax.runs import checkpoints

# `main` with networks that compile fast.
DRIVER = """
import sys
import runpy
import small_run
with small_run.kept_programs(sys.argv.pop()):
  {prepare}
  runpy.run_module('attnfd_jax.main', run_name='__main__', alter_sys=True)
"""
# A limit for files stands for a full disk: writing fails in the same places.
FULL = """
  import resource
  from attnfd_jax.runs import checkpoints
  save = checkpoints.save
  def limited(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    return save(*arguments, **options)
  checkpoints.save = limited
"""
SETTINGS = (
  *('data.image_size=(32, 48)', 'data.base_size=32', 'data.crop_size=(32, 32)'),
  *('data.train_scenes=8', 'data.val_scenes=2', 'batch_size=4'),
  'student.labeled_limit=4',
  *("stages=('student',)", 'log_every_steps=1', 'eval.num_pictures=0'),
)


def start(folder, name, *, prepare='', epochs):
  workdir = folder / name
  return workdir, subprocess.Popen(
    [
      *(sys.executable, '-c', DRIVER.format(prepare=prepare.strip())),
      f'--config={tiny_run.ROOT}/configs/quickstart.py',
      f'--workdir={workdir}',
      *(f'--config.{setting}' for setting in SETTINGS),
      f'--config.num_epochs={epochs}',
      f'--config.eval.every_epochs={epochs}',
      str(folder / 'programs'),
    ],
    env=os.environ
    | {
      'PYTHONPATH': f'{tiny_run.ROOT}{os.pathsep}{tiny_run.ROOT / "tests"}',
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': xla_flags.quick(),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def terminated(folder):
  workdir, process = start(folder, 'stopped', epochs=10000.0)
  metrics = workdir / 'student' / 'metrics.jsonl'
  while process.poll() is None:
    if metrics.exists() and metrics.read_text().count('\n') >= 3:
      process.send_signal(signal.SIGTERM)
      break
    time.sleep(0.05)
  return (*process.communicate(), process.returncode, workdir)


def filled(folder):
  workdir, process = start(folder, 'full', prepare=FULL, epochs=1.0)
  return (*process.communicate(), process.returncode, workdir)


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
  """(output, errors, exit code, workdir) of both; imports take seconds."""
  folder = tmp_path_factory.mktemp('signals')
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    jobs = [pool.submit(job, folder) for job in (terminated, filled)]
    return [job.result(timeout=300) for job in jobs]


def test_sigterm_saves_and_exits_with_143(ended):
  output, errors, code, workdir = ended[0]
  assert (code, errors) == (143, '')
  (step,) = checkpoints.steps(workdir / 'student' / 'checkpoints')
  assert step >= 3
  last = output.splitlines()[-1]
  assert last.startswith(f'[student] stopped by SIGTERM, saved at step {step};')
  log = (workdir / 'student' / 'log.txt').read_text()
  assert last.removeprefix('[student] ') in log


def test_a_full_disk_is_one_line(ended):
  output, errors, code, workdir = ended[1]
  assert code == 2, errors
  assert 'step 2/2' in output
  line, *others = errors.splitlines()
  assert not others, errors
  folder = workdir / 'student' / 'checkpoints'
  start = f'error: {folder}: cannot save (File too large); make room, or'
  assert line.startswith(start)
