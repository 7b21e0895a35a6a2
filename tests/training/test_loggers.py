# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and W&B show what metrics.jsonl has, every step once."""

import struct
import sys
import types

import pytest
import small_run

from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs import loggers, logs


class FakeWandb(types.ModuleType):
  """The few names in use, over a server that keeps runs by their id."""

  def __init__(self, account=True):
    super().__init__('wandb')
    self.account, self.server, self.options = account, {}, {}

  def login(self):
    if not self.account:
      raise ValueError('api_key not configured (no-tty).\nMore.')

  def init(self, *, id, resume, **options):
    assert resume == 'allow'
    self.options = options
    return FakeRun(self.server.setdefault(id, {}))


class FakeRun:
  def __init__(self, history):
    self.history = history
    self.step = max(history, default=-1) + 1

  def log(self, values, *, step):
    assert step >= self.step, 'wandb drops it with a warning'
    self.step = step
    self.history.setdefault(step, {}).update(values)

  def finish(self):
    self.step = None


@pytest.fixture
def wandb(monkeypatch):
  module = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def told(directory):
  """{(name, step): value} of metrics.jsonl, as a logger should have it."""
  found = {}
  for record in small_run.read_lines(directory):
    kind, step = record.pop('kind'), record.pop('step')
    for name, value in record.items():
      table = value if isinstance(value, dict) else {'': value}
      for entry, number in table.items():
        if number is not None:
          found[f'{kind}/{name}/{entry}'.rstrip('/'), step] = number
  return found


def shown_by_tensorboard(directory):
  """The same from its event files; a new session hides the steps it names."""
  from tensorboardX.proto import event_pb2

  found = {}
  for path in sorted(directory.glob('events.out.tfevents.*')):
    data = path.read_bytes()
    while data:  # Length, its checksum, event, its checksum.
      (size,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField('session_log'):
        found = {key: x for key, x in found.items() if key[1] < event.step}
      for value in event.summary.value:
        assert (value.tag, event.step) not in found
        found[value.tag, event.step] = value.simple_value
  return found


def part(directory, names, steps, *, goes_on_at=0):
  """A process that writes `steps`; returns its lines for people."""
  directory.mkdir(parents=True, exist_ok=True)
  said, log = [], logs.StageLog(directory)
  log.line = said.append
  log.truncate_after(goes_on_at)
  with loggers.attached(names, log, {'seed': 3}):
    for step in steps:
      log.metrics('train', step, {'loss': 1 / step, 'grad_norm': step})
      if step % 2 == 0:
        table = {'road': 0.5, 'absent': None}
        log.metrics('eval', step, {'miou': 0.5, 'iou_per_class': table})
  return said


def test_both_have_every_step_once(tmp_path, wandb):
  directory = tmp_path / 'run' / 'student'
  assert not part(directory, ('tensorboard',), (1, 2, 3))
  # W&B comes later, and a second kill leaves steps after the checkpoint.
  names = ('tensorboard', 'wandb')
  assert not part(directory, names, (3, 4, 5), goes_on_at=2)
  assert not part(directory, names, (5, 6), goes_on_at=4)
  wanted = told(directory)
  assert len(wanted) == 2 * 6 + 2 * 3
  assert wanted['eval/iou_per_class/road', 6] == 0.5
  assert shown_by_tensorboard(directory) == pytest.approx(wanted, rel=1e-6)
  (history,) = wandb.server.values()
  assert wanted == {
    (name, step): value
    for step, values in history.items()
    for name, value in values.items()
  }
  assert wandb.options['name'] == 'run/student'
  assert wandb.options['config'] == {'seed': 3}


def test_another_folder_is_another_page(tmp_path, wandb):
  for name in ('a', 'b'):
    part(tmp_path / name / 'student', ('wandb',), (1,))
  assert len(wandb.server) == 2


@pytest.mark.parametrize('when', ['init', 'log', 'finish'])
def test_a_logger_that_fails_is_left_out(tmp_path, wandb, monkeypatch, when):
  def refuse(*args, **options):
    raise OSError('No network.\nMore.')

  owner = wandb if when == 'init' else FakeRun
  monkeypatch.setattr(owner, when, refuse)
  (line,) = part(tmp_path, ('wandb', 'tensorboard'), (1, 2))
  assert line == (
    'wandb failed (No network.) and is turned off; all numbers are in '
    'metrics.jsonl'
  )
  shown = shown_by_tensorboard(tmp_path)
  assert shown == pytest.approx(told(tmp_path)) and len(shown) == 6


@pytest.mark.parametrize(
  ('name', 'package'), [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')]
)
def test_a_missing_package_is_one_line(monkeypatch, name, package):
  monkeypatch.setitem(sys.modules, package, None)
  message = rf"pip install -e '\.\[{name}\]', or leave {name} out"
  with pytest.raises(InputError, match=message) as error:
    loggers.check((name,))
  assert '\n' not in str(error.value)


def test_a_missing_account_is_one_line(wandb):
  loggers.check(('wandb',))
  wandb.account = False
  with pytest.raises(InputError, match='no-tty.*WANDB_MODE=offline') as error:
    loggers.check(('wandb',))
  assert '\n' not in str(error.value)


def test_only_the_first_process_writes(tmp_path, monkeypatch, wandb):
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  wandb.account = False  # Nor has another one.
  loggers.check(('wandb',))
  part(tmp_path, ('tensorboard', 'wandb'), (1,))
  assert not wandb.server and not list(tmp_path.iterdir())
