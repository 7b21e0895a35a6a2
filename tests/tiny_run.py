# SPDX-License-Identifier: Apache-2.0
"""The smallest run that leaves a stage's folder, for tests of the verbs."""

import fcntl
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import xla_flags

from attnfd_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[1]
# The user's own cache of programs stays as it is.
_CACHE = tempfile.TemporaryDirectory()


def tiny_config():
  """quickstart, shrunk to two steps on 8 labeled scenes of 32 x 48."""
  path = ROOT / 'configs' / 'quickstart.py'
  spec = importlib.util.spec_from_file_location('quickstart', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.stages = ('student',)
  # Optax's Adam does not pass the strict type promotion of conftest.py.
  config.optim.name, config.optim.lr = 'sgd', 0.05
  config.data.image_size = (32, 48)
  config.data.base_size = 32
  config.data.crop_size = (32, 32)
  config.data.unlabeled, config.data.unlabeled_share = '', 0.0
  config.student.labeled_limit = 0
  config.distill.method = 'attnfd'
  config.data.train_scenes = 8
  config.data.val_scenes = 2
  config.batch_size = 4
  config.num_epochs = config.teacher.num_epochs = 1.0
  config.eval.every_epochs = 0.5
  config.checkpoint.keep_best = 2
  return config


def make_stage(tmp_path_factory):
  """Folder of a trained student, which is nobody's to change; the processes of
  a session share it.
  """
  session = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    session = session.parent
  with (session / 'tiny_run.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (session / 'tiny_run' / 'student' / 'result.json').exists():
      experiment.train(tiny_config(), session / 'tiny_run')
  return session / 'tiny_run' / 'student'


def environment():
  """Of a process on one CPU device, as a user has it."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': xla_flags.quick(),
    'PYTHONPATH': str(ROOT),
    # ml_collections loads configs by a deprecated way.
    'PYTHONWARNINGS': 'error,ignore:the load_module():DeprecationWarning',
    'XDG_CACHE_HOME': _CACHE.name,
  }


def run_verb(verb, *arguments, **variables):
  """`python -m attnfd_jax.<verb>` in such a process, with other variables."""
  return subprocess.run(
    [sys.executable, '-m', f'attnfd_jax.{verb}', *map(str, arguments)],
    capture_output=True,
    text=True,
    env=environment() | variables,
    check=False,
  )
