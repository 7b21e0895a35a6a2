# SPDX-License-Identifier: Apache-2.0
"""The training loop: evaluate, save, stop, next batch, step, log."""

import functools
import math
import signal
import time

import jax
import jax.numpy as jnp

from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints, logs
from attnfd_jax.training.stopping import Stopped

_SHOWN = 16  # Names of a batch.


class NonFiniteLoss(InputError):
  """The loss became NaN or infinite; what is saved stays."""


def check_finite(step, metrics, *, names, manager, state=None):
  """Waits for a step's metrics; NonFiniteLoss if they are not finite.

  Or a `state` that is to be saved: its loss is that of the weights before.
  `names` maps a step to the names of the images of the batch after it.
  """
  loss, gradient = jax.device_get((metrics['loss'], metrics['grad_norm']))
  if not math.isfinite(loss):
    what = 'Loss'
  elif not math.isfinite(gradient):
    what = 'Gradient'
  elif state and not _all_finite((state.params, state.collections)):
    what = 'Update of the weights'
  else:
    return
  values = sorted(jax.device_get(metrics).items())
  terms = ', '.join(f'{name} {float(x):.4g}' for name, x in values)
  images = names(step - 1)
  more = f' and {len(images) - _SHOWN} more' if len(images) > _SHOWN else ''
  saved = manager.latest_step()
  kept = f'Last good checkpoint: step {saved}'
  if saved is None:
    kept = 'There is no checkpoint yet'
  raise NonFiniteLoss(
    f'{what} is not finite at step {step}: {terms}. Images: '
    f'{", ".join(images[:_SHOWN])}{more}. {kept}. Lower --config.optim.lr or '
    'set --config.optim.clip_norm=1.'
  )


@jax.jit
def _all_finite(tree):
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(finite))


class _Clock:
  """Speed since it was made, and the share of the time without data."""

  def __init__(self, step):
    self._step, self._start, self._waited = step, time.monotonic(), 0.0

  def next(self, batches):
    start = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - start
    return batch

  def read(self, step, batch_size):
    elapsed = max(time.monotonic() - self._start, 1e-9)
    seconds, waited = elapsed / (step - self._step), self._waited / elapsed
    return {
      'step_seconds': seconds,
      'images_per_second': batch_size / seconds,
      'data_wait': waited,
    }


def train(stage, state, *, manager, log, stop):
  """The state after the last step of a Stage, from wherever `state` is.

  `state` is donated. The Orbax `manager` saves it after each evaluation, as
  often as the config says, and when `stop`, a stopping.Stop, says so. Raises
  NonFiniteLoss at the first such step, and Stopped after a signal.
  """
  config, num_steps = stage.config, stage.num_steps
  log_every = config.log_every_steps
  step = first = saved = int(state.step)
  # A run that was stopped in an evaluation has saved without its metrics.
  scored = step if step and manager.metrics(step) else None
  if step == scored == num_steps:
    return state
  best = -math.inf
  if manager.best_step() is not None:
    best = manager.metrics(manager.best_step())['miou']
  train_step, rng = stage.make_train_step(), stage.rng
  teacher_variables = stage.teacher.variables if stage.teacher else {}
  batches, clock = iter(stage.make_batches(step)), _Clock(step)
  save_time = time.monotonic()
  unchecked = metrics = None
  advised = False
  check = functools.partial(
    check_finite, names=stage.batch_names, manager=manager
  )

  def save(miou=None):
    nonlocal saved, save_time, clock
    if metrics is not None:
      check(step, metrics, state=state)
    if miou is not None and math.isnan(miou):  # No score to choose by.
      raise InputError('val has no labeled pixel that is scored; label some.')
    checkpoints.save(manager, step, state, stage.run_facts, miou=miou)
    log.upload()
    if saved == first:
      checkpoints.wait(manager)  # Errors of saving come late.
    saved, save_time = step, time.monotonic()
    clock = _Clock(step)

  def save_is_due():
    # Clocks of processes differ, and to ask all of them is not free.
    if jax.process_count() > 1 and step % log_every:
      return False
    seconds = 60 * config.checkpoint.every_minutes
    return processes.any_of(0 < seconds <= time.monotonic() - save_time)

  with stop.deferred():
    while True:
      due = step % stage.eval_every == 0 or step == num_steps
      if step and due and scored != step:
        if metrics is not None:
          check(step, metrics)  # Before an evaluation in vain.
        start = time.monotonic()
        scores = stop.attempt(stage.evaluate, state.variables('student'))
        if scores is not None:
          best = max(best, scores['miou'])
          log.line(
            f'step {step}/{num_steps}  val mIoU '
            f'{logs.percent(scores["miou"])}  (best {logs.percent(best)}, '
            f'{logs.duration(time.monotonic() - start)})'
          )
          # The line is there before the checkpoint: a restart drops what is
          # newer than its checkpoint, and writes nothing older again.
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
      if step == first + 1:
        jax.block_until_ready(metrics)
        seconds = time.monotonic() - start
        kept = jax.config.jax_enable_compilation_cache
        text = '; faster next time, cached' if kept else ''
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
      if step > first + 1:  # The time of the first is that of the compiler.
        values |= clock.read(step, config.batch_size)
        clock = _Clock(step)
        left = logs.duration(values['step_seconds'] * (num_steps - step))
        text += f'  {values["images_per_second"]:.1f} images/s'
        text += f'  waiting {values["data_wait"]:.0%}  left {left}'
      log.metrics('train', step, values)
      log.line(f'step {step}/{num_steps}  {text}')
      if not advised and values.get('data_wait', 0) > 0.1:
        advised = True
        log.line(
          'the step waits for data: config.data.cache=True keeps decoded '
          'images in memory, config.data.workers=2 decodes in more processes'
        )
