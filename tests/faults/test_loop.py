# SPDX-License-Identifier: Apache-2.0
"""The loop with a step of one addition: signals, timed saves, NaN, memory."""

import contextlib
import json
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.devices import memory
from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints, logs
from attnfd_jax.training import loop
from attnfd_jax.training.step import TrainState
from attnfd_jax.training.stopping import Stop, Stopped

RUN = {'seed': 0}


def make_state():
  zero = jnp.zeros((), jnp.float32)
  return TrainState(
    step=jnp.int32(0),
    params={'student': {'w': zero}},
    collections={'student': {'batch_stats': {'mean': zero}}},
    opt_state=(),
    ema={},
  )


def add(state, teacher_variables, batch, rng):
  """Adds the batch, which is the number of its step."""
  del teacher_variables, rng
  w = state.params['student']['w'] + batch
  metrics = {'loss': w, 'grad_norm': w, 'learning_rate': jnp.float32(0.5)}
  params = {'student': {'w': w}}
  return state.replace(step=state.step + 1, params=params), metrics


def make_batches(step):
  while True:
    step += 1
    yield jnp.float32(step)


def evaluate(variables):
  # The best is the first one.
  return {'miou': 1 / (1 + float(variables['params']['w']))}


def train(
  folder,
  stop=None,
  train_step=add,
  log_every=1,
  save_minutes=0,
  cache=False,
  **changes,
):
  """8 steps, scored after 4 and 8; returns the final weight."""
  folder.mkdir(exist_ok=True)
  saved = folder / 'checkpoints'
  state, step = checkpoints.restore_latest(saved, make_state(), RUN)
  log = logs.StageLog(folder)
  log.truncate_after(step)
  stage = {
    'make_train_step': lambda: train_step,
    'teacher': None,
    'make_batches': make_batches,
    'batch_names': lambda step: [f'image {step}'],
    'evaluate': evaluate,
    'rng': None,
    'run_facts': RUN,
    'num_steps': 8,
    'eval_every': 4,
    'config': types.SimpleNamespace(
      log_every_steps=log_every,
      batch_size=2,
      checkpoint=types.SimpleNamespace(every_minutes=save_minutes),
      data=types.SimpleNamespace(cache=cache, decoded_cache='', workers=0),
    ),
  } | changes
  stage = types.SimpleNamespace(**stage)
  with checkpoints.managed(saved) as manager:
    state = loop.train(
      stage, state, manager=manager, log=log, stop=stop or Stop()
    )
  return float(state.params['student']['w'])


def read_steps(folder):
  text = (folder / 'metrics.jsonl').read_text()
  records = [json.loads(line) for line in text.splitlines()]
  return [(record['kind'], record['step']) for record in records]


WHOLE = [('train', i) for i in range(1, 5)] + [('eval', 4)]
WHOLE += [('train', i) for i in range(5, 9)] + [('eval', 8)]


def test_timed_saves_disturb_nothing(tmp_path, monkeypatch):
  assert train(tmp_path / 'plain') == 36
  assert checkpoints.steps(tmp_path / 'plain/checkpoints') == [4, 8]
  saved = []
  save = checkpoints.save

  def note(manager, step, *arguments, miou=None):
    saved.append((step, miou is not None))
    save(manager, step, *arguments, miou=miou)

  monkeypatch.setattr(checkpoints, 'save', note)
  assert train(tmp_path / 'timed', save_minutes=1e-9) == 36
  assert saved == [(i, i in (4, 8)) for i in range(1, 9)]
  # The best is 4; 7 and 8 are the last two.
  assert checkpoints.steps(tmp_path / 'timed/checkpoints') == [4, 7, 8]
  assert read_steps(tmp_path / 'timed') == WHOLE
  saved.clear()
  train(tmp_path / 'later', save_minutes=100)
  assert saved == [(4, True), (8, True)]


def test_advice_is_given_once_where_the_step_waits(tmp_path, capsys):
  def slow_batches(step):
    for batch in make_batches(step):
      time.sleep(0.02)
      yield batch

  def slow_step(*arguments):
    time.sleep(0.1)  # A tenth is what a busy machine may take for a batch.
    return add(*arguments)

  train(tmp_path / 'waits', make_batches=slow_batches)
  assert capsys.readouterr().out.count('the step waits for data: config.') == 1
  train(tmp_path / 'cached', make_batches=slow_batches, cache=True)
  lines = capsys.readouterr().out
  assert 'data: config.data.workers' in lines and 'data.cache' not in lines
  train(tmp_path / 'works', train_step=slow_step)
  assert 'the step waits' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('signum', 'code', 'name'),
  [(signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')],
  ids=['SIGTERM', 'SIGINT'],
)
def test_a_signal_finishes_the_step(tmp_path, capsys, signum, code, name):
  def step(state, *arguments):
    if state.step == 5:
      signal.raise_signal(signum)
    return add(state, *arguments)

  with Stop().listening() as stop:
    with pytest.raises(Stopped) as stopped:
      train(tmp_path / 'run', stop, train_step=step)
  assert stopped.value.code == code
  line = f'stopped by {name}, saved at step 6; the same command resumes there'
  assert capsys.readouterr().out.splitlines()[-1] == f'[run] {line}'
  assert checkpoints.steps(tmp_path / 'run/checkpoints') == [4, 6]
  assert train(tmp_path / 'run') == 36
  assert read_steps(tmp_path / 'run') == WHOLE


@pytest.mark.parametrize('at', [4, 8])
def test_a_signal_in_an_evaluation_does_not_wait_for_it(tmp_path, at):
  """What was trained is saved, and scored after the restart."""

  def slow(variables):
    if variables['params']['w'] == sum(range(at + 1)):
      signal.raise_signal(signal.SIGTERM)
      raise AssertionError('goes on evaluating')
    return evaluate(variables)

  with Stop().listening() as stop:
    with pytest.raises(Stopped) as stopped:
      train(tmp_path / 'run', stop, evaluate=slow)
  assert stopped.value.code == 143
  saved = tmp_path / 'run' / 'checkpoints'
  assert checkpoints.steps(saved)[-1] == at
  assert train(tmp_path / 'run') == 36
  assert read_steps(tmp_path / 'run') == WHOLE
  with checkpoints.managed(saved) as manager:
    assert (manager.best_step(), manager.latest_step()) == (4, 8)
    assert manager.metrics(8) == {'miou': 1 / 37}


def test_a_second_ctrl_c_is_not_waited_for(tmp_path):
  def step(state, *arguments):
    if state.step == 5:
      signal.raise_signal(signal.SIGTERM)
      signal.raise_signal(signal.SIGTERM)  # Schedulers do that.
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)
      raise AssertionError('goes on')
    return add(state, *arguments)

  with Stop().listening() as stop:
    with pytest.raises(Stopped, match='130') as stopped:
      train(tmp_path / 'run', stop, train_step=step)
  assert 'resumes from the last checkpoint' in stopped.value.message
  assert train(tmp_path / 'run') == 36


def test_outside_of_training_a_signal_ends_at_once():
  before = signal.getsignal(signal.SIGTERM)
  with Stop().listening():
    with pytest.raises(Stopped) as stopped:
      signal.raise_signal(signal.SIGTERM)
  assert stopped.value.code == 143
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize('log_every', [1, 20], ids=['logged', 'between'])
@pytest.mark.parametrize('value', ['loss', 'grad_norm'])
def test_not_finite_stops_at_the_first_step(tmp_path, value, log_every):
  def step(state, *arguments):
    new, metrics = add(state, *arguments)
    if state.step == 5:
      metrics[value] = metrics[value] * jnp.float32('inf')
    return new, metrics

  what = {'loss': 'Loss', 'grad_norm': 'Gradient'}[value]
  # learning_rate, terms, names of the batch, checkpoint.
  message = (
    rf'{what} is not finite at step 6: .*learning_rate 0\.5, loss .*\. Images: '
    r'image 5\. Last good checkpoint: step 4\. Lower .*clip_norm=1'
  )
  with pytest.raises(loop.NonFiniteLoss, match=message):
    train(tmp_path / 'run', train_step=step, log_every=log_every)
  assert checkpoints.steps(tmp_path / 'run/checkpoints') == [4]


@pytest.mark.parametrize('part', ['params', 'collections'])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, part):
  """The loss of a step is that of the weights before it."""

  def step(state, *arguments):
    state, metrics = add(state, *arguments)
    if state.step == 8:
      bad = jax.tree.map(lambda x: x * np.float32('nan'), getattr(state, part))
      state = state.replace(**{part: bad})
    return state, metrics

  message = 'Update of the weights is not finite at step 8: .*step 4'
  with pytest.raises(loop.NonFiniteLoss, match=message):
    train(tmp_path / 'run', train_step=step)
  assert checkpoints.steps(tmp_path / 'run/checkpoints') == [4]


def out_of_memory(text='Out of memory allocating 3000000000 bytes.'):
  return jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {text}')


class Device:
  def __init__(self, stats):
    self._stats = stats

  def memory_stats(self):
    return self._stats


@pytest.mark.parametrize(
  ('stats', 'text', 'options', 'words'),
  [
    (
      None,
      '',
      {'accumulate': 1},
      ['--config.batch_size=8 would', 'remat=True'],
    ),
    (
      {'bytes_limit': 3e9, 'bytes_in_use': 1e9},
      'trying to allocate 3000000000 bytes.',
      {'accumulate': 2},
      ['(3.0 GB needed, 2.0 GB free)', 'batch_size=8 ', 'accumulate=4'],
    ),
    (
      None,
      'Ran out of memory in memory space hbm. Used 20.00G of 15.00G hbm.',
      {'accumulate': 1},
      ['(21.5 GB needed, 16.1 GB free)', '--config.batch_size=8 '],
    ),
    (None, '', {'accumulate': 4}, ['batch_size is as small as it can be']),
    (
      None,
      '',
      {},
      ['config.eval.batch_size=16', '--config.eval.batch_size=8 '],
    ),
  ],
  ids=['unknown', 'gpu', 'tpu', 'smallest', 'evaluation'],
)
def test_out_of_memory_names_a_batch(monkeypatch, stats, text, options, words):
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(stats)])
  with pytest.raises(InputError) as error:
    with memory.explain_exhaustion(16, devices=4, **options):
      raise out_of_memory(text)
  line = str(error.value)
  assert '\n' not in line
  for word in words:
    assert word in line


def test_other_errors_of_a_device_are_not_memory():
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    with memory.explain_exhaustion(16, devices=4, accumulate=1):
      raise jax.errors.JaxRuntimeError('INTERNAL: something else')


def test_a_reader_that_ctrl_c_ended_is_no_error(tmp_path):
  """Ctrl-C reaches all processes of a terminal."""

  def broken(step):
    with contextlib.closing(make_batches(step)) as batches:
      yield from (next(batches) for _ in range(5))
    signal.raise_signal(signal.SIGINT)
    raise RuntimeError('worker died')

  with Stop().listening() as stop:
    with pytest.raises(Stopped):
      train(tmp_path / 'run', stop, make_batches=broken)
  assert checkpoints.steps(tmp_path / 'run/checkpoints') == [4, 5]
  with pytest.raises(RuntimeError, match='worker died'):
    train(tmp_path / 'other', make_batches=lambda step: fail())


def fail():
  raise RuntimeError('worker died')
  yield
