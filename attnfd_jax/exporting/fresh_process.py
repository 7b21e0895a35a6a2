# SPDX-License-Identifier: Apache-2.0
"""Runs a file of `export` in a process that has nothing else of ours.

  python -P fresh_process.py FORMAT FILE FOLDER OPTIONS

Reads images from FOLDER/images.npz; writes what the file makes of them, and
the seconds, to FOLDER/found.npz. OPTIONS are of the loader, in JSON. All that a
program needs to use a file of StableHLO or ONNX is in its loader.
"""

import json
import pathlib
import sys
import timeit

import numpy as np


def load_stablehlo(path):
  import jax.export

  data = bytearray(pathlib.Path(path).read_bytes())
  return jax.jit(jax.export.deserialize(data).call)


def load_onnx(path):
  import onnxruntime

  model = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  return lambda image: model.run(None, {'image': image})[0]


def load_weights(path, **options):
  """Of .pth and .safetensors; this one needs the package."""
  import jax

  from attnfd_jax.models.deeplab import DeepLabV3Plus
  from attnfd_jax.pytorch.networks import load_torch

  variables, _ = load_torch(path, **options)
  network = DeepLabV3Plus(**options)
  return jax.jit(lambda x: network.apply(variables, x, train=False)['logits'])


LOADERS = {'stablehlo': load_stablehlo, 'onnx': load_onnx}
LOADERS |= dict.fromkeys(('safetensors', 'pth'), load_weights)


def measure(run, images):
  """Results of `run` for each image, and the seconds of its best of 3 calls."""
  calls = [lambda image=image: np.asarray(run(image)) for image in images]
  found = [call() for call in calls]  # Compiles.
  return found, [min(timeit.repeat(call, number=1, repeat=3)) for call in calls]


if __name__ == '__main__':
  kind, path, folder, options = sys.argv[1:]
  run = LOADERS[kind](path, **json.loads(options))
  with np.load(f'{folder}/images.npz') as images:
    found, seconds = measure(run, [*images.values()])
  np.savez(f'{folder}/found.npz', *found, seconds)
