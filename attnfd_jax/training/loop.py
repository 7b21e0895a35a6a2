# SPDX-License-Identifier: Apache-2.0
"""The training loop: evaluate, save, stop, next batch, step, log."""

import math
import signal
import time

import jax

from attnfd_jax.devices import processes
from attnfd_jax.runs import checkpoints, logs
from attnfd_jax.training import finite
from attnfd_jax.training.stopping import Stopped

_MUCH_WAITING = 0.1  # Of the time; then there is advice, once.


class _Clock:
  """Speed since the last reading, and the time left."""

  def __init__(self, step, num_steps, batch_size):
    self._num_steps, self._batch_size = num_steps, batch_size
    self.reset(step)

  def reset(self, step):
    self._step, self._waited = step, 0.0
    self._start = time.monotonic()

  def wait(self, iterator):
    """Next batch; the time it takes counts as waiting for data."""
    start = time.monotonic()
    batch = next(iterator)
    self._waited += time.monotonic() - start
    return batch

  def read(self, step):
    elapsed = max(time.monotonic() - self._start, 1e-9)
    seconds = elapsed / (step - self._step)
    reading = {
      'step_seconds': seconds,
      'images_per_second': self._batch_size / seconds,
      'data_wait': self._waited / elapsed,
    }
    self.reset(step)
    left = logs.duration(seconds * (self._num_steps - step))
    return reading, left


class _Timer:
  """Whether the time has come for a checkpoint without evaluation."""

  def __init__(self, minutes):
    self._seconds = 60 * minutes
    self.reset()

  def reset(self):
    self._start = time.monotonic()

  def due(self):
    return 0 < self._seconds <= time.monotonic() - self._start


def train(
  state,
  *,
  train_step,
  teacher_variables,
  make_batches,
  batch_names,
  evaluate,
  manager,
  run,
  log,
  rng,
  num_steps,
  eval_every,
  log_every,
  save_minutes,
  batch_size,
  stop,
):
  """Trains until `num_steps`, from wherever `state` is; returns the state.

  Args:
    state: TrainState; donated.
    train_step: (state, teacher_variables, batch, rng) -> state, metrics.
    teacher_variables: of the frozen teacher, or {}.
    make_batches: first step -> iterator of batches on devices.
    batch_names: step -> names of the images of the batch that follows it.
    evaluate: variables -> dict of metrics with 'miou'.
    manager: Orbax manager; a checkpoint is saved after each evaluation.
    run: what a checkpoint must agree with to be resumed; see checkpoints.py.
    log: StageLog.
    rng: key; the step folds its number in.
    num_steps: where to stop.
    eval_every, log_every: steps.
    save_minutes: at most this long without a checkpoint; 0 is without limit.
    batch_size: global, for the speed.
    stop: stopping.Stop.

  Raises:
    NonFiniteLoss: at the first step with such a loss.
    Stopped: after a signal, when the last step is saved.
  """
  step = first = saved = int(state.step)
  # A run that was stopped in an evaluation has saved without its metrics.
  scored = step if step and manager.metrics(step) else None
  if step == scored == num_steps:
    return state
  batches = iter(make_batches(step))
  clock, timer = _Clock(step, num_steps, batch_size), _Timer(save_minutes)
  unchecked = metrics = None
  hinted = False
  best = -math.inf
  if manager.best_step() is not None:
    best = manager.metrics(manager.best_step())['miou']

  def check(number, values):
    finite.check_metrics(number, values, names=batch_names, manager=manager)

  def save(miou=None):
    if metrics is not None:
      check(step, metrics)
      finite.check_state(
        step, state, metrics, names=batch_names, manager=manager
      )
    checkpoints.save(manager, step, state, run, miou=miou)
    log.upload()
    if saved == first:
      checkpoints.wait(manager)  # Errors of saving come late.
    timer.reset()
    clock.reset(step)

  with stop.deferred():
    while True:
      due = step % eval_every == 0 or step == num_steps
      if step and due and scored != step:
        if metrics is not None:
          check(step, metrics)  # Before an evaluation in vain.
        start = time.monotonic()
        scores = stop.attempt(evaluate, state.variables('student'))
        if scores is not None:
          best = max(best, scores['miou'])
          log.line(
            f'step {step}/{num_steps}  val mIoU {100 * scores["miou"]:.2f}  '
            f'(best {100 * best:.2f}, '
            f'{logs.duration(time.monotonic() - start)})'
          )
          # The line is there before the checkpoint: a restart drops what is
          # newer than its checkpoint, and writes nothing older again.
          log.metrics('eval', step, scores)
          save(miou=scores['miou'])
          saved = scored = step
      elif saved != step and _any_due(timer, step, log_every):
        save()
        saved = step
      if stop.signum or manager.reached_preemption(step):
        if saved != step:
          save()
        checkpoints.wait(manager)
        log.line(
          f'stopped by {stop.name}, saved at step {step}; the same command '
          'resumes there'
        )
        raise Stopped(stop.signum or signal.SIGTERM)
      if step == num_steps:
        checkpoints.wait(manager)
        return state
      try:
        batch = clock.wait(batches)
      except Exception:
        # Ctrl-C also ends the processes that read.
        if not stop.signum:
          raise
        continue
      if step == first:
        log.line('compiling the training step ...')
        start = time.monotonic()
      state, metrics = train_step(state, teacher_variables, batch, rng)
      step += 1
      if unchecked:
        check(*unchecked)  # One step late: the device is not kept waiting.
      unchecked = step, metrics
      logged = step % log_every == 0 or step == num_steps
      if step == first + 1:
        jax.block_until_ready(metrics)
        seconds = time.monotonic() - start
        log.line(f'first step after {seconds:.1f} s; faster next time, cached')
      elif not logged:
        continue
      check(*unchecked)
      unchecked = None
      values = {name: float(x) for name, x in jax.device_get(metrics).items()}
      shown = ('loss', *sorted(set(values) - {'loss', 'learning_rate'}))
      terms = '  '.join(
        f'{name} {values[name]:.4f}' for name in shown if name.count('_') < 2
      )
      if step == first + 1:
        clock.reset(step)  # Its time is that of the compiler.
      else:
        speed, left = clock.read(step)
        values |= speed
        terms += (
          f'  {speed["images_per_second"]:.1f} images/s  '
          f'waiting {speed["data_wait"]:.0%}  left {left}'
        )
      if logged:
        log.metrics('train', step, values)
        log.line(f'step {step}/{num_steps}  {terms}')
        if not hinted and values.get('data_wait', 0) > _MUCH_WAITING:
          hinted = True
          log.line(
            'the step waits for data: config.data.cache=True keeps decoded '
            'images in memory, config.data.workers=2 decodes in more processes'
          )


def _any_due(timer, step, log_every):
  # Clocks of processes differ, and to ask all of them is not free.
  if jax.process_count() > 1 and step % log_every:
    return False
  return processes.any_of(timer.due())
