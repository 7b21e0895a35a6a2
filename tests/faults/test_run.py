# SPDX-License-Identifier: Apache-2.0
"""A run that is killed anywhere ends as the one that was not; refusals.

What a process leaves that is killed is what is on the disk at that moment. So
one run is photographed at many moments, and goes on from every photograph.
"""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import pytest
import small_run

from attnfd_jax.data import pipeline
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.runs import checkpoints, loading, lock
from attnfd_jax.training import experiment, loop, results
from attnfd_jax.training import stage as stage_room

pytestmark = pytest.mark.usefixtures('kept_programs')
MOMENTS = (
  'student is built',
  'student compiles',
  'student step 2',
  'student evaluates 2',
  'student saves 2',
  'student step 3',
  'student saves 4',
  'student scores',
  'student result.json',
  'results.json',
)


def make_config():
  config = small_run.make_config()
  config.stages = ('student',)
  return config


@pytest.fixture(scope='module')
def photographed(tmp_path_factory):
  """(the whole run, {moment: what was on the disk})."""
  folder = tmp_path_factory.mktemp('photographs')
  workdir, taken = folder / 'run', {}

  def photograph(moment):
    if moment not in taken:
      taken[moment] = folder / moment.replace(' ', '_')
      shutil.copytree(workdir, taken[moment])

  with pytest.MonkeyPatch.context() as patch:

    def before(owner, name, moment):
      function = getattr(owner, name)

      def wrapped(*arguments, **options):
        found = moment(*arguments)
        if found:
          photograph(found)
        return function(*arguments, **options)

      patch.setattr(owner, name, wrapped)

    def step_of(step, *_):
      return f'student step {int(step)}'

    def replaced(path, target):
      del path
      name = pathlib.Path(target).name
      stage = 'student ' if name == 'result.json' else ''
      return f'{stage}{name}' if name.startswith('result') else None

    def finished(path, target):
      """Complete, and its folder has no name yet."""
      torn = pathlib.Path(path).name.endswith('-tmp')
      return f'student saves {pathlib.Path(target).name}' if torn else None

    calls = iter(('student evaluates 2', 'student evaluates 4', None, None))
    before(stage_room, 'make_state', lambda *_: 'student is built')
    before(loop, 'train', lambda *_: 'student compiles')
    before(loop, 'check_finite', step_of)
    before(evaluation, 'evaluate', lambda *_: next(calls))
    before(os, 'rename', finished)
    before(results, 'write', lambda *_: 'student scores')
    before(os, 'replace', replaced)
    experiment.train(make_config(), workdir)
  return workdir, taken


@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_anywhere_it_ends_the_same(photographed, tmp_path, moment):
  whole, taken = photographed
  workdir = tmp_path / 'run'
  shutil.copytree(taken[moment], workdir)
  finished = (workdir / 'student' / 'result.json').exists()
  assert finished == (moment == 'results.json')
  experiment.train(make_config(), workdir)
  small_run.assert_same_run(workdir / 'student', whole / 'student')
  # A timed line of its own would be a step that is there twice.
  steps = [(r['kind'], r['step']) for r in read(workdir / 'student')]
  assert len(steps) == len(set(steps)) == 6
  table = json.loads((workdir / 'results.json').read_text())
  assert table['student']['step'] in (2, 4)
  left = [path.name for path in workdir.rglob('*tmp*')]
  assert not left


def read(directory):
  return small_run.read_lines(directory)


def test_timed_saves_change_no_bit(photographed, tmp_path):
  config = make_config()
  config.checkpoint.every_minutes = 1e-9
  experiment.train(config, tmp_path / 'run')
  ours, whole = tmp_path / 'run' / 'student', photographed[0] / 'student'
  assert small_run.read_result(ours) == small_run.read_result(whole)
  states = small_run.stored_states(ours)
  assert {3, 4} <= set(states)
  for step, state in small_run.stored_states(whole).items():
    if step in states:
      small_run.assert_same_tree(state, states[step])


def test_another_config_or_a_damaged_one_is_refused(photographed, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(photographed[0], workdir)
  config = make_config()
  config.loss.focal_gamma = 3.0
  with pytest.raises(InputError, match=r'\(loss.focal_gamma: 2.0 -> 3.0\)'):
    experiment.train(config, workdir)
  (workdir / 'config.json').write_text('{"seed"')
  with pytest.raises(InputError, match=r'config.json: damaged'):
    experiment.train(make_config(), workdir)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('checkpoint.every_minutes', 3.0),
    ('checkpoint.keep_best', 2),
    ('data.threads', 1),
    ('mesh.data', 2),
  ],
  ids=str,
)
def test_harmless_keys_may_change(photographed, tmp_path, key, value):
  workdir = tmp_path / 'run'
  shutil.copytree(photographed[0], workdir)
  config = make_config()
  config.update_from_flattened_dict({key: value})
  assert experiment.train(config, workdir)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('checkpoint.every_minutes', -1.0, 'every_minutes=-1.0 must be 0 or more'),
    ('checkpoint.keep_best', 0, 'config.checkpoint.keep_best=0 must be 1 or'),
    ('loss.class_weights', (1.0, 2.0), 'has 2 numbers for the 9 classes'),
  ],
  ids=str,
)
def test_refused_at_once(tmp_path, key, value, message):
  config = make_config()
  if key == 'loss.class_weights':
    config.loss.weighting = 'given'
  config.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    experiment.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


HOLD = """
import pathlib, sys
from attnfd_jax.runs import lock
with lock.locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_one_process_a_folder(photographed, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(photographed[0], workdir)
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(workdir)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
  )
  with process:
    assert process.stdout.readline() == 'held\n'
    owner = rf'is in use by process {process.pid} on \S+; wait'
    with pytest.raises(InputError, match=owner):
      experiment.train(make_config(), workdir)
    # Reading is free.
    loading.load_network(workdir / 'student')
    process.kill()
  experiment.train(make_config(), workdir)


def test_disks_without_locks_are_told(tmp_path, monkeypatch, capsys):
  def unsupported(*arguments):
    del arguments
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', unsupported)
  with lock.locked(tmp_path):
    assert 'this disk has no locks' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('number', 'remedy'),
  [(errno.ENOSPC, 'make room'), (errno.EROFS, 'make it writable')],
  ids=['full', 'read-only'],
)
def test_disk_errors_have_a_remedy(
  photographed, tmp_path, monkeypatch, number, remedy
):
  """While a line of metrics is written; what was saved goes on."""
  whole, taken = photographed
  workdir = tmp_path / 'run'
  shutil.copytree(taken['student step 3'], workdir)

  def refuse(self, kind, step, values):
    del self, kind, step, values
    raise OSError(number, os.strerror(number))

  with monkeypatch.context() as patch:
    patch.setattr(experiment.logs.StageLog, 'metrics', refuse)
    with pytest.raises(InputError, match=f'{remedy} and start the same') as e:
      experiment.train(make_config(), workdir)
  assert str(workdir) in str(e.value) and '\n' not in str(e.value)
  assert checkpoints.steps(workdir / 'student' / 'checkpoints') == [2]
  experiment.train(make_config(), workdir)
  small_run.assert_same_run(workdir / 'student', whole / 'student')


@pytest.mark.parametrize('when', ['step', 'evaluation'])
def test_out_of_memory_is_one_line(tmp_path, monkeypatch, when):
  def full(*arguments, **options):
    del arguments, options
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  words = 'config.batch_size=4.*as small as.*optim.remat.*optim.accumulate=2'
  if when == 'step':
    monkeypatch.setattr(stage_room, 'make_train_step', lambda *a, **k: full)
  else:
    monkeypatch.setattr(evaluation, 'evaluate', full)
    words = '--config.eval.batch_size=4 would probably fit'
  with pytest.raises(InputError, match=words) as error:
    experiment.train(make_config(), tmp_path / 'run')
  assert '\n' not in str(error.value)


def test_a_teacher_that_is_gone_is_told(photographed, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(photographed[0], workdir)
  shutil.copytree(workdir / 'student', workdir / 'teacher')
  shutil.rmtree(workdir / 'teacher' / 'checkpoints')
  before = sorted(workdir.rglob('*'))
  config = make_config()
  config.stages = ('teacher', 'distill')
  message = 'teacher: no checkpoints there, .*restore them, move the other'
  with pytest.raises(InputError, match=message):
    experiment.train(config, workdir)
  shutil.rmtree(workdir / 'teacher')
  config.stages = ('distill',)
  message = r'no config.json and no checkpoints there.*add teacher to --config'
  with pytest.raises(InputError, match=message):
    experiment.train(config, workdir)
  assert before == sorted([*workdir.rglob('*'), *gone(before, workdir)])


def gone(before, workdir):
  return [path for path in before if path.is_relative_to(workdir / 'teacher')]


class Numbered:
  """A source whose images tell which they are."""

  def __len__(self):
    return 7

  def __getitem__(self, index):
    return {'index': index}

  def name(self, index):
    return f'image {index}'


@pytest.mark.parametrize('step', [0, 3, 10])
def test_names_are_those_of_the_batch(step):
  config = small_run.make_config()
  config.batch_size, config.seed = 4, 3
  dataset = types.SimpleNamespace(splits={'train': Numbered()})
  stage = stage_room.Stage('student', config, dataset, None, None)
  names = stage.batch_names(step)
  batches = pipeline.train_batches(
    Numbered(), lambda record, rng: record, batch_size=4, seed=3
  )
  for _, batch in zip(range(step + 1), batches, strict=False):
    found = [f'image {index}' for index in batch['index']]
  assert names == found and len(names) == 4
