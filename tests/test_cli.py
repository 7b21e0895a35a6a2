# SPDX-License-Identifier: Apache-2.0
"""Commands as users have them: bad input is one line and exit code 2."""

import subprocess
import sys

import pytest
import tiny_run

CONFIG = f'--config={tiny_run.ROOT}/configs/camvid.py'


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (
      (CONFIG, '--config.optim.learning_rate=1'),
      ('learning_rate',),
    ),
    (('--config=configs/camvidd.py',), ('camvidd.py', '--config')),
    ((f'{CONFIG}:degub',), ("Unknown variant 'degub'", 'debug')),
    ((CONFIG, '--config.optim.lr=fast'), ('fast',)),
    ((CONFIG, '--wrkdir=x'), ('wrkdir',)),
    ((), ('--config',)),
  ],
  ids=['key', 'path', 'variant', 'value', 'flag', 'missing'],
)
def test_bad_input_is_one_line(arguments, words):
  done = tiny_run.run_verb('main', *arguments)
  assert done.returncode == 2
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line


def test_debug_shows_where():
  done = tiny_run.run_verb(
    'main', CONFIG, '--debug', '--config.data.root=gone', '--workdir=gone'
  )
  assert done.returncode == 2
  assert 'Traceback (most recent call last)' in done.stderr
  assert done.stderr.splitlines()[-1].startswith('error: gone/train: no such')
  assert '--config.data.root=PATH' in done.stderr.splitlines()[-1]


def test_help_names_the_flags():
  done = tiny_run.run_verb('main', '--help')
  assert done.returncode in (0, 1)  # absl exits with 1.
  assert '--config' in done.stdout and '--[no]debug' in done.stdout
  assert 'Traceback' not in done.stderr


HEAVY = "{'tensorflow', 'torch', 'pandas'}"
CHECKS = f"""
import sys
import attnfd_jax
library = {{'cv2', 'grain', 'orbax', 'matplotlib', 'absl.app'}} & {{*sys.modules}}
assert not library, library
import attnfd_jax.main, attnfd_jax.predict, attnfd_jax.evaluate
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.sources import load_dataset
config = resolve(default_config())
load_dataset(config.data).splits['val'][0]
heavy = {HEAVY} & {{*sys.modules}}
assert not heavy, heavy
import jax
assert not jax._src.xla_bridge._backends, 'importing started a backend'
"""


def test_imports_are_light():
  done = subprocess.run(
    [sys.executable, '-c', CHECKS],
    capture_output=True,
    text=True,
    cwd=tiny_run.ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stderr
