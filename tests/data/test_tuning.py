# SPDX-License-Identifier: Apache-2.0
"""Settings of a process are changed by commands and workers, not by imports."""

import multiprocessing
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np

from attnfd_jax.data import pipeline
from attnfd_jax.data.transforms import Augment

ROOT = pathlib.Path(__file__).parents[2]
# Every call of what could change the process, by whatever module, is noted.
SPY = """
import ctypes, logging, signal, sys, warnings
from absl import logging as absl_logging
import cv2

calls = []

def spy(module, name):
  original = getattr(module, name)
  def noted(*arguments, **options):
    calls.append(f'{name}{arguments}')
    return original(*arguments, **options)
  setattr(module, name, noted)

class Libc:
  def __init__(self, *arguments, **options):
    self._libc = original_libc(*arguments, **options)
  def __getattr__(self, name):
    calls.append(name)
    return getattr(self._libc, name)

threads, verbosity = cv2.getNumThreads(), absl_logging.get_verbosity()
hook = sys.unraisablehook
import jax, flax, grain, optax, orbax.checkpoint, PIL.Image
import matplotlib, safetensors, tqdm.auto
for module, name in (
  (cv2, 'setNumThreads'),
  (absl_logging, 'set_verbosity'),
  (absl_logging, 'set_stderrthreshold'),
  (warnings, 'simplefilter'),
  (warnings, 'filterwarnings'),
  (signal, 'signal'),
  (jax.config, 'update'),
  (logging, 'disable'),
):
  spy(module, name)
original_libc, ctypes.CDLL = ctypes.CDLL, Libc
"""
IMPORTS = """
import attnfd_jax
from attnfd_jax.data import sources, pipeline
"""
LOSS = """
import jax, numpy as np
maps = {
  'backbone': np.ones((2, 4, 4, 8), np.float32),
  'aspp': np.ones((2, 4, 4, 8), np.float32),
  'decoder': np.ones((2, 4, 4, 8), np.float32),
}
channels = dict.fromkeys(maps, 8)
distiller = attnfd_jax.AttnFD(
  student_channels=channels, teacher_channels=channels
)
variables = distiller.init(jax.random.key(0), maps, maps, train=False)
params = variables.pop('params')
attnfd_jax.attnfd_loss(
  params, variables, maps, maps, distiller=distiller, train=True
)
"""
CHECK = """
assert not calls, calls
assert cv2.getNumThreads() == threads
assert absl_logging.get_verbosity() == verbosity
assert sys.unraisablehook is hook
"""


def run(code):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_importing_and_the_loss_change_nothing():
  own = (
    "calls = [x for x in calls if not x.startswith(('simplefil', 'update'))]"
  )
  # JAX itself has some on its first compilation.
  run(f'{SPY}{IMPORTS}{CHECK}{LOSS}\n{own}\n{CHECK}')


def test_commands_and_the_spy_work():
  """The settings of a command, which the spy sees."""
  code = """
from absl import flags
from attnfd_jax import cli
flags.FLAGS.mark_as_parsed()
cli.prepare_process()
print(cv2.getNumThreads(), absl_logging.get_verbosity(), calls.count('mallopt'))
"""
  threads, verbosity, calls = run(SPY + code).split()
  assert threads == '1' and verbosity == '-3' and int(calls) >= 2


class Threads:
  """Records whose pixels are the number of OpenCV's threads."""

  def __len__(self):
    return 4

  def __getitem__(self, index):
    inside = multiprocessing.parent_process() is not None
    value = cv2.getNumThreads() if inside else 99
    image = np.full((8, 8, 3), value, np.uint8)
    return {'image': image, 'label': image[..., 0]}


def test_workers_use_one_thread_of_opencv():
  threads = cv2.getNumThreads()
  augment = Augment(8, (8, 8), scale_range=(1.0, 1.0), flip=0.0, blur=0.0)
  batches = pipeline.train_batches(
    Threads(), augment, batch_size=2, seed=0, workers=1
  )
  iterator = iter(batches)
  assert np.all(next(iterator)['image'] == 1)
  iterator.close()
  assert cv2.getNumThreads() == threads
