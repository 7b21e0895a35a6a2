# SPDX-License-Identifier: Apache-2.0
"""What a step of a method costs beside the baseline's, measured in turn."""

import statistics
import time

import jax
import optax

from attnfd_jax.benchmarks import train
from attnfd_jax.devices import memory, processes
from attnfd_jax.runs import logs

# Steps at least, the first two being warm-up; further ones at most; seconds.
_STEPS, _MOST, _SECONDS = 10, 40, 5.0


def measure(stage, baseline, data_seconds):
  """Seconds of a step, also of the baseline at the same time; memory; size.

  Both stages train on one batch, a step of one after a step of the other: what
  else the machine does slows both. `data_seconds`, what the pipeline takes for
  a batch, is added on a CPU, whose cores it shares; elsewhere the slower of the
  two counts.

  Returns {'step_seconds', 'baseline_step_seconds', 'data_seconds',
  'memory_bytes', 'method_params', 'device'}, in all processes of a job what the
  first one measured. `stage` may be the baseline itself.
  """
  stages = [stage] if stage is baseline else [stage, baseline]
  config = stage.config
  parts = {'devices': stage.mesh.shape['data']}
  parts['accumulate'] = config.optim.accumulate
  with memory.explained(config.batch_size, **parts):
    try:
      trainers = _in_turn(stages)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or len(stages) == 1:
        raise
      trainers = [_in_turn([x])[0] for x in stages]  # One fits, not both.
  on_cpu = stage.mesh.devices.flat[0].platform == 'cpu'
  seconds = [
    x.seconds + data_seconds if on_cpu else max(x.seconds, data_seconds)
    for x in trainers
  ]
  return processes.from_first(
    {
      'step_seconds': seconds[0],
      'baseline_step_seconds': seconds[-1],
      'data_seconds': data_seconds,
      'memory_bytes': trainers[0].memory,
      'method_params': trainers[0].method_params,
      'device': logs.device_name(),
    }
  )


def data_seconds(stage, batches=8):
  """Seconds of a batch from the pipeline, once nothing is read ahead."""
  options = stage.config.data
  # What the pipeline holds, and fills while nobody asks; see data/pipeline.py.
  ahead = max(options.threads, 2) + 2 * options.workers + 4
  for _ in range(2):  # The first time fills caches, as a run's first epoch.
    source = iter(stage.make_batches(0))
    for _ in range(ahead):
      next(source)
    start = time.perf_counter()
    for _ in range(batches):
      next(source)
    seconds = (time.perf_counter() - start) / batches
  return seconds


def _in_turn(stages):
  trainers = [_Trainer(stage) for stage in stages]

  def run(count):
    start = time.perf_counter()
    for _ in range(count):
      for trainer in trainers:
        trainer.step()
    return time.perf_counter() - start

  # Few steps of a busy machine say little; all processes take as many.
  fitting = int(_STEPS * _SECONDS / run(_STEPS))
  run(processes.from_first(min(fitting, _MOST)))
  for trainer in trainers:
    trainer.release()
  return trainers


class _Trainer:
  """A stage that trains on one random batch, with a stopwatch."""

  def __init__(self, stage):
    self._state, *self._fixed = train.step_arguments(stage, fresh=False)
    own = self._state.params.get('distiller', {})
    self.method_params = optax.tree.size(own)
    train_step = stage.make_train_step()
    self._step = train_step.lower(self._state, *self._fixed).compile()
    self.memory, self._times = train.program_memory(self._step), []

  def step(self):
    start = time.perf_counter()
    self._state, _ = jax.block_until_ready(
      self._step(self._state, *self._fixed)
    )
    self._times.append(time.perf_counter() - start)

  @property
  def seconds(self):
    return statistics.median(self._times[2:])

  def release(self):
    """Lets go of what is on the devices."""
    self._state = self._step = self._fixed = None
