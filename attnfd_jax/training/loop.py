# SPDX-License-Identifier: Apache-2.0
"""The training loop: evaluate, save, stop, next batch, step, log."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import math
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from attnfd_jax import progress
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints, logs
from attnfd_jax.training.stage import Stage
from attnfd_jax.training.step import TrainState
from attnfd_jax.training.stopping import Stop, Stopped
from attnfd_jax.types import Config, PyTree

_MAX_NAMES = 16  # Images of a batch that a message names.


class NonFiniteLoss(InputError):
  """The loss, a gradient or an update is NaN or infinite."""


def check_finite(
  step: int,
  metrics: Mapping[str, jax.Array],
  *,
  names: Callable[[int], Sequence[str]],
  manager: ocp.CheckpointManager,
  state: TrainState | None = None,
) -> None:
  """Waits for the metrics of a step and checks that they are finite.

  Args:
    step: number of the step.
    metrics: of the step.
    names: from a step to the names of the images in the batch after it.
    manager: for the step of the last checkpoint.
    state: a state to check as well, before it is saved: the loss of a step is
      computed with the weights before its update.

  Raises:
    NonFiniteLoss: if something is not finite.
  """
  loss, gradient = jax.device_get((metrics['loss'], metrics['grad_norm']))
  if not math.isfinite(loss):
    culprit = 'Loss'
  elif not math.isfinite(gradient):
    culprit = 'Gradient'
  elif state and not _all_finite((state.params, state.collections)):
    culprit = 'Update of the weights'
  else:
    return
  values = sorted(jax.device_get(metrics).items())
  terms = ', '.join(f'{name} {float(x):.4g}' for name, x in values)
  images = names(step - 1)
  shown, more = ', '.join(images[:_MAX_NAMES]), len(images) - _MAX_NAMES
  if more > 0:
    shown += f' and {more} more'
  last_step = manager.latest_step()
  checkpoint = f'Last good checkpoint: step {last_step}'
  if last_step is None:
    checkpoint = 'There is no checkpoint yet'
  raise NonFiniteLoss(
    f'{culprit} is not finite at step {step}: {terms}. Images: {shown}. '
    f'{checkpoint}. Lower --config.optim.lr or set --config.optim.clip_norm=1.'
  )


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(finite))


class _Clock:
  """Measures speed, and the fraction of time spent waiting for data."""

  def __init__(self, step: int):
    self._step, self._start, self._waited = step, time.monotonic(), 0.0

  def next(self, batches: Iterator[Any]) -> Any:
    start = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - start
    return batch

  def read(self, step: int, batch_size: int) -> dict[str, float]:
    elapsed = max(time.monotonic() - self._start, 1e-9)
    seconds, waited = elapsed / (step - self._step), self._waited / elapsed
    return {
      'step_seconds': seconds,
      'images_per_second': batch_size / seconds,
      'data_wait': waited,
    }


def _data_advice(data: Config) -> str:
  """What to set if the step waits for data; '' if all of it is set."""
  advice = []
  if not data.cache and not data.decoded_cache:
    advice.append('config.data.cache=True keeps decoded images in memory')
  if not data.workers:
    advice.append('config.data.workers=2 decodes in two processes')
  return ', '.join(advice)


def train(
  stage: Stage,
  state: TrainState,
  *,
  manager: ocp.CheckpointManager,
  log: logs.StageLog,
  stop: Stop,
) -> TrainState:
  """Trains a stage to its last step; returns the final state.

  Args:
    stage: what to train.
    state: an initial or restored state; it is donated.
    manager: saves the state after each evaluation, every
      config.checkpoint.every_minutes, and after a signal.
    log: of the stage.
    stop: checked after every step.

  Raises:
    NonFiniteLoss: at the first step whose loss or gradient is not finite.
    Stopped: after a signal, once the state is saved.
  """
  config, num_steps = stage.config, stage.num_steps
  log_every = config.log_every_steps
  step = first = saved = int(state.step)
  # A run that was stopped during an evaluation saved no metrics.
  scored = step if step and manager.metrics(step) else None
  if step == scored == num_steps:
    return state
  best, best_step = -math.inf, manager.best_step()
  if best_step is not None:
    best_metrics: Any = manager.metrics(best_step)
    best = best_metrics['miou']
  train_step, rng = stage.make_train_step(), stage.rng
  teacher_variables = stage.teacher.variables if stage.teacher else {}
  batches, clock = iter(stage.make_batches(step)), _Clock(step)
  start = save_time = time.monotonic()
  unchecked = metrics = None
  advice = _data_advice(config.data)
  check = functools.partial(
    check_finite, names=stage.batch_names, manager=manager
  )

  def save(miou=None):
    nonlocal saved, save_time, clock
    if metrics is not None:
      check(step, metrics, state=state)
    if miou is not None and math.isnan(miou):  # Cannot select the best one.
      raise InputError('val has no labeled pixels to evaluate; label some.')
    checkpoints.save(manager, step, state, stage.run_facts, miou=miou)
    log.upload()
    if saved == first:
      checkpoints.wait(manager)  # To report errors of the first save early.
    saved, save_time = step, time.monotonic()
    clock = _Clock(step)

  def save_is_due():
    # Processes must agree although their clocks differ, which takes time.
    if jax.process_count() > 1 and step % log_every:
      return False
    seconds = 60 * config.checkpoint.every_minutes
    return processes.any_of(0 < seconds <= time.monotonic() - save_time)

  bar = progress.steps(step, num_steps, log.name, shown=processes.is_first())
  with stop.deferred(), bar:
    while True:
      due = step % stage.eval_every == 0 or step == num_steps
      if step and due and scored != step:
        if metrics is not None:
          check(step, metrics)  # Before a useless evaluation.
        start = time.monotonic()
        scores = stop.attempt(stage.evaluate, state.variables('student'))
        if scores is not None:
          best = max(best, scores['miou'])
          log.line(
            f'step {step}/{num_steps}  val mIoU '
            f'{logs.percent(scores["miou"])}  (best {logs.percent(best)}, '
            f'{logs.duration(time.monotonic() - start)})'
          )
          # Logged before the checkpoint is saved: a resumed run drops records
          # after its checkpoint, but does not repeat earlier ones.
          log.metrics('eval', step, scores)
          save(scores['miou'])
          scored = step
      elif saved != step and save_is_due():
        save()
      if stop.signum or manager.reached_preemption(step):
        if saved != step:
          save()
        checkpoints.wait(manager)
        text = f'stopped by {stop.name}, saved at step {step}'
        log.line(f'{text}; the same command resumes there')
        raise Stopped(stop.signum or signal.SIGTERM)
      if step == num_steps:
        checkpoints.wait(manager)
        return state
      try:
        batch = clock.next(batches)
      except Exception:
        # Ctrl-C also stops the worker processes that read the data.
        if not stop.signum:
          raise
        continue
      if step == first:
        log.line('compiling the training step ...')
        start = time.monotonic()
      state, metrics = train_step(state, teacher_variables, batch, rng)
      step += 1
      bar.update()
      if unchecked:
        check(*unchecked)  # One step late, so that the device never waits.
      unchecked = step, metrics
      if step == first + 1:
        jax.block_until_ready(metrics)
        seconds = time.monotonic() - start
        cached = jax.config.values['jax_enable_compilation_cache']
        text = ' (cached for the next run)' if cached else ''
        log.line(f'first step after {seconds:.1f} s{text}')
        clock = _Clock(step)
      if step % log_every and step != num_steps:
        continue
      check(*unchecked)
      unchecked = None
      values = {name: float(x) for name, x in jax.device_get(metrics).items()}
      shown = ('loss', *sorted({*values} - {'loss', 'learning_rate'}))
      text = '  '.join(
        f'{name} {values[name]:.4f}' for name in shown if name.count('_') < 2
      )
      if step > first + 1:  # The first step includes compilation.
        values |= clock.read(step, config.batch_size)
        clock = _Clock(step)
        left = logs.duration(values['step_seconds'] * (num_steps - step))
        text += f'  {values["images_per_second"]:.1f} images/s'
        text += f'  waiting {values["data_wait"]:.0%}  left {left}'
      log.metrics('train', step, values)
      # On a terminal, the bar takes the place of these lines.
      bar.set_postfix_str(f'loss {values["loss"]:.4f}')
      log.line(f'step {step}/{num_steps}  {text}', shown=bar.disable)
      if advice and values.get('data_wait', 0) > 0.1:
        log.line(f'the step waits for data: {advice}')
        advice = ''
