# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step on this machine, and where they go.

The step is that of a run, with random images and labels that are on the device
already: what the pipeline delivers, `benchmark data` tells.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.runs import logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored
from attnfd_jax.training.stage import plan, with_teacher

# Side of the matrices whose product shows what the device can do.
PEAK_SIZE = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}


def process_seconds():
  """Since this process was started, or None where nobody tells."""
  try:
    fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2]
    ticks = int(fields.split()[19])
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
  except (OSError, AttributeError):
    return None
  return boot - ticks / os.sysconf('SC_CLK_TCK')


def measure_peak(dtype, *, repeats=5):
  """Operations a second of a large matrix product, the best of some."""
  size = PEAK_SIZE.get(jax.default_backend(), 2048)
  a, b = (
    jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1)
  )
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  best = 0.0
  for _ in range(repeats):
    start = time.perf_counter()
    # Several in flight: the launch of one hides behind the one before.
    products = [product(a, b) for _ in range(4)]
    jax.block_until_ready(products)
    seconds = (time.perf_counter() - start) / len(products)
    best = max(best, 2 * size**3 / seconds)
  return best


def program_memory(compiled):
  """Bytes of arguments, results and temporaries of a program, or None."""
  found = compiled.memory_analysis()
  if found is None:
    return None
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
  )


def program_flops(compiled):
  """As XLA counts them: what is computed, not what has to be; or None."""
  found = compiled.cost_analysis()
  if isinstance(found, list):  # One for each partition on older jax.
    found = found[0]
  return (found or {}).get('flops')


def random_variables(network, seed):
  """Variables without compiling an initialisation; maps keep their scale."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if leaf.ndim > 1:
      fan_in = leaf.size // leaf.shape[-1]
      values = rng.standard_normal(leaf.shape, np.float32)
      return values * np.float32((2 / fan_in) ** 0.5)
    ones = path[-1].key in ('scale', 'var')
    return np.full(leaf.shape, ones, np.float32)

  return jax.tree_util.tree_map_with_path(
    draw, networks.abstract_variables(network)
  )


def _class_names(config, number):
  """Of a teacher's folder, else as many as asked for."""
  path = pathlib.Path(config.teacher.checkpoint) / 'config.json'
  if config.teacher.checkpoint and path.is_file():
    return tuple(json.loads(path.read_text())['class_names'])
  return tuple(str(i) for i in range(number))


def make_stage(config, num_classes):
  """The stage that is measured: 'distill', or 'student' without a method."""
  distilled = config.distill.method != 'none'
  names = _class_names(config, num_classes)
  palette = np.zeros((len(names), 3), np.uint8)
  images = {'train': range(100 * config.batch_size)}  # How many; none is read.
  dataset = Dataset('random', names, palette, images)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  name = 'distill' if distilled else 'student'
  stage = plan(name, config, dataset, mesh)
  if not distilled:
    return stage
  if config.teacher.checkpoint or config.teacher.factory:
    return with_teacher(stage, teachers.from_config(config, '', names, mesh))
  teacher = teachers.abstract(config, names)
  variables = sharding.place(
    random_variables(teacher.network, config.seed), sharding.replicated(mesh)
  )
  return with_teacher(stage, dataclasses.replace(teacher, variables=variables))


def model_flops(stage):
  """Of one step: once the teacher, three times what is trained.

  Operations of convolutions that the step needs, not what a program or
  rematerialisation makes of them; the share of the peak counts these.
  """
  config = stage.config
  batch, size = config.batch_size, tuple(config.data.crop_size)
  image = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)

  def flops(network, variables):
    forward = functools.partial(network.apply, train=False)
    return networks.count_flops(forward, variables, image)

  total = 3 * flops(stage.network, networks.abstract_variables(stage.network))
  if stage.teacher:
    total += flops(Scored(stage.teacher), stage.teacher.variables)
    shapes = stage.output_shapes  # Of two images.
    variables = distill.abstract_variables(stage.distiller, *shapes)
    labels = jax.ShapeDtypeStruct(shapes[0]['logits'].shape[:-1], jnp.uint8)
    apply = functools.partial(stage.distiller.apply, train=False, step=0)
    counted = networks.count_flops(apply, variables, *shapes, labels)
    total += 3 * counted * batch // 2
  return total


def step_arguments(stage):
  """(state, teacher's variables, random batch, rng), placed on the devices."""
  config = stage.config
  generator = np.random.default_rng(config.seed)
  size = (config.batch_size, *config.data.crop_size)
  batch = {
    'image': generator.integers(0, 256, (*size, 3), np.uint8),
    'label': generator.integers(0, stage.dataset.num_classes, size, np.uint8),
  }
  return (
    stage.init_state(),
    stage.teacher.variables if stage.teacher else {},
    jax.device_put(batch, sharding.by_batch(stage.mesh)),
    stage.rng,
  )


def configure(options):
  """A resolved config of the flags."""
  config = default_config()
  if options.config is not None:
    config = options.config.copy_and_resolve_references()
  if options.recipe:
    config.recipe = options.recipe
  if options.student:
    config.student.backbone = options.student
  if options.teacher:
    config.teacher.backbone = options.teacher
  if options.teacher_checkpoint:
    config.teacher.checkpoint = options.teacher_checkpoint
  if options.method:
    config.distill.method = options.method
  if options.batch:
    config.batch_size = options.batch
  if options.dtype:
    config.optim.dtype = options.dtype
  height, width = config.data.crop_size
  config.data.crop_size = (options.height or height, options.width or width)
  if options.steps < 1 or options.num_classes < 2:
    raise InputError(
      f'--steps={options.steps} must be at least 1, '
      f'--num_classes={options.num_classes} at least 2.'
    )
  return resolve(config)


def run(options):
  """Prints what it measures; returns what `--json` prints.

  Args:
    options: flags config, student, teacher, teacher_checkpoint, method, batch,
      height, width, num_classes, dtype, steps, recipe and trace.

  Raises:
    InputError: whenever the user can mend it.
  """
  config = configure(options)
  stage = make_stage(config, options.num_classes)
  mesh = stage.mesh
  facts = {
    'student': networks.describe(config.student),
    'teacher': stage.teacher.name if stage.teacher else None,
    'method': config.distill.method,
    'recipe': config.recipe,
    'batch_size': config.batch_size,
    'image_size': list(config.data.crop_size),
    'num_classes': stage.dataset.num_classes,
    'dtype': config.optim.dtype,
    'accumulate': config.optim.accumulate,
    'remat': config.optim.remat,
    'steps': options.steps,
    'device': logs.device_name(),
  }
  print(', '.join(f'{key} {value}' for key, value in facts.items()), flush=True)
  state, *fixed = step_arguments(stage)
  print('compiling the training step ...', flush=True)
  start = time.perf_counter()
  step = stage.make_train_step().lower(state, *fixed).compile()
  facts['compile_seconds'] = time.perf_counter() - start
  times = []
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
    raise InputError('The loss is not finite: this measures nothing.')
  seconds = statistics.median(times[2:])
  flops, peak = model_flops(stage), measure_peak(config.optim.dtype)
  devices = mesh.size
  facts |= {
    'step_seconds': seconds,
    'step_seconds_all': times[2:],
    'images_per_second': config.batch_size / seconds,
    'gflops_per_step': flops / 1e9,
    'program_gflops_per_step': _giga(program_flops(step)),
    'device_peak_gflops': peak / 1e9,
    'flop_utilisation': flops / (seconds * peak * devices),
    'peak_memory_bytes': program_memory(step),
    'device_peak_memory_bytes': _device_peak(),
    'versions': logs.versions(),
  }
  print(
    f'{seconds:.4g} s a step (median of {options.steps}), '
    f'{facts["images_per_second"]:.4g} images/s, {flops / 1e9:.4g} GFLOP, '
    f'{facts["flop_utilisation"]:.1%} of a matrix product; '
    f'{facts["peak_memory_bytes"] or 0:.3g} bytes; compiled in '
    f'{facts["compile_seconds"]:.1f} s, first step '
    f'{facts["seconds_to_first_step"] or 0:.1f} s after the start'
  )
  return facts


def _giga(number):
  return None if number is None else number / 1e9


def _device_peak():
  """Bytes of the first device at their highest, the compiler's included."""
  return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
