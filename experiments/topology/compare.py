# SPDX-License-Identifier: Apache-2.0
"""The same training on other numbers of devices and processes, in numbers.

  python experiments/topology/compare.py [--output=F.json]

Distils a narrow DeepLabV3+ at batch 8 on simulated CPU devices, once for each
topology, from two states: the first one, and the one that 300 of 320 steps on
one device leave. 20 steps follow. Loss, gradients, weights and running
statistics are compared with those of one device; a difference is relative to
the largest value of its tensor, 'weights, absolute' is not. The table has the
worst one.

Training is chaotic: far from its end a rounding that pushes one activation over
the corner of a ReLU is soon everywhere. The row 'control' shows it: one device,
but weights at the start that are one rounding larger or smaller. So the bars
are for all steps in float64, and in float32 for the last 20 of a run and the
loss of the first one. Exit code 1 above a bar.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import processes, sharding
from attnfd_jax.models.layers import IMAGE_MEAN, IMAGE_STD
from attnfd_jax.runs import logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.training import stage as stages

FOLDER = pathlib.Path(__file__).parent
# Name -> processes, devices of each, and config.mesh.
TOPOLOGIES = {
  '1 device': (1, 1, {}),
  'control': (1, 1, {}),
  '2 devices': (1, 2, {}),
  '4 devices': (1, 4, {}),
  '8 devices': (1, 8, {}),
  '2 data x 2 spatial': (1, 4, {'spatial': 2}),
  '4 devices, fsdp': (1, 4, {'fsdp': True}),
  '2 processes x 2 devices': (2, 2, {}),
  '2 processes x 2 devices, fsdp': (2, 2, {'fsdp': True}),
}
STEPS = 20
WARM_STEPS = 300
BARS = {'loss': 1e-5, 'weights, absolute': 1e-4}
DTYPES = ('float32', 'float64')


def make_config(**mesh):
  """A student of 64 x 64 scenes, with all noise and an average."""
  config = default_config()
  config.batch_size = 8
  config.data.image_size = config.data.crop_size = (64, 64)
  config.data.base_size = 64
  config.data.train_scenes = 32
  config.data.val_scenes = 5
  config.data.threads = 1
  config.optim.ema_decay = 0.9
  config.optim.lr = 0.01
  epoch = config.data.train_scenes // config.batch_size
  config.num_epochs = (WARM_STEPS + STEPS) / epoch
  config.teacher.backbone = 'resnet18'
  config.distill.attnfd.teacher_attention = 'random'
  for network, width in ((config.teacher, 0.25), (config.student, 0.125)):
    network.width_multiplier = width
    network.aspp_channels = network.decoder_channels = 16
    network.low_level_channels = 8
  config.mesh.update(mesh)
  return resolve(config)


def make_stage(config):
  """Stage 'distill' with a teacher that was drawn at random."""
  dataset = load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  stage = stages.make_stage('student', config, dataset, mesh, FOLDER)
  stage = dataclasses.replace(stage, name='distill')
  teacher = teachers.abstract(config, dataset.class_names)
  init = jax.jit(
    functools.partial(teacher.network.init, train=False),
    out_shardings=sharding.replicated(mesh),
  )
  image = jnp.zeros((1, 64, 64, 3))
  variables = init(jax.random.key(1), image)
  teacher = dataclasses.replace(teacher, variables=variables)
  return stages.with_teacher(stage, teacher)


def normalized(image):
  """As of models.deeplab, in float64."""
  image = image.astype(jnp.float64) / 255
  return (image - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def train(stage, first, steps, *, dtype='float32', control=False):
  """Yields (loss, state on the mesh) after each step.

  Args:
    stage: of `make_stage`.
    first: its state to start from, which stays.
    steps: how many.
    dtype: of all arithmetic; 'float64' needs jax_enable_x64.
    control: the first weights are a rounding larger or smaller, at random: a
      common factor would be lost in the norms.
  """
  everywhere = sharding.replicated(stage.mesh)

  def convert(tree):
    def leaf(x):
      return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)

  def nudge(x):
    sign = jax.random.rademacher(jax.random.key(x.size), x.shape, x.dtype)
    return x * (1 + sign * jnp.finfo(dtype).eps)

  def start(state):
    state = convert(state)
    if control:
      state = state.replace(params=jax.tree.map(nudge, state.params))
    return state

  place = stage.state_sharding or everywhere
  state = jax.jit(start, out_shardings=place)(first)
  teacher = jax.jit(convert, out_shardings=everywhere)(stage.teacher.variables)
  by_batch = sharding.by_batch(stage.mesh)
  normalize = jax.jit(normalized, out_shardings=by_batch)
  train_step = stage.make_train_step()
  rng = sharding.place(jax.random.key(0), everywhere)
  batches = iter(stage.make_batches(int(first.step)))
  for _ in range(steps):
    batch = next(batches)
    if dtype == 'float64':
      batch = batch | {'image': normalize(batch['image'])}
    state, metrics = train_step(state, teacher, batch, rng)
    yield float(metrics['loss']), state
  batches.close()


def flatten(state):
  """{path: NumPy array} of a TrainState, gathered by all processes."""
  leaves = jax.tree_util.tree_leaves_with_path(sharding.to_host(state))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def difference(ours, theirs):
  """Largest difference over largest value."""
  theirs = np.asarray(theirs)
  scale = max(np.abs(theirs).max(), 1e-30)
  return float(np.abs(np.asarray(ours) - theirs).max() / scale)


def read(path, like):
  """The TrainState of a file of `flatten`; `like` has its structure."""
  with np.load(path) as file:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: file[jax.tree_util.keystr(path)], like
    )


def work(args):
  """One process of one topology; the first one writes."""
  processes.initialize(
    coordinator=args.coordinator,
    num_processes=args.num_processes,
    process_id=args.process_id,
  )
  stage = make_stage(make_config(**json.loads(args.mesh)))
  first = stage.init_state()
  found = {}
  if args.start.exists():
    starts = {0: first, WARM_STEPS: read(args.start, first)}
    cases = itertools.product(DTYPES, starts.items())
  else:
    *_, (_, state) = train(stage, first, WARM_STEPS)
    np.savez(args.start, **flatten(state))
    cases = ()
  for dtype, (start, state) in cases:
    jax.config.update('jax_enable_x64', dtype == 'float64')
    name, losses = f'{dtype}/{start}', []
    run = train(stage, state, STEPS, dtype=dtype, control=args.control)
    with jax.default_matmul_precision('highest'):
      for step, (loss, after) in enumerate(run, 1):
        losses.append(loss)
        if step in (1, STEPS):
          arrays = flatten(after)
          found |= {f'{name}/{step}/{key}': x for key, x in arrays.items()}
    found[f'{name}/losses'] = np.array(losses)
  if processes.is_first() and found:
    np.savez(args.output, **found)


def run(name, start, output):
  """Starts the processes of one topology and waits.

  Args:
    name: of TOPOLOGIES.
    start: file of the state after WARM_STEPS. If there is none, these are what
      is trained, and it is written.
    output: file for the arrays.
  """
  count, devices, mesh = TOPOLOGIES[name]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flag = f'--xla_force_host_platform_device_count={devices}'
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flag,
    'JAX_COMPILATION_CACHE_DIR': str(output.parent / 'programs'),
  }
  command = [sys.executable, __file__, f'--worker={output}', f'--start={start}']
  command += [f'--mesh={json.dumps(mesh)}', f'--num_processes={count}']
  if name == 'control':
    command.append('--control')
  if count > 1:
    command.append(f'--coordinator=127.0.0.1:{port}')
  workers = [
    subprocess.Popen(
      command + ([f'--process_id={i}'] if count > 1 else []), env=environment
    )
    for i in range(count)
  ]
  codes = [worker.wait() for worker in workers]
  if any(codes):
    sys.exit(f'processes ended with {codes}')


def compare(found, expected, *, dtype, start, step):
  """Worst differences up to a step; gradients are momentum."""
  kinds = {
    'weights': '.params',
    'statistics': '.collections',
    'gradients': '.opt_state',
  }
  name = f'{dtype}/{start}'
  losses = f'{name}/losses'
  losses = np.abs(found[losses] / expected[losses] - 1)[:step]
  worst = {'loss': float(losses.max())}
  for kind, prefix in kinds.items():
    worst[kind] = max(
      difference(found[key], expected[key])
      for key in expected
      if key.startswith(f'{name}/{step}/{prefix}')
    )
  worst['weights, absolute'] = max(
    float(np.abs(found[key] - expected[key]).max())
    for key in expected
    if key.startswith(f'{name}/{step}/.params')
  )
  return worst


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  output = FOLDER / 'results' / 'topology.json'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  hidden = {'help': argparse.SUPPRESS}
  parser.add_argument('--worker', dest='output_arrays', **hidden)
  parser.add_argument('--start', type=pathlib.Path, **hidden)
  parser.add_argument('--mesh', **hidden)
  parser.add_argument('--control', action='store_true', **hidden)
  parser.add_argument('--coordinator', **hidden)
  parser.add_argument('--num_processes', type=int, **hidden)
  parser.add_argument('--process_id', type=int, **hidden)
  args = parser.parse_args()
  if args.output_arrays:
    args.output = args.output_arrays
    work(args)
    return
  cases = list(itertools.product(DTYPES, (0, WARM_STEPS), (1, STEPS)))
  tables = {case: {} for case in cases}
  expected, started = None, time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    arrays = pathlib.Path(folder) / 'found.npz'
    start = pathlib.Path(folder) / 'start.npz'
    run('1 device', start, arrays)
    for name in TOPOLOGIES:
      run(name, start, arrays)
      with np.load(arrays) as file:
        found = dict(file)
      if expected is None:
        expected = found
        continue
      for case, table in tables.items():
        dtype, first, step = case
        worst = compare(found, expected, dtype=dtype, start=first, step=step)
        table[name] = worst
        shown = '  '.join(f'{key} {x:.1e}' for key, x in worst.items())
        print(f'{name:30} {title(*case):24} {shown}', flush=True)
    with np.load(start) as file:
      moved = max(
        np.abs(expected[f'float32/{WARM_STEPS}/{STEPS}/{key}'] - x).max()
        for key, x in file.items()
        if key.startswith('.params')
      )
  result = {
    'batch_size': 8,
    'losses_of_1_device': {
      name.removesuffix('/losses'): losses.tolist()
      for name, losses in expected.items()
      if name.endswith('/losses')
    },
    'weights_moved_in_the_last_steps': float(moved),
    'bars': BARS,
    'worst_difference_from_1_device': {
      title(*case): table for case, table in tables.items()
    },
    'seconds': round(time.monotonic() - started),
    'versions': logs.versions(),
  }
  args.output.parent.mkdir(parents=True, exist_ok=True)
  logs.write_json(args.output, result)
  free = {(kind, ('float32', 0, STEPS)) for kind in BARS}
  # A rounding may change the sign of one activation.
  free.add(('weights, absolute', ('float32', 0, 1)))
  failed = [
    f'{name}, {title(*case)}: {kind} {worst[kind]:.1e} > {bar:.0e}'
    for case, table in tables.items()
    for name, worst in table.items()
    for kind, bar in BARS.items()
    if not worst[kind] <= bar and name != 'control' and (kind, case) not in free
  ]
  if failed:
    sys.exit('\n'.join(failed))


def title(dtype, start, step):
  first, last = start + 1, start + step
  return f'{dtype}, step{f" {first}" if step == 1 else f"s {first} to {last}"}'


if __name__ == '__main__':
  main()
