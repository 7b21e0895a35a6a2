# SPDX-License-Identifier: Apache-2.0
r"""Where the time of a step on a CPU goes, by kind of operation.

  python experiments/speed/time_by_kind.py [--form=FORM] [--student=resnet18]

FORM is `ours`, or one of the training steps of peer.py, which needs PyTorch.
Prints a line of JSON: milliseconds a step in convolutions and products (with
what changes their layout), in everything else, and the ten largest operations.
Profilers cost both sides some percent.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import tempfile
import time

PRODUCTS = re.compile('conv|dot|mm|mkldnn')


def measure_ours(options):
  """(seconds a step, {operation: ms a step}) of the compiled program."""
  import jax
  from ml_collections import ConfigDict

  from attnfd_jax import cli
  from attnfd_jax.benchmarks import train

  cli.enable_compilation_cache()
  keys = ('teacher_checkpoint', 'method', 'dtype', 'trace')
  config = train.configure(
    ConfigDict(
      vars(options)
      | dict.fromkeys(keys, '')
      | {'config': None, 'recipe': 'reference'}
    )
  )
  stage = train.make_stage(config, options.num_classes)
  state, *fixed = train.step_arguments(stage)
  program = stage.make_train_step().lower(state, *fixed).compile()

  def step():
    nonlocal state
    state, _ = jax.block_until_ready(program(state, *fixed))

  for _ in range(2):
    step()
  # Events have the names of instructions, whose source tells the operation.
  operation = {}
  for line in program.as_text().splitlines():
    found = re.match(r'\s*(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\(', line)
    if found:
      source = re.search(r'op_name="[^"]*?([^/"]*)"', line)
      operation[found[1]] = source[1] if source else found[2]
  total = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      seconds = timed(step, options.steps)
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      for line in plane.lines:
        for event in line.events:
          if event.name in operation:
            total[operation[event.name]] += event.duration_ns / 1e6
  return seconds, total


def measure_theirs(options):
  """As `measure_ours`, of a form of peer.py."""
  import peer
  import torch

  options.compile, options.dtype = False, 'float32'
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  step = peer.make_step(options, torch.device('cpu'))
  for _ in range(2):
    step()
  with torch.profiler.profile() as profiler:
    seconds = timed(step, options.steps)
  total = collections.Counter()
  for event in profiler.key_averages():
    total[event.key] += event.self_cpu_time_total / 1e3
  return seconds, total


def timed(step, number):
  start = time.perf_counter()
  for _ in range(number):
    step()
  return (time.perf_counter() - start) / number


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--form', default='ours')
  parser.add_argument('--student', default='resnet18')
  parser.add_argument('--teacher', default='resnet101')
  parser.add_argument('--batch', type=int, default=2)
  parser.add_argument('--height', type=int, default=257)
  parser.add_argument('--width', type=int, default=257)
  parser.add_argument('--num_classes', type=int, default=21)
  parser.add_argument('--steps', type=int, default=3)
  options = parser.parse_args()
  measure = measure_ours if options.form == 'ours' else measure_theirs
  seconds, total = measure(options)
  kinds = collections.Counter()
  for name, ms in total.items():
    kind = 'products' if PRODUCTS.search(name) else 'other'
    kinds[kind] += ms / options.steps
  largest = {
    name: round(ms / options.steps, 1) for name, ms in total.most_common(10)
  }
  print(
    json.dumps(
      {
        **vars(options),
        'step_ms': round(1e3 * seconds, 1),
        **{kind: round(ms, 1) for kind, ms in kinds.items()},
        'largest': largest,
      }
    )
  )


if __name__ == '__main__':
  main()
