# SPDX-License-Identifier: Apache-2.0
"""The training loop: evaluate, save, stop, next batch, step, log."""

import math
import time

import jax

from attnfd_jax.errors import InputError
from attnfd_jax.training import checkpoints
from attnfd_jax.training import logs


class NonFiniteLoss(InputError):
  """The loss became NaN or infinite; what is saved stays."""


def _check_finite(step, metrics, manager):
  if not math.isfinite(metrics['loss']):
    terms = ', '.join(
      f'{name} {value:.4g}' for name, value in sorted(metrics.items())
    )
    raise NonFiniteLoss(
      f'Loss is not finite at step {step}: {terms}. Last good checkpoint: step '
      f'{manager.latest_step()}. Lower --config.optim.lr or set '
      '--config.optim.clip_norm=1.'
    )


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


def train(
  state,
  *,
  train_step,
  teacher_variables,
  make_batches,
  evaluate,
  manager,
  run,
  log,
  rng,
  num_steps,
  eval_every,
  log_every,
  batch_size,
):
  """Trains until `num_steps`, from wherever `state` is; returns the state.

  Args:
    state: TrainState; donated.
    train_step: (state, teacher_variables, batch, rng) -> state, metrics.
    teacher_variables: of the frozen teacher, or {}.
    make_batches: first step -> iterator of batches on devices.
    evaluate: variables -> dict of metrics with 'miou'.
    manager: Orbax manager; a checkpoint is saved after each evaluation.
    run: what a checkpoint must agree with to be resumed; see checkpoints.py.
    log: StageLog.
    rng: key; the step folds its number in.
    num_steps: where to stop.
    eval_every, log_every: steps.
    batch_size: global, for the speed.

  Raises:
    NonFiniteLoss: at the first logged step with such a loss.
  """
  step = first = int(state.step)
  if step >= num_steps:
    return state
  batches = iter(make_batches(step))
  clock = _Clock(step, num_steps, batch_size)
  metrics = None
  best = -math.inf
  if manager.best_step() is not None:
    best = manager.metrics(manager.best_step())['miou']
  while True:
    if step > first and (step % eval_every == 0 or step == num_steps):
      # Before saving: a network with NaN weights must not be kept.
      _check_finite(step, jax.device_get(metrics), manager)
      start = time.monotonic()
      scores = evaluate(state.student_variables())
      best = max(best, scores['miou'])
      log.line(
        f'step {step}/{num_steps}  val mIoU {100 * scores["miou"]:.2f}  (best '
        f'{100 * best:.2f}, {logs.duration(time.monotonic() - start)})'
      )
      log.metrics('eval', step, scores)
      checkpoints.save(manager, step, state, run, miou=scores['miou'])
      if step == eval_every:
        manager.wait_until_finished()  # Errors of saving come late.
      clock.reset(step)
    if step == num_steps:
      manager.wait_until_finished()
      return state
    batch = clock.wait(batches)
    if step == first:
      log.line('compiling the training step ...')
      start = time.monotonic()
    state, metrics = train_step(state, teacher_variables, batch, rng)
    step += 1
    due = step % log_every == 0 or step == num_steps
    if step == first + 1:
      jax.block_until_ready(metrics)
      seconds = time.monotonic() - start
      log.line(f'first step after {seconds:.1f} s; faster next time, cached')
    elif not due:
      continue
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    _check_finite(step, values, manager)
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
    if due:
      log.metrics('train', step, values)
      log.line(f'step {step}/{num_steps}  {terms}')
