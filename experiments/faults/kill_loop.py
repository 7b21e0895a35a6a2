# SPDX-License-Identifier: Apache-2.0
r"""Kills runs at random moments and compares what they end with.

  python experiments/faults/kill_loop.py --kills=50

A short run of all three stages is done once in peace. Then the same command
is started again and again, and ended by SIGKILL after a random time: while it
imports, compiles, steps, evaluates, saves or writes. A run that gets through
must have the weights, momentum, averages, metrics and results of the first
one, bit for bit; then a new one is begun. Exit code 1 if one differs.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from attnfd_jax.runs import checkpoints, logs

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).parent / 'results'
STAGES = ('teacher', 'student', 'distill')
CLOCK = ('step_seconds', 'images_per_second', 'data_wait', 'train_seconds')
# 6 steps a stage, scored after 3 and 6; a checkpoint after every step.
SETTINGS = {
  'data.image_size': (32, 48),
  'data.base_size': 32,
  'data.crop_size': (32, 32),
  'data.train_scenes': 8,
  'data.val_scenes': 2,
  'student.labeled_limit': 4,
  'batch_size': 4,
  'num_epochs': 3.0,
  'teacher.num_epochs': 3.0,
  'eval.every_epochs': 1.5,
  'eval.num_pictures': 1,
  'log_every_steps': 1,
  'checkpoint.every_minutes': 1e-4,
  'optim.ema_decay': 0.5,
  'teacher.width_multiplier': 0.125,
  'distill.attnfd.connector_schedule': 'first_epoch',
}
SETTINGS |= {
  f'{role}.{part}_channels': 8
  for role in ('teacher', 'student')
  for part in ('aspp', 'decoder', 'low_level')
}


def start(workdir, cache):
  """The process of the run, as a user starts it."""
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
    'XDG_CACHE_HOME': str(cache),
  }
  arguments = [f'--config.{key}={value}' for key, value in SETTINGS.items()]
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'attnfd_jax.main'),
      *(f'--config={ROOT}/configs/quickstart.py', f'--workdir={workdir}'),
      *arguments,
    ],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  """Waits for a run that nobody disturbs."""
  output, _ = process.communicate()
  if process.returncode:
    raise SystemExit(f'The run failed:\n{output}')


def phase(workdir):
  """Where a killed run was, for the table."""
  for stage in reversed(STAGES):
    directory = workdir / stage
    if (directory / 'result.json').exists():
      return f'after {stage}'
    if any((directory / 'checkpoints').glob('*tmp*')):
      return f'{stage}, saving'
    if (directory / 'metrics.jsonl').exists():
      return f'{stage}, training'
    if directory.exists():
      return f'{stage}, compiling'
  return 'starting'


def state_on_disk(folder):
  """All arrays of a checkpoint."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata.tree
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    arguments = ocp.args.PyTreeRestore(restore_args=arguments)
    return checkpointer.restore(folder, args=arguments)


def without_clock(record):
  return {k: v for k, v in record.items() if k not in CLOCK}


def contents(workdir):
  """What must be the same of two runs, by name."""
  found = {}
  for stage in STAGES:
    directory = workdir / stage
    result = json.loads((directory / 'result.json').read_text())
    found[f'{stage}/result.json'] = without_clock(result)
    lines = (directory / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found[f'{stage}/metrics.jsonl'] = [*map(without_clock, records)]
    with np.load(directory / 'pictures.npz') as pictures:
      found |= {f'{stage}/{k}': pictures[k] for k in pictures.files}
    # The last but one is that of some timed save.
    saved = checkpoints.steps(directory / 'checkpoints')
    for step in {saved[-1], result['step']}:
      state = state_on_disk(directory / 'checkpoints' / str(step) / 'state')
      leaves = jax.tree_util.tree_leaves_with_path(state)
      found |= {f'{stage} {step} {path}': leaf for path, leaf in leaves}
  return found


def differences(ours, theirs):
  """Names of what differs by a bit."""
  return sorted(
    name
    for name in ours.keys() | theirs.keys()
    if name not in ours
    or name not in theirs
    or not np.array_equal(ours[name], theirs[name])
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--output', type=pathlib.Path, default=RESULTS / 'kill_loop.json'
  )
  options = parser.parse_args()
  logging.set_verbosity(logging.FATAL)  # Orbax misses its older files.
  generator = random.Random(options.seed)
  begin = time.monotonic()
  phases, kills, finished, different = {}, 0, 0, []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    finish(start(folder / 'compiling', folder / 'cache'))
    middle = time.monotonic()
    finish(start(folder / 'peace', folder / 'cache'))
    length = time.monotonic() - middle
    peace = contents(folder / 'peace')
    # Programs from the cache compute what freshly compiled ones compute.
    different += differences(contents(folder / 'compiling'), peace)
    while kills < options.kills or (folder / f'run{finished}').exists():
      workdir = folder / f'run{finished}'
      # Now and then nothing is compiled yet.
      cold = kills % 10 == 9
      cache = folder / (f'cold{kills}' if cold else 'cache')
      process = start(workdir, cache)
      try:
        wait = None
        if kills < options.kills:
          wait = generator.uniform(0, length)
        output, _ = process.communicate(timeout=wait)
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        name = phase(workdir) + (', cold' if cold else '')
        phases[name] = phases.get(name, 0) + 1
        print(f'kill {kills} after {wait:.1f} s: {name}', flush=True)
        continue
      if process.returncode:
        raise SystemExit(f'A run failed after {kills} kills:\n{output}')
      found = differences(contents(workdir), peace)
      different += found
      finished += 1
      print(f'run {finished}: {found or "the same, bit for bit"}', flush=True)
  summary = {
    'kills': kills,
    'finished_runs': finished,
    'compared_values': len(peace),
    'different': different,
    'killed_in': dict(sorted(phases.items())),
    'run_seconds': round(length, 1),
    'seconds': round(time.monotonic() - begin, 1),
    'device': logs.device_name(),
    'versions': logs.versions(),
  }
  options.output.parent.mkdir(parents=True, exist_ok=True)
  logs.write_json(options.output, summary)
  print(json.dumps(summary))
  return 1 if different else 0


if __name__ == '__main__':
  sys.exit(main())
