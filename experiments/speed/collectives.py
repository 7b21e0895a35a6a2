# SPDX-License-Identifier: Apache-2.0
r"""What a training step sends between devices, read off the compiled program.

  python experiments/speed/collectives.py [--devices=8] [--output=F.json]

The step of ResNet-101 to ResNet-18 is compiled for simulated devices, not run.
Bytes are those of the results of all-reduce, all-gather, reduce-scatter and
collective-permute, beside the ideal: one all-reduce of the gradients, and of
each normalization two sums forward and two backward.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re

KINDS = 'all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all'
BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'u8': 1, 'pred': 1, 's8': 1}


def count(text):
  """{kind: [operations, bytes]} of the collectives of a compiled program."""
  found = collections.defaultdict(lambda: [0, 0])
  for line in text.splitlines():
    match = re.search(rf'= (\(.*?\)|\S+) ({KINDS})(-start)?\(', line)
    if not match:
      continue
    for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
      size = math.prod(int(n) for n in shape.split(',') if n)
      found[match[2]][1] += BYTES[kind] * size
    found[match[2]][0] += 1
  return dict(found)


def measure(devices, options):
  import jax
  import jax.numpy as jnp
  from ml_collections import ConfigDict

  from attnfd_jax.benchmarks import train

  flags = {
    'config': None,
    'student': options.student,
    'teacher': options.teacher,
    'teacher_checkpoint': '',
    'method': '',
    'dtype': '',
    'recipe': '',
    'batch': options.batch * devices,
    'height': options.size,
    'width': options.size,
    'num_classes': 21,
    'steps': 1,
  }
  config = train.configure(ConfigDict(flags))
  config = config.copy_and_resolve_references()
  config.mesh.data = devices
  stage = train.make_stage(config, 21)
  state = stage.abstract_state()
  size = (config.batch_size, options.size, options.size)
  batch = {
    'image': jax.ShapeDtypeStruct((*size, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct(size, jnp.uint8),
  }
  rng = jax.eval_shape(lambda: jax.random.key(0))
  program = stage.make_train_step().lower(
    state, stage.teacher.variables, batch, rng
  )
  compiled = program.compile()
  params = sum(x.size for x in jax.tree.leaves(state.params))
  channels = sum(x.size for x in jax.tree.leaves(state.collections)) // 2
  return {
    'devices': devices,
    'batch_per_device': options.batch,
    'size': options.size,
    'collectives': count(compiled.as_text()),
    'ideal_bytes': 4 * (params + 4 * channels),
    'gradient_bytes': 4 * params,
    'memory_bytes': train.program_memory(compiled),
    'gflops_of_a_device': train.program_flops(compiled) / 1e9,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--student', default='resnet18')
  parser.add_argument('--teacher', default='resnet101')
  parser.add_argument('--batch', type=int, default=2, help='of a device')
  parser.add_argument('--size', type=int, default=129)
  parser.add_argument('--output')
  options = parser.parse_args()
  count_flag = f'--xla_force_host_platform_device_count={options.devices}'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {count_flag}'
  rows, devices = [], 1
  while devices <= options.devices:
    rows.append(measure(devices, options))
    print(json.dumps(rows[-1]), flush=True)
    devices *= 2
  if options.output:
    from attnfd_jax.runs import logs

    found = {'rows': rows, 'versions': logs.versions()}
    text = json.dumps(found, indent=1)
    pathlib.Path(options.output).write_text(text + '\n')


if __name__ == '__main__':
  main()
