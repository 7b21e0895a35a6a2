# SPDX-License-Identifier: Apache-2.0
"""Commands as users have them: bad input is one line and exit code 2."""

import concurrent.futures
import os
import subprocess
import sys

import pytest
import tiny_run

from attnfd_jax import cli

CONFIG = f'--config={tiny_run.ROOT}/configs/camvid.py'
CHECKS = """
import sys
import attnfd_jax
found = {'cv2', 'grain', 'orbax', 'matplotlib', 'absl.app'} & {*sys.modules}
assert not found, found
import attnfd_jax.main
from attnfd_jax.inference import image_files, scoring
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.sources import load_dataset
config = resolve(default_config())
load_dataset(config.data).splits['val'][0]
found = {'tensorflow', 'torch', 'pandas'} & {*sys.modules}
assert not found, found
import jax
assert not jax._src.xla_bridge._backends, 'importing started a backend'
"""
MAIN = ('-m', 'attnfd_jax.main')
# Arguments, and words of the one line.
BAD = {
  'key': (
    (CONFIG, '--config.optim.head_lr=1'),
    ('No key head_lr in this group of --config.',),
  ),
  'path': (('--config=configs/camvidd.py',), ('camvidd.py', '(--config)')),
  'variant': (
    (f'{CONFIG}:degub',),
    ("Unknown variant 'degub'; use debug, cpu or nothing.",),
  ),
  'value': ((CONFIG, '--config.optim.lr=fast'), ('optim.lr', 'fast')),
  'flag': ((CONFIG, '--workdr=x'), ("'workdr'", 'Did you mean: workdir')),
  'missing': ((), ('--config is missing: configs/NAME.py',)),
  'word': ((CONFIG, 'train'), ("Unknown argument 'train'; flags start",)),
}
GOOD = {
  'debug': (*MAIN, CONFIG, '--debug', '--config.data.root=gone'),
  'help': (*MAIN, '--help'),
  'imports': ('-c', CHECKS),
}
COMMANDS = GOOD | {name: (*MAIN, *case[0]) for name, case in BAD.items()}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """Name -> finished process; two at a time, for imports take seconds."""
  folder = tmp_path_factory.mktemp('cli')
  environment = os.environ | {
    'PYTHONPATH': str(tiny_run.ROOT),
    # ml_collections loads configs by a deprecated way.
    'PYTHONWARNINGS': 'error,ignore:the load_module():DeprecationWarning',
    'XDG_CACHE_HOME': str(tmp_path_factory.mktemp('cache')),
  }

  def run(arguments):
    return subprocess.run(
      [sys.executable, *arguments],
      capture_output=True,
      text=True,
      cwd=folder,
      env=environment,
      check=False,
    )

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    processes = list(pool.map(run, COMMANDS.values()))
  # Nothing of this leaves a trace.
  assert not list(folder.iterdir())
  return dict(zip(COMMANDS, processes, strict=True))


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    # As ml_collections 1 and absl raise them.
    (
      AttributeError(KeyError('\'lrr\'\nDid you mean "lr" instead of "lrr"?')),
      'No key lrr. Did you mean "lr" instead of "lrr"?',
    ),
    (
      KeyError('\'optimm\'\nDid you mean "optim" instead of "optimm"?'),
      'No key optimm. Did you mean "optim" instead of "optimm"?',
    ),
    (
      AttributeError(KeyError("'zzz'")),
      'No key zzz in this group of --config.',
    ),
    (
      ValueError("Unknown command line flag 'config.x.lr'"),
      "Unknown command line flag 'config.x.lr'",
    ),
    (ValueError('two\n  lines'), 'two lines'),
    (ValueError(), 'ValueError'),
  ],
  ids=['near', 'group', 'far', 'flag', 'lines', 'empty'],
)
def test_one_line(error, line):
  assert cli._one_line(error) == line


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(done, name):
  process = done[name]
  assert process.returncode == 2, process.stderr
  assert process.stdout == ''
  (line,) = process.stderr.splitlines()
  assert line.startswith('error: ')
  for word in BAD[name][1]:
    assert word in line


def test_debug_shows_where(done):
  process = done['debug']
  assert process.returncode == 2
  lines = process.stderr.splitlines()
  assert 'Traceback (most recent call last):' in lines
  assert lines[-1].startswith('error: gone: no such folder')
  assert '--config.data.root=PATH' in lines[-1]


def test_help_names_the_flags(done):
  process = done['help']
  assert process.returncode in (0, 1)  # absl exits with 1.
  assert '--config' in process.stdout and '--workdir' in process.stdout
  assert process.stderr == ''


def test_imports_are_light(done):
  assert done['imports'].returncode == 0, done['imports'].stderr
