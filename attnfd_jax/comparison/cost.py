# SPDX-License-Identifier: Apache-2.0
"""Measures the step time of a method next to that of the baseline."""

from collections.abc import Sequence
import statistics
import time
from typing import Any

import jax
import optax

from attnfd_jax.benchmarks import train
from attnfd_jax.devices import memory, processes
from attnfd_jax.runs import logs
from attnfd_jax.training.stage import Stage

# Steps that are always run, two of them as warm-up; then as many as take about
# _SECONDS, but at most _MOST.
_STEPS, _MOST, _SECONDS = 10, 40, 5.0


def measure(
  stage: Stage, baseline: Stage, data_seconds: float
) -> dict[str, Any]:
  """Measures the step time, memory and parameters of a method.

  A step of the method alternates with one of the baseline on the same batch, so
  that other load on the machine slows down both.

  Args:
    stage: the method's stage; may be the baseline itself.
    baseline: the stage without distillation.
    data_seconds: time per batch of the input pipeline. It is added to the step
      time on a CPU, whose cores it shares; elsewhere the slower of the two
      counts.

  Returns:
    {'step_seconds', 'baseline_step_seconds', 'data_seconds', 'memory_bytes',
    'method_params', 'device'}, as measured by the first process of a job.
  """
  stages = [stage] if stage is baseline else [stage, baseline]
  config = stage.config
  parts = {'devices': stage.mesh.shape['data']}
  parts['accumulate'] = config.optim.accumulate
  with memory.explain_exhaustion(config.batch_size, **parts):
    try:
      trainers = _alternate(stages)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or len(stages) == 1:
        raise
      # Both do not fit into memory together, but each may alone.
      trainers = [_alternate([x])[0] for x in stages]
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


def data_seconds(stage: Stage, batches: int = 8) -> float:
  """Measures the pipeline's seconds per batch once its buffers are empty."""
  options = stage.config.data
  # The number of batches in these buffers, see data/pipeline.py.
  prefetched = max(options.threads, 2) + 2 * options.workers + 4
  seconds = 0.0
  for _ in range(2):  # The first pass fills caches, as the first epoch does.
    source = iter(stage.make_batches(0))
    for _ in range(prefetched):
      next(source)
    start = time.perf_counter()
    for _ in range(batches):
      next(source)
    seconds = (time.perf_counter() - start) / batches
  return seconds


def _alternate(stages: Sequence[Stage]) -> list['_Trainer']:
  """Times the steps of the stages in alternation."""
  trainers = [_Trainer(stage) for stage in stages]

  def run(count):
    start = time.perf_counter()
    for _ in range(count):
      for trainer in trainers:
        trainer.step()
    return time.perf_counter() - start

  # A few steps on a busy machine are too noisy. The count must be the same in
  # all processes.
  fitting = int(_STEPS * _SECONDS / run(_STEPS))
  run(processes.from_first(min(fitting, _MOST)))
  for trainer in trainers:
    trainer.release()
  return trainers


class _Trainer:
  """Trains a stage on one random batch and times its steps."""

  def __init__(self, stage: Stage):
    self._state, *self._fixed = train.step_arguments(stage, fresh=False)
    own = self._state.params.get('distiller', {})
    self.method_params = optax.tree.size(own)
    train_step = stage.make_train_step()
    self._step = train_step.lower(self._state, *self._fixed).compile()
    self.memory = train.program_memory(self._step)
    self._times: list[float] = []

  def step(self) -> None:
    """Runs one step and records its time."""
    start = time.perf_counter()
    self._state, _ = jax.block_until_ready(
      self._step(self._state, *self._fixed)
    )
    self._times.append(time.perf_counter() - start)

  @property
  def seconds(self) -> float:
    """Median step time without the warm-up."""
    return statistics.median(self._times[2:])

  def release(self) -> None:
    """Frees the memory on the devices."""
    del self._state, self._step, self._fixed
