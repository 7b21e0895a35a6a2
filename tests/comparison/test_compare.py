# SPDX-License-Identifier: Apache-2.0
"""Comparisons of networks that compile fast: rows, resume, failures, tuning."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_run
import tiny_run

from attnfd_jax import distill
from attnfd_jax.comparison import cost, rows, running, table
from attnfd_jax.comparison.rows import Row
from attnfd_jax.config import resolve
from attnfd_jax.errors import InputError
from attnfd_jax.reporting import comparison_page
from attnfd_jax.runs import checkpoints, lock
from attnfd_jax.training import experiment

pytestmark = pytest.mark.usefixtures('kept_programs')
METHODS = ['kd', 'attnfd']
OWN = """
import flax.linen as nn


class Own(nn.Module):
  scale: float = 1.0

  def __call__(self, student, teacher, labels, *, train, step):
    x = student['logits'] - teacher['logits']
    return self.scale * (x * x).mean(), {}
"""
# Of tables, what the clock says, and where they are.
CLOCK = {'step_seconds', 'seconds', 'measured', 'train_seconds', 'command'}


def make_config():
  config = small_run.make_config()
  config.data.val_scenes = 4
  config.eval.test_split = 'test'
  return config


@pytest.fixture(autouse=True, scope='module')
def with_test_split():
  """Drawn scenes with a test split: that of val."""
  with pytest.MonkeyPatch.context() as patch:
    for room in (experiment, running):
      load = room.load_dataset

      def loaded(config, load=load, **options):
        dataset = load(config, **options)
        dataset.splits['test'] = dataset.splits['val']
        return dataset

      patch.setattr(room, 'load_dataset', loaded)
    yield


def compare(workdir, *, config=None, seeds=(0, 1), methods=METHODS, **options):
  config = make_config() if config is None else config
  return running.compare(
    config, workdir, methods=methods, seeds=list(seeds), **options
  )


def write_config(folder):
  """The file of a config with networks that compile fast."""
  path = folder / 'config.py'
  path.write_text(
    'import sys\n'
    f'sys.path.insert(0, {str(tiny_run.ROOT / "tests")!r})\n'
    'import small_run\n\n\n'
    'def get_config(arg=None):\n'
    '  config = small_run.make_config()\n'
    '  config.eval.num_pictures = 0\n'
    '  return config\n'
  )
  return path


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(folder, compare.json) of two methods and two seeds."""
  workdir = tmp_path_factory.mktemp('compare') / 'whole'
  return workdir, compare(workdir)


def untimed(value):
  """A table without what the clock says."""
  if isinstance(value, dict):
    return {k: untimed(v) for k, v in value.items() if k not in CLOCK}
  return [untimed(x) for x in value] if isinstance(value, list) else value


def of_method(found, method):
  return next(row for row in found['rows'] if row['method'] == method)


def table_of_kd(finished):
  """The table of a comparison of KD alone."""
  _, found = finished
  return untimed(found | {'rows': [of_method(found, 'kd')]})


def test_the_table(finished):
  workdir, found = finished
  assert found == json.loads((workdir / 'compare.json').read_text())
  assert [row['method'] for row in found['rows']] == ['attnfd', 'kd']
  teacher = json.loads(
    (workdir / 'teacher' / 'teacher' / 'result.json').read_text()
  )
  assert found['teacher']['val'] == teacher['miou']
  assert found['teacher']['test'] == teacher['test']['miou']
  assert found['student']['dataset'] == 'scenes'
  before = {run['seed']: run for run in found['baseline']['runs']}
  for row in found['rows']:
    assert row['equal'] == 'steps' and row['num_steps'] == 4
    assert row['step_seconds'] > 0 and row['memory_bytes'] > 0
    assert row['seconds'] == 4 * row['step_seconds']
    measured = row['measured']
    # What the machine did while a row was measured does not count.
    np.testing.assert_allclose(
      row['step_seconds'] / found['baseline']['step_seconds'],
      measured['step_seconds'] / measured['baseline_step_seconds'],
    )
    assert [run['seed'] for run in row['runs']] == [0, 1]
    for run in row['runs']:
      folder = workdir / run['folder'] / 'distill'
      result = json.loads((folder / 'result.json').read_text())
      assert run['val'] == result['miou']
      assert result['seed'] == run['seed']
      assert result['method']['name'] == row['method']
      assert result['teacher']['miou'] == teacher['miou']
    values = [run['val'] for run in row['runs']]
    differences = [
      run['val'] - before[run['seed']]['val'] for run in row['runs']
    ]
    for spread, numbers in (
      (row['val'], values),
      (row['difference']['val'], differences),
    ):
      mean = sum(numbers) / 2
      assert spread['mean'] == pytest.approx(mean)
      assert spread['std'] == pytest.approx(
        abs(numbers[0] - numbers[1]) / 2**0.5
      )
      assert spread['n'] == 2
    for name, mean in row['difference']['iou_per_class'].items():
      pairs = [
        (run['iou_per_class'][name], before[run['seed']]['iou_per_class'][name])
        for run in row['runs']
      ]
      known = [a - b for a, b in pairs if None not in (a, b)]
      assert mean == (pytest.approx(np.mean(known)) if known else None)
  assert of_method(found, 'kd')['method_params'] == 0
  assert of_method(found, 'attnfd')['method_params'] > 0


def test_the_teacher_is_scored_once(finished, capsys):
  workdir, found = finished
  capsys.readouterr()
  shutil.rmtree(workdir / 'steps' / 'kd' / 'seed1')
  again = compare(workdir)
  assert untimed(again) == untimed(found)
  printed = capsys.readouterr()
  assert 'evaluating the teacher' not in printed.err
  assert 'run 6 of 6: KD, seed 1; about' in printed.out
  assert 'measuring' not in printed.out


def test_a_row_is_repeated_by_main(finished, tmp_path):
  """The flags that the table names give the run, bit for bit."""
  workdir, found = finished
  given = [*shlex.split(found['command']), *of_method(found, 'kd')['flags']]
  flags = dict(flag.removeprefix('--config.').split('=') for flag in given)
  assert flags.pop('teacher.checkpoint') == str(workdir / 'teacher/teacher')
  assert flags == {'stages': 'distill', 'distill.method': 'kd'}
  config = make_config()
  config.stages, config.seed = ('distill',), 1
  config.distill.method = 'kd'
  config.teacher.checkpoint = str(workdir / 'teacher' / 'teacher')
  experiment.train(config, tmp_path / 'alone')
  run = workdir / 'steps' / 'kd' / 'seed1'
  small_run.assert_same_run(tmp_path / 'alone' / 'distill', run / 'distill')


def test_people_read(finished):
  workdir, found = finished
  page = (workdir / 'compare.html').read_text()
  for text in ('Equal steps', 'Over seconds', 'AttnFD', 'Baseline', 'by class'):
    assert text in page
  assert page.count('<svg') == 2
  assert 'http' not in re.sub(r'http://www.w3.org/[\w/.-]+', '', page)
  text = (workdir / 'compare.md').read_text()
  assert text == comparison_page.markdown(found)
  assert '| AttnFD | 0, 1 |' in text and '| Baseline | 0, 1 |' in text
  widths = {line.count(' |') for line in text.splitlines() if line[:2] == '| '}
  assert len(widths) == 1


@pytest.mark.parametrize(
  ('owner', 'name', 'call'),
  [
    *((checkpoints, 'save', call) for call in (1, 6, 10)),
    (cost, 'measure', 2),
  ],
)
def test_a_killed_comparison_resumes(
  finished, tmp_path, monkeypatch, owner, name, call
):
  with monkeypatch.context() as patch:
    function = small_run.interrupting(getattr(owner, name), call)
    patch.setattr(owner, name, function)
    with pytest.raises(KeyboardInterrupt):
      compare(tmp_path / 'killed', methods=['kd'])
  found = compare(tmp_path / 'killed', methods=['kd'])
  assert untimed(found) == table_of_kd(finished)


def test_a_method_that_fails_is_a_row(finished, tmp_path):
  workdir = tmp_path / 'more'
  shutil.copytree(finished[0], workdir)
  # The networks have no maps before a ReLU.
  found = compare(workdir, methods=['ofd', 'dist'], seeds=[0])
  assert [row['method'] for row in found['rows']] == [
    *('attnfd', 'dist', 'kd', 'ofd')
  ]
  failed = of_method(found, 'ofd')
  assert 'has no map' in failed['failed'] and failed['runs'] == []
  assert of_method(found, 'dist')['difference']['val']['n'] == 1
  # What was there before stays.
  before = of_method(finished[1], 'kd')
  assert untimed(of_method(found, 'kd')) == untimed(before)
  assert '| OFD | failed: ' in (workdir / 'compare.md').read_text()
  assert 'OFD failed: ' in (workdir / 'compare.html').read_text()
  with pytest.raises(InputError, match='No method finished'):
    compare(workdir, methods=['ofd'], seeds=[0])


def test_a_run_that_fails_is_noted_and_tried_again(tmp_path, monkeypatch):
  train = experiment.train

  def failing(config, workdir, **options):
    if config.distill.method == 'kd' and config.seed == 1 and options:
      if config.stages == ('distill',):
        raise InputError('Loss is not finite at step 3.')
    return train(config, workdir, **options)

  with monkeypatch.context() as patch:
    patch.setattr(experiment, 'train', failing)
    found = compare(tmp_path / 'c', methods=['kd'])
  runs = of_method(found, 'kd')['runs']
  assert [run.get('failed') for run in runs] == [
    None,
    'Loss is not finite at step 3.',
  ]
  assert of_method(found, 'kd')['val']['n'] == 1
  text = (tmp_path / 'c' / 'compare.md').read_text()
  assert '| KD | 0, 1 failed: Loss is not finite at step 3. |' in text
  found = compare(tmp_path / 'c', methods=['kd'])
  assert of_method(found, 'kd')['val']['n'] == 2


def test_a_baseline_that_fails_stops(tmp_path, monkeypatch):
  def failing(config, workdir, **options):
    raise InputError('No.')

  config = make_config()
  config.teacher.checkpoint = str(tmp_path)  # Nothing is there, nor needed.
  monkeypatch.setattr(experiment, 'train', failing)
  with pytest.raises(InputError, match=r'No\.'):
    compare(tmp_path / 'c', config=config)


def half_as_slow_again(stage, baseline, data_seconds):
  del baseline, data_seconds
  return {
    'step_seconds': 0.3 if stage.distiller else 0.2,
    'baseline_step_seconds': 0.2,
    'data_seconds': 0.0,
    'memory_bytes': 1,
    'method_params': 0,
    'device': 'none',
  }


def test_equal_seconds(finished, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cost, 'measure', half_as_slow_again)
  config = make_config()
  config.teacher.checkpoint = str(finished[0] / 'teacher' / 'teacher')
  options = {'methods': ['kd'], 'seeds': [0, 1], 'config': config}
  found = compare(tmp_path / 'c', equal='seconds', **options)
  row, baseline = of_method(found, 'kd'), found['baseline']
  assert baseline['num_steps'] == 4
  # Two thirds of the steps, in as many seconds.
  assert row['num_steps'] == 3 and row['num_epochs'] == 1.333
  assert '--config.student.num_epochs=1.333' in row['flags']
  assert '--config.eval.every_epochs=0.6667' in row['flags']
  lines = small_run.read_lines(tmp_path / 'c/seconds/kd/seed0/distill')
  assert max(line['step'] for line in lines) == 3
  # A given teacher is scored by the first run.
  assert found['teacher']['val'] == finished[1]['teacher']['val']
  assert capsys.readouterr().err.count('evaluating the teacher') == 1
  assert '## Equal seconds' in (tmp_path / 'c/compare.md').read_text()
  # Both kinds share folder and baseline.
  found = compare(tmp_path / 'c', **options)
  assert [row['equal'] for row in found['rows']] == ['steps', 'seconds']
  page = (tmp_path / 'c/compare.html').read_text()
  assert 'Equal steps' in page and 'Equal seconds' in page
  with pytest.raises(InputError, match='started with --seconds_factor=1; use'):
    compare(tmp_path / 'c', equal='seconds', seconds_factor=2.0, **options)


def test_tuning(finished, tmp_path):
  config = make_config()
  config.teacher.checkpoint = str(finished[0] / 'teacher' / 'teacher')
  found = compare(
    tmp_path / 'c',
    config=config,
    methods=['kd'],
    seeds=[0],
    tune=['distill.kd.weight:0.5,2'],
    vary=['distill.kd.temperature:1.0,4.0'],
    tune_seed=7,
  )
  keys = 'distill.kd.temperature', 'distill.kd.weight'
  tried = {tuple(x['settings'][k] for k in keys): x for x in found['tuning']}
  assert set(tried) == {(t, w) for t in (1, 4) for w in (0.5, 2)}
  assert {x['seed'] for x in tried.values()} == {7}
  # A row of each temperature, with the weight that was best on val.
  assert len(found['rows']) == 2
  for row in found['rows']:
    temperature, weight = (row['settings'][key] for key in keys)
    scores = {w: tried[temperature, w]['val'] for w in (0.5, 2)}
    assert weight == max(scores, key=scores.get)
    assert [run['seed'] for run in row['runs']] == [0]
    assert row['runs'][0]['options']['kd']['weight'] == weight
  for path in (tmp_path / 'c/tuning').glob('*/*/*/distill/result.json'):
    assert 'test' not in json.loads(path.read_text())
  assert 'Chosen on val' in (tmp_path / 'c/compare.html').read_text()


def test_two_commands_share_the_work(finished, tmp_path, monkeypatch, capsys):
  """What another command trains is waited for, and not trained twice."""
  config = make_config()
  config.teacher.checkpoint = str(finished[0] / 'teacher' / 'teacher')
  options = {'config': config, 'methods': ['kd'], 'seeds': [0]}
  folder = tmp_path / 'c' / 'steps' / 'kd'
  folder.mkdir(parents=True)
  held = lock.locked(folder, name='.seed0')
  held.__enter__()
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    held.__exit__(None, None, None)

  monkeypatch.setattr(running.time, 'sleep', sleep)
  found = compare(tmp_path / 'c', **options)
  assert len(slept) == 1
  printed = capsys.readouterr().out
  assert printed.count('waiting: another command is training the rest') == 1
  assert of_method(found, 'kd')['val']['n'] == 1


def test_two_commands_at_once(tmp_path):
  """Each run is trained once, and both end with the whole table."""
  config = write_config(tmp_path)
  arguments = [f'--config={config}', f'--workdir={tmp_path / "c"}']
  arguments += ['--methods=kd,dist', '--seeds=0,1']
  command = [sys.executable, '-m', 'attnfd_jax.compare', *arguments]
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
  options |= {'text': True, 'env': tiny_run.environment()}
  both = [subprocess.Popen(command, **options) for _ in range(2)]
  printed = [process.communicate(timeout=300)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], printed
  for text in printed:
    assert '| KD | 0, 1 |' in text and '| DIST | 0, 1 |' in text
  assert sum(text.count('] finished: val') for text in printed) == 7
  assert sum(text.count('measuring the step') for text in printed) == 3


def test_a_folder_that_moves(finished, tmp_path, monkeypatch):
  """Half done, a comparison resumes elsewhere."""
  with monkeypatch.context() as patch:
    save = small_run.interrupting(checkpoints.save, 5)
    patch.setattr(checkpoints, 'save', save)
    with pytest.raises(KeyboardInterrupt):
      compare(tmp_path / 'a', methods=['kd'])
  (tmp_path / 'a').rename(tmp_path / 'b')
  found = compare(tmp_path / 'b', methods=['kd'])
  assert untimed(found) == table_of_kd(finished)


def test_files_of_a_method_may_not_change(finished, tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(OWN)
  config = make_config()
  config.teacher.checkpoint = str(finished[0] / 'teacher' / 'teacher')
  options = {'config': config, 'methods': [f'{path}:Own']}
  compare(tmp_path / 'c', seeds=[0], **options)
  path.write_text(OWN + '\n')
  with pytest.raises(
    InputError, match='own.py has changed since the run started'
  ):
    compare(tmp_path / 'c', seeds=[1], **options)


def test_what_is_chosen_stays_chosen(finished, tmp_path, monkeypatch):
  """A candidate that failed may win when it is tried again."""
  config = make_config()
  config.teacher.checkpoint = str(finished[0] / 'teacher' / 'teacher')
  options = {'config': config, 'methods': ['kd'], 'seeds': [0]}
  options['tune'] = ['distill.kd.weight:1,2']
  train = experiment.train

  def failing(config, workdir, **given):
    if config.distill.kd.weight == failing.weight:
      raise InputError('For a passing reason.')
    return train(config, workdir, **given)

  monkeypatch.setattr(experiment, 'train', failing)
  failing.weight = 1
  # The baseline has the weight of the config, too.
  config.distill.kd.weight = 3.0
  found = compare(tmp_path / 'c', **options)
  assert [row['name'] for row in found['rows']] == ['kd,weight=2.0']
  failed, chosen = found['tuning']
  assert failed['failed'] == 'For a passing reason.' and not failed['chosen']
  assert chosen['chosen'] and chosen['val'] is not None
  failing.weight = None
  found = compare(tmp_path / 'c', **options)
  assert [row['name'] for row in found['rows']] == ['kd,weight=2.0']
  assert all(entry['val'] is not None for entry in found['tuning'])


def test_another_config_is_refused(finished):
  config = make_config()
  config.optim.lr = 0.01
  with pytest.raises(
    InputError, match=r'started with another config \(optim.lr'
  ):
    compare(finished[0], config=config)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'methods': ['kdd']}, "Unknown method 'kdd'. Did you mean 'kd'"),
    ({'methods': []}, '--methods is empty'),
    ({'methods': ['kd', 'kd']}, '--methods names kd twice'),
    ({'seeds': [0, 0]}, r'--seeds=\[0, 0\]: give different numbers'),
    ({'seeds': [-1]}, '--seeds=-1 must be from 0'),
    ({'tune_seed': -1}, '--tune_seed=-1 must be from 0'),
    ({'equal': 'epochs'}, "--equal='epochs' must be one of steps, seconds"),
    ({'seconds_factor': 0.0}, '--seconds_factor=0.0 must be'),
    ({'tune': ['kd.weight:1']}, 'expected distill.KEY:VALUE,VALUE'),
    ({'tune': ['distill.kd.weight']}, 'expected distill.KEY:VALUE,VALUE'),
    (
      {'tune': ['distill.kd.wait:1,2']},
      'the config has no key distill.kd.wait',
    ),
    ({'tune': ['distill.at.weight:1,2']}, 'at.weight is a setting of none of'),
    (
      {'tune': ['distill.kd.weight:1', 'distill.kd.weight:2']},
      'distill.kd.weight is given twice',
    ),
    (
      {'tune': ['distill.kd.weight:1'], 'vary': ['distill.kd.weight:2']},
      'distill.kd.weight is in --tune and in --vary',
    ),
    ({'tune': ['distill.kd.weight:a,b']}, "config.distill.kd.weight='a'"),
    ({'tune': ['distill.kd.weight:1,1.0']}, 'a value is given twice'),
    ({'vary': ['distill.method:kd,cwd']}, 'distill.method is not a setting of'),
    ({'methods': ['kd+kd']}, r'method=kd\+kd names kd twice'),
    ({'vary': ['distill.kd.temperature:-1.0']}, 'temperature'),
    (
      {'tune': ['distill.kd.weight:1,2'], 'tune_seed': 0},
      '--tune_seed=0 is one of --seeds',
    ),
  ],
)
def test_refusals(tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    compare(tmp_path / 'c', **options)
  assert not (tmp_path / 'c').exists()


def test_rows():
  settings = {
    'distill.kd.weight': [1, 2],
    'distill.attnfd.taps': [('aspp',), ('decoder',)],
    'distill.task_weight_schedule': ['constant'],
  }
  found = rows.make_rows('attnfd', settings)
  assert [row.title for row in found] == [
    "AttnFD (taps=('aspp',), task_weight_schedule=constant)",
    "AttnFD (taps=('decoder',), task_weight_schedule=constant)",
  ]
  assert len(rows.make_rows('kd+attnfd', settings)) == 4
  assert [row.title for row in rows.make_rows('at', {})] == ['AT']
  kd = Row('kd+cwd', (('distill.kd.weight', 2),))
  assert kd.title == 'KD + CWD (kd.weight=2)'
  assert kd.folder == kd.name == 'kd+cwd,kd.weight=2'
  # What a file system does not take is replaced, and different rows differ.
  folders = {row.folder for row in found}
  assert len(folders) == 2
  assert all(re.fullmatch(r'[\w.,=+-]+', folder) for folder in folders)


def test_settings_are_read():
  texts = ["distill.at.taps:('aspp',),('decoder',)", 'distill.kd.weight:1,0.5']
  texts += ['distill.kd.weight_schedule:constant,linear_to_zero']
  texts += ["distill.attnfd.taps:['aspp'],('decoder',)"]
  assert rows.parse_settings('vary', texts, resolve(make_config())) == {
    'distill.at.taps': [('aspp',), ('decoder',)],
    'distill.attnfd.taps': [('aspp',), ('decoder',)],
    'distill.kd.weight': [1.0, 0.5],
    'distill.kd.weight_schedule': ['constant', 'linear_to_zero'],
  }


def test_the_options_of_a_class_do_not_reach_other_rows(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(OWN)
  config = make_config()
  config.distill.options = {'scale': 2.0}
  method = f'{path}:Own'
  rows.check(resolve(config), ['kd', method], {'tune': {}, 'vary': {}})
  own = Row(method).configured(config).distill
  assert own.options.scale == 2.0
  assert not Row('kd').configured(config).distill.options
  assert Row(method).title == 'Own' and '/' not in Row(method).folder
  assert distill.title(method) == 'Own'


def test_the_command(tmp_path):
  config = write_config(tmp_path)
  given = [f'--config={config}', f'--workdir={tmp_path / "c"}']
  done = tiny_run.run_verb('compare', *given, '--methods=kd', '--seeds=3')
  assert done.returncode == 0, done.stderr
  assert '| KD | 3 |' in done.stdout and 'compare.html' in done.stdout
  found = json.loads((tmp_path / 'c' / 'compare.json').read_text())
  teacher = f'--config.teacher.checkpoint={tmp_path}/c/teacher/teacher'
  command = f'python -m attnfd_jax.main --config={config} {teacher}'
  assert found['command'] == command
  for flags, message in (
    ([], 'error: --methods is missing'),
    (['--methods=kd', '--seeds=a'], 'error: --seeds=a: give numbers'),
    (['--methods=kx'], "error: Unknown method 'kx'"),
  ):
    quickstart = f'--config={tiny_run.ROOT / "configs" / "quickstart.py"}'
    done = tiny_run.run_verb('compare', quickstart, given[1], *flags)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and message in done.stderr


def test_scores_of_a_teacher_that_nobody_scored(tmp_path):
  assert table.teacher_record(tmp_path) is None
