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
import timeit

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError, within
from attnfd_jax.models import network as networks
from attnfd_jax.runs import logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored
from attnfd_jax.training.stage import plan, with_teacher

# Side of the matrices whose product shows what the device can do.
PEAK_SIZE = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}
# Flags of a key of the config; an empty one leaves it as it is.
FLAGS = {
  'recipe': 'recipe',
  'student': 'student.backbone',
  'teacher': 'teacher.backbone',
  'teacher_checkpoint': 'teacher.checkpoint',
  'method': 'distill.method',
  'dtype': 'optim.dtype',
}


def process_seconds():
  """Since this process was started, or None where nobody tells."""
  try:
    fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2]
    start = int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start
  except (OSError, AttributeError):
    return None


def measure_peak(dtype):
  """Operations a second of a large matrix product, the best of five."""
  size = PEAK_SIZE.get(jax.default_backend(), 2048)
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.matmul)

  def several():
    # In flight together: the launch of one hides behind the one before.
    jax.block_until_ready([product(a, b) for _ in range(4)])

  several()
  return 4 * 2 * size**3 / min(timeit.repeat(several, number=1, repeat=5))


def program_memory(compiled):
  """Bytes of arguments, results and temporaries of a program, or None."""
  found = compiled.memory_analysis()
  return found and (
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


def random_variables(shapes, seed):
  """Variables without compiling an initialization; maps keep their scale."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if leaf.ndim > 1:
      fan_in = leaf.size // leaf.shape[-1]
      values = rng.standard_normal(leaf.shape, np.float32)
      return values * np.float32((2 / fan_in) ** 0.5)
    return np.full(leaf.shape, path[-1].key in ('scale', 'var'), np.float32)

  return jax.tree.map_with_path(draw, shapes)


def _class_names(config, number):
  """Of a teacher's folder, else as many as asked for."""
  path = pathlib.Path(config.teacher.checkpoint) / 'config.json'
  if config.teacher.checkpoint and path.is_file():
    return tuple(json.loads(path.read_text())['class_names'])
  return tuple(map(str, range(number)))


def make_stage(config, num_classes):
  """The stage that is measured: 'distill', or 'student' without a method."""
  distilled = config.distill.method != 'none'
  names = _class_names(config, num_classes)
  palette = np.zeros((len(names), 3), np.uint8)
  images = {'train': range(100 * config.batch_size)}  # How many; none is read.
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


def model_flops(stage):
  """Of one step: once the teacher, three times what is trained.

  Operations of convolutions that the step needs, not what a program or
  rematerialisation makes of them; the share of the peak counts these.
  """
  batch, size = stage.config.batch_size, stage.config.data.crop_size
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
    rngs = {'distill': jax.random.key(0)}
    options = {'train': False, 'step': 0, 'rngs': rngs}
    apply = functools.partial(stage.distiller.apply, **options)
    counted = networks.count_flops(apply, variables, *shapes, labels)
    total += 3 * counted * batch // 2
  return total


def step_arguments(stage, *, fresh=True):
  """(state, teacher's variables, random batch, rng), placed on the devices; the
  state is as of Stage.init_state.
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


def configure(options):
  """A resolved config of the flags that `train` and `predict` share."""
  within('--steps', options.steps, 1)
  within('--num_classes', options.num_classes, 2)
  config = (options.config or default_config()).copy_and_resolve_references()
  given = {key: getattr(options, flag) for flag, key in FLAGS.items()}
  config.update_from_flattened_dict({k: v for k, v in given.items() if v})
  config.batch_size = options.batch or config.batch_size
  height, width = config.data.crop_size
  config.data.crop_size = (options.height or height, options.width or width)
  # Steps take as long, and no method diverges under a random teacher.
  config.student.lr = 1e-9
  return resolve(config)


def speed(times, images):
  """What a result says of the seconds of steps; two of them are warm-up."""
  seconds = statistics.median(times[2:])
  return {
    'step_seconds': seconds,
    'step_seconds_all': times[2:],
    'images_per_second': images / seconds,
    'device': logs.device_name(),
    'versions': logs.versions(),
  }


def run(options):
  """Prints what it measures with these flags; returns what `--json` prints."""
  config = configure(options)
  stage = make_stage(config, options.num_classes)
  facts = {
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
  facts |= speed(times, config.batch_size)
  flops, peak = model_flops(stage), measure_peak(config.optim.dtype)
  computed, memory = program_flops(step), program_memory(step)
  # Of the first device at its highest, what the compiler needed included.
  device = jax.local_devices()[0].memory_stats() or {}
  facts |= {
    'gflops_per_step': flops / 1e9,
    'program_gflops_per_step': computed and computed / 1e9,
    'device_peak_gflops': peak / 1e9,
    'flop_utilisation': flops / facts['step_seconds'] / peak / stage.mesh.size,
    'peak_memory_bytes': memory,
    'device_peak_memory_bytes': device.get('peak_bytes_in_use'),
  }
  print(
    f'{facts["step_seconds"]:.4g} s a step (median of {options.steps}), '
    f'{facts["images_per_second"]:.4g} images/s, {flops / 1e9:.4g} GFLOP, '
    f'{facts["flop_utilisation"]:.1%} of a matrix product; '
    f'{memory or 0:.3g} bytes; compiled in {facts["compile_seconds"]:.1f} s, '
    f'first step {facts["seconds_to_first_step"] or 0:.1f} s after the start'
  )
  return facts
