# SPDX-License-Identifier: Apache-2.0
"""Runs a file of `export` in a process that has nothing else of ours.

  python -P exported.py FORMAT FILE FOLDER OPTIONS

Reads images from FOLDER/<i>.npy, writes what the file makes of them to
FOLDER/<i>_found.npy and the seconds to FOLDER/seconds.json. The loaders of
StableHLO and ONNX are all that a program needs to use such a file.
"""

import json
import pathlib
import sys
import time

import numpy as np


def load_stablehlo(path, options):
  del options
  import jax
  from jax import export

  data = pathlib.Path(path).read_bytes()
  return jax.jit(export.deserialize(bytearray(data)).call)


def load_onnx(path, options):
  del options
  import onnxruntime

  session = onnxruntime.InferenceSession(
    path, providers=['CPUExecutionProvider']
  )
  return lambda image: session.run(None, {'image': image})[0]


def load_torch(path, options):
  """Of .pth and .safetensors; this one needs the package."""
  import jax

  import attnfd_jax

  variables, _ = attnfd_jax.load_torch(path, **options)
  network = attnfd_jax.DeepLabV3Plus(**options)
  apply = jax.jit(lambda x: network.apply(variables, x, train=False)['logits'])
  return apply


LOADERS = {
  'stablehlo': load_stablehlo,
  'onnx': load_onnx,
  'safetensors': load_torch,
  'pth': load_torch,
}


def measure(run, images):
  """Results of `run` for each image, and the seconds of its best of 3 calls."""
  found, seconds = [], []
  for image in images:
    found.append(np.asarray(run(image)))  # Compiles.
    times = []
    for _ in range(3):
      start = time.perf_counter()
      np.asarray(run(image))
      times.append(time.perf_counter() - start)
    seconds.append(min(times))
  return found, seconds


def main(kind, path, folder, options):
  folder = pathlib.Path(folder)
  run = LOADERS[kind](path, json.loads(options))
  images = [
    np.load(folder / f'{i}.npy') for i in range(len([*folder.iterdir()]))
  ]
  found, seconds = measure(run, images)
  for i, array in enumerate(found):
    np.save(folder / f'{i}_found.npy', array)
  (folder / 'seconds.json').write_text(json.dumps(seconds))


if __name__ == '__main__':
  main(*sys.argv[1:])
