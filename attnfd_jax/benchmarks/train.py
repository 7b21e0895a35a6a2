# SPDX-License-Identifier: Apache-2.0
"""Measures the time and memory of a training step on this machine.

The step is the one `main` runs, with random images and labels that are already
on the device. `benchmark data` measures the input pipeline.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
import timeit
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import check_range, InputError
from attnfd_jax.models import network as networks
from attnfd_jax.runs import logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored
from attnfd_jax.training.stage import plan, Stage, with_teacher
from attnfd_jax.training.step import TrainState
from attnfd_jax.types import Config, DType, PyTree

# Size of the square matrices with which the matmul throughput is measured.
PEAK_SIZE = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}
# Keys of the config that flags override, unless the flag is empty.
FLAGS = {
  'recipe': 'recipe',
  'student': 'student.backbone',
  'teacher': 'teacher.backbone',
  'teacher_checkpoint': 'teacher.checkpoint',
  'method': 'distill.method',
  'dtype': 'optim.dtype',
}


def process_seconds() -> float | None:
  """Returns the seconds since this process started; None without /proc."""
  try:
    fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2]
    start = int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start
  except (OSError, AttributeError):
    return None


def measure_peak(dtype: DType) -> float:
  """Returns the matmul throughput in FLOP/s, the best of five."""
  size = PEAK_SIZE.get(jax.default_backend(), 2048)
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.matmul)

  def several():
    # Dispatched together, so that the launches overlap with the computation.
    jax.block_until_ready([product(a, b) for _ in range(4)])

  several()
  return 4 * 2 * size**3 / min(timeit.repeat(several, number=1, repeat=5))


def program_memory(compiled: jax.stages.Compiled) -> int | None:
  """Returns the bytes of arguments, results and temporaries, if known."""
  sizes = compiled.memory_analysis()
  return sizes and (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
  )


def program_flops(compiled: jax.stages.Compiled) -> float | None:
  """Returns XLA's count of operations, if known; it includes recomputation."""
  costs: Any = compiled.cost_analysis()
  if isinstance(costs, list):  # One for each partition on older jax.
    costs = costs[0]
  return (costs or {}).get('flops')


def random_variables(shapes: PyTree, seed: int) -> PyTree:
  """Returns random variables without compiling an initialization.

  Kernels have He-normal scale, so that feature maps keep their magnitude.

  Args:
    shapes: abstract variables of a network.
    seed: seed of NumPy's generator.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if leaf.ndim > 1:
      fan_in = leaf.size // leaf.shape[-1]
      values = rng.standard_normal(leaf.shape, np.float32)
      return values * np.float32((2 / fan_in) ** 0.5)
    return np.full(leaf.shape, path[-1].key in ('scale', 'var'), np.float32)

  return jax.tree.map_with_path(draw, shapes)


def _class_names(config: Config, number: int) -> tuple[str, ...]:
  """Returns the names in a teacher's folder, or else numbers."""
  path = pathlib.Path(config.teacher.checkpoint) / 'config.json'
  if config.teacher.checkpoint and path.is_file():
    return tuple(json.loads(path.read_text())['class_names'])
  return tuple(map(str, range(number)))


def make_stage(config: Config, num_classes: int) -> Stage:
  """Makes the stage to measure: 'distill', or 'student' without a method.

  Args:
    config: resolved config.
    num_classes: used unless the config names a teacher's folder.
  """
  distilled = config.distill.method != 'none'
  names = _class_names(config, num_classes)
  palette = np.zeros((len(names), 3), np.uint8)
  # Only the length of the source is used.
  images: dict[str, Any] = {'train': range(100 * config.batch_size)}
  dataset = Dataset('random', names, palette, images)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  stage = plan('distill' if distilled else 'student', config, dataset, mesh)
  if not distilled:
    return stage
  if config.teacher.checkpoint or config.teacher.factory:
    return with_teacher(stage, teachers.from_config(config, '', names, mesh))
  teacher = teachers.abstract(config, names)
  variables = random_variables(teacher.variables, config.seed)
  variables = sharding.place(variables, sharding.replicated(mesh))
  return with_teacher(stage, dataclasses.replace(teacher, variables=variables))


def model_flops(stage: Stage) -> int:
  """Counts the operations of the convolutions that one step needs.

  The teacher's forward pass counts once, what is trained three times, for its
  backward pass. Recomputation by rematerialization does not count.
  """
  batch, size = stage.config.batch_size, stage.config.data.crop_size
  image = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)

  def flops(network, variables):
    forward = functools.partial(network.apply, train=False)
    return networks.count_flops(forward, variables, image)

  total = 3 * flops(stage.network, networks.abstract_variables(stage.network))
  if stage.teacher and stage.distiller:
    total += flops(Scored(stage.teacher), stage.teacher.variables)
    shapes = stage.output_shapes  # For a batch of two.
    variables = distill.abstract_variables(stage.distiller, *shapes)
    labels = jax.ShapeDtypeStruct(shapes[0]['logits'].shape[:-1], jnp.uint8)
    rngs = {'distill': jax.random.key(0)}
    options = {'train': False, 'step': 0, 'rngs': rngs}
    apply = functools.partial(stage.distiller.apply, **options)
    distiller_flops = networks.count_flops(apply, variables, *shapes, labels)
    total += 3 * distiller_flops * batch // 2
  return total


def step_arguments(
  stage: Stage, *, fresh: bool = True
) -> tuple[TrainState, PyTree, PyTree, jax.Array]:
  """Returns state, teacher variables, a random batch and rng, on the devices.

  Args:
    stage: as from `make_stage`.
    fresh: see Stage.init_state.
  """
  config = stage.config
  generator = np.random.default_rng(config.seed)
  size = (config.batch_size, *config.data.crop_size)
  batch = {
    'image': generator.integers(0, 256, (*size, 3), np.uint8),
    'label': generator.integers(0, stage.dataset.num_classes, size, np.uint8),
  }
  return (
    stage.init_state(fresh=fresh),
    stage.teacher.variables if stage.teacher else {},
    jax.device_put(batch, sharding.by_batch(stage.mesh)),
    stage.rng,
  )


def configure(options: Any) -> Config:
  """Returns the resolved config with the flags of `train` and `predict`.

  Raises:
    InputError: if a flag is out of range.
  """
  check_range('--steps', options.steps, 1)
  check_range('--num_classes', options.num_classes, 2)
  config: Config = options.config or default_config()
  config = config.copy_and_resolve_references()
  values = {key: getattr(options, flag) for flag, key in FLAGS.items()}
  config.update_from_flattened_dict({k: v for k, v in values.items() if v})
  config.batch_size = options.batch or config.batch_size
  height, width = config.data.crop_size
  config.data.crop_size = (options.height or height, options.width or width)
  # So that no method diverges with a random teacher; steps take as long.
  config.student.lr = 1e-9
  return resolve(config)


def speed(times: Sequence[float], images: int) -> dict[str, Any]:
  """Returns the fields of a result that depend on the step times.

  Args:
    times: seconds of each step; the first two are warm-up.
    images: number of images per step.
  """
  seconds = statistics.median(times[2:])
  return {
    'step_seconds': seconds,
    'step_seconds_all': times[2:],
    'images_per_second': images / seconds,
    'device': logs.device_name(),
    'versions': logs.versions(),
  }


def run(options: Any) -> dict[str, Any]:
  """Runs the benchmark and prints the result.

  Args:
    options: flags of the command.

  Returns:
    The object that `--json` prints.

  Raises:
    InputError: if a flag is wrong, or the loss is not finite.
  """
  config = configure(options)
  stage = make_stage(config, options.num_classes)
  facts: dict[str, Any] = {
    'student': networks.describe(config.student),
    'teacher': stage.teacher.name if stage.teacher else None,
    'method': config.distill.method,
    'recipe': config.recipe,
    'batch_size': config.batch_size,
    'image_size': list(config.data.crop_size),
    'num_classes': stage.dataset.num_classes,
    **{key: config.optim[key] for key in ('dtype', 'accumulate', 'remat')},
    'steps': options.steps,
    'device': logs.device_name(),
  }
  print(', '.join(f'{key} {value}' for key, value in facts.items()), flush=True)
  state, *fixed = step_arguments(stage)
  print('compiling the training step ...', flush=True)
  start = time.perf_counter()
  step = stage.make_train_step().lower(state, *fixed).compile()
  facts['compile_seconds'] = time.perf_counter() - start
  times, metrics = [], {}
  with contextlib.ExitStack() as tracing:
    for number in range(-2, options.steps):
      if number == 0 and options.trace:
        tracing.enter_context(jax.profiler.trace(options.trace))
      start = time.perf_counter()
      state, metrics = jax.block_until_ready(step(state, *fixed))
      times.append(time.perf_counter() - start)
      if number == -2:
        facts['seconds_to_first_step'] = process_seconds()
  if not np.isfinite(metrics['loss']):
    raise InputError(
      'The loss is not finite, so the step is not a normal one; try another '
      'method or teacher.'
    )
  facts |= speed(times, config.batch_size)
  flops, peak = model_flops(stage), measure_peak(config.optim.dtype)
  computed, memory = program_flops(step), program_memory(step)
  # The peak of the first device, which includes what compilation needed.
  device = jax.local_devices()[0].memory_stats() or {}
  facts |= {
    'gflops_per_step': flops / 1e9,
    'program_gflops_per_step': computed and computed / 1e9,
    'device_peak_gflops': peak / 1e9,
    'flop_utilization': flops / facts['step_seconds'] / peak / stage.mesh.size,
    'peak_memory_bytes': memory,
    'device_peak_memory_bytes': device.get('peak_bytes_in_use'),
  }
  print(
    f'{facts["step_seconds"]:.4g} s per step (median of {options.steps}), '
    f'{facts["images_per_second"]:.4g} images/s, {flops / 1e9:.4g} GFLOP, '
    f'{facts["flop_utilization"]:.1%} of the measured matmul throughput; '
    f'{memory or 0:.3g} bytes; compiled in {facts["compile_seconds"]:.1f} s, '
    f'first step {facts["seconds_to_first_step"] or 0:.1f} s after the start'
  )
  return facts
