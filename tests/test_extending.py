# SPDX-License-Identifier: Apache-2.0
"""The diffs of docs/extending.md apply, and what they add trains together."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from data import fixtures
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# One step with all of them; AttnFD beside it would only take long to compile.
PROGRAM = """
import dataclasses, json
import jax
import attnfd_jax
from attnfd_jax.benchmarks.train import make_stage
from attnfd_jax.config import debug
from attnfd_jax.config import default_config
from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset

config = debug(default_config())
config.data.name, config.data.root = 'mine', 'fields'
config.data.base_size, config.data.crop_size = 48, (32, 32)
config.teacher.backbone = config.student.backbone = 'plain'
config.loss.name = 'smooth'
config.distill.method = 'hint'
config.distill.hint.weight = 3.0
config.distill.hint.tap = 'aspp'
config.mesh.data = 1
dataset = load_dataset(config.data)
stage = make_stage(resolve(config), dataset.num_classes)
stage = dataclasses.replace(stage, dataset=dataset)
batch = next(iter(stage.make_batches(0)))
_, metrics = stage.make_train_step()(
  stage.init_state(), stage.teacher.variables, batch, jax.random.key(0)
)
print(json.dumps({k: float(v) for k, v in metrics.items() if not v.ndim}))
print(json.dumps([dataset.class_names, len(dataset.splits['val'])]))
print(attnfd_jax.METHODS['hint'].__name__)
"""


@pytest.fixture
def changed(tmp_path):
  """A copy of the package after all diffs, in the order of the page."""
  if not shutil.which('git'):
    pytest.skip('git apply is needed')
  ignored = shutil.ignore_patterns('__pycache__')
  for name in ('attnfd_jax', 'configs'):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
  text = (ROOT / 'docs' / 'extending.md').read_text()
  diffs = re.findall(r'^```diff\n(.*?)^```$', text, re.S | re.M)
  assert len(diffs) == 4
  for diff in diffs:
    done = subprocess.run(
      ['git', 'apply', '-'],
      cwd=tmp_path,
      # A repository around the folder for temporary files would be meant.
      env=os.environ | {'GIT_CEILING_DIRECTORIES': str(tmp_path.parent)},
      input=diff,
      text=True,
      capture_output=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
  return tmp_path


def draw_fields(root):
  """The layout that the new data set reads."""
  for split, count in (('train', 4), ('val', 2)):
    for i in range(count):
      image, ids = fixtures.draw(10 * count + i, 3)
      fixtures.write(root / split / f'{i}.jpg', image)
      fixtures.write(root / f'{split}_labels' / f'{i}.png', ids)


def test_what_the_diffs_add_trains(changed):
  draw_fields(changed / 'fields')
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=changed,
    env=os.environ
    | {'PYTHONPATH': str(changed), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  *found, method = done.stdout.splitlines()[-3:]
  metrics, facts = map(json.loads, found)
  assert facts == [['soil', 'crop', 'weed'], 2] and method == 'Hint'
  assert metrics['smooth'] > 0 and metrics['hint'] > 0
  expected = metrics['smooth'] + 3 * metrics['hint']
  assert metrics['loss'] == pytest.approx(expected, rel=1e-4)
