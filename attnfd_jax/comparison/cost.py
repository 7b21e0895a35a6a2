# SPDX-License-Identifier: Apache-2.0
"""What a step of a method costs beside the baseline's, measured in turn."""

import statistics
import time

import jax
import optax

from attnfd_jax.benchmarks.train import program_memory
from attnfd_jax.devices import processes

_STEPS = 10  # The first two are warm-up.


def measure(stage, baseline, *, steps=_STEPS):
  """Seconds of a step, also of the baseline at the same time; memory; size.

  Both stages train on the same batches, as they come from the pipeline, one
  step after the other: what else the machine does slows both. Returns
  {'step_seconds', 'baseline_step_seconds', 'memory_bytes', 'method_params'},
  in all processes of a job what the first one measured. `stage` may be the
  baseline itself.
  """
  batches = iter(baseline.make_batches(0))
  alone = stage is baseline
  trainers = [_Trainer(x) for x in ([stage] if alone else [stage, baseline])]
  for _ in range(steps):
    for trainer in trainers:
      trainer.step(batches)
  seconds = [statistics.median(x.times[2:]) for x in trainers]
  return processes.from_first(
    {
      'step_seconds': seconds[0],
      'baseline_step_seconds': seconds[-1],
      'memory_bytes': trainers[0].memory,
      'method_params': trainers[0].method_params,
    }
  )


class _Trainer:
  """A stage that trains from its start, and the seconds of its steps."""

  def __init__(self, stage):
    self._state = stage.init_state(log=lambda line: None)
    self.method_params = optax.tree.size(
      self._state.params.get('distiller', {})
    )
    self._fixed = stage.teacher.variables if stage.teacher else {}
    self._rng, self._train_step = stage.rng, stage.make_train_step()
    self._compiled, self.memory, self.times = None, None, []

  def step(self, batches):
    start = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - start
    inputs = self._state, self._fixed, batch, self._rng
    if self._compiled is None:
      self._compiled = self._train_step.lower(*inputs).compile()
      self.memory = program_memory(self._compiled)
    start = time.perf_counter()
    self._state, metrics = self._compiled(*inputs)
    jax.block_until_ready((self._state, metrics))
    self.times.append(waited + time.perf_counter() - start)
