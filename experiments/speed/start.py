# SPDX-License-Identifier: Apache-2.0
r"""Seconds from the start of a process to its first finished step.

  python experiments/speed/start.py [--output=F.json]

Four numbers, each with an empty and then with a filled cache of compiled
programs: the quickstart's first stage by `main`; that run stopped by SIGTERM
and started again, to its first step after the resume (filled only); and
ResNet-101 to ResNet-18 at 257 x 257, the teacher from a PyTorch file, by
`benchmark train`.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from attnfd_jax.benchmarks import train
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import logs

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / 'configs' / 'quickstart.py'


def start(module, *arguments, cache):
  environment = os.environ | {'XDG_CACHE_HOME': str(cache)}
  return subprocess.Popen(
    [sys.executable, '-m', f'attnfd_jax.{module}', *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=ROOT,
    env=environment,
  )


def until(process, words):
  """Seconds until a line with `words` comes from the process."""
  begun = time.perf_counter()
  lines = []
  for line in process.stdout:
    lines.append(line)
    if words in line:
      return time.perf_counter() - begun
  sys.exit(f'no {words!r}:\n{"".join(lines)}')


def stop(process):
  """Seconds from SIGTERM to the end."""
  process.send_signal(signal.SIGTERM)
  begun = time.perf_counter()
  process.communicate()
  return time.perf_counter() - begun


def quickstart(workdir, cache):
  process = start(
    'main', f'--config={QUICKSTART}', f'--workdir={workdir}', cache=cache
  )
  return process, until(process, 'first step after')


def write_teacher(path):
  network = DeepLabV3Plus('resnet101', 21)
  shapes = networks.abstract_variables(network)
  variables = train.random_variables(shapes, 0)
  state = torch_models.export_torch(variables, backbone='resnet101')
  torch_files.write_torch(path, {'state_dict': state})


def benchmark(teacher, cache):
  process = start(
    *('benchmark', 'train', '--json', '--student=resnet18', '--batch=2'),
    *('--teacher=resnet101', '--height=257', '--width=257', '--steps=1'),
    f'--teacher_checkpoint={teacher}',
    cache=cache,
  )
  output, _ = process.communicate()
  if process.returncode:
    sys.exit(output)
  return json.loads(output.splitlines()[-1])['seconds_to_first_step']


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--output')
  options = parser.parse_args()
  found = {}

  def tell(name, seconds):
    found[name] = seconds
    print(f'{name}: {seconds:.1f} s', flush=True)

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for state in ('cold', 'warm'):
      process, seconds = quickstart(folder / state, folder / 'cache')
      tell(f'quickstart, {state}', seconds)
      if state == 'warm':
        until(process, 'step 40/')
      tell(f'stopped, {state}', stop(process))
    process, seconds = quickstart(folder / 'warm', folder / 'cache')
    tell('quickstart, resumed', seconds)
    stop(process)
    teacher = folder / 'teacher.pth'
    write_teacher(teacher)
    for state in ('cold', 'warm'):
      seconds = benchmark(teacher, folder / 'other')
      tell(f'resnet101 to resnet18, {state}', seconds)
  if options.output:
    facts = {'device': logs.device_name(), 'versions': logs.versions()}
    text = json.dumps({'seconds': found} | facts, indent=1, sort_keys=True)
    pathlib.Path(options.output).write_text(text + '\n')


if __name__ == '__main__':
  main()
