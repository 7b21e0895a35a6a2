# SPDX-License-Identifier: Apache-2.0
"""Runs a file of `export` in a process that imports nothing else of ours.

  python -P fresh_process.py FORMAT FILE FOLDER OPTIONS

Reads images from FOLDER/images.npz; writes the outputs of the file and the
seconds to FOLDER/found.npz. OPTIONS are those of the loader, in JSON. The
loaders of StableHLO and ONNX show all that a program needs to use such a file.
"""

from collections.abc import Callable, Iterable
import json
import pathlib
import sys
import timeit
from typing import Any

import numpy as np


def load_stablehlo(path: str) -> Callable[[np.ndarray], Any]:
  """Loads a .stablehlo file."""
  import jax.export

  data = bytearray(pathlib.Path(path).read_bytes())
  return jax.jit(jax.export.deserialize(data).call)


def load_onnx(path: str) -> Callable[[np.ndarray], Any]:
  """Loads an .onnx file."""
  import onnxruntime

  model = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  return lambda image: model.run(None, {'image': image})[0]


def load_weights(path: str, **options: Any) -> Callable[[np.ndarray], Any]:
  """Loads a .pth or .safetensors file; this one needs attnfd_jax."""
  import jax

  from attnfd_jax.models.deeplab import DeepLabV3Plus
  from attnfd_jax.pytorch.networks import load_torch

  variables, _ = load_torch(path, **options)
  network: Any = DeepLabV3Plus(**options)
  return jax.jit(lambda x: network.apply(variables, x, train=False)['logits'])


LOADERS = {'stablehlo': load_stablehlo, 'onnx': load_onnx}
LOADERS |= dict.fromkeys(('safetensors', 'pth'), load_weights)


def measure(
  run: Callable[[np.ndarray], Any], images: Iterable[np.ndarray]
) -> tuple[list[np.ndarray], list[float]]:
  """Outputs of `run` for each image, and the seconds of the best of 3 calls."""
  calls = [lambda image=image: np.asarray(run(image)) for image in images]
  outputs = [call() for call in calls]  # Compiles.
  seconds = [min(timeit.repeat(call, number=1, repeat=3)) for call in calls]
  return outputs, seconds


if __name__ == '__main__':
  kind, path, folder, options = sys.argv[1:]
  run = LOADERS[kind](path, **json.loads(options))
  with np.load(f'{folder}/images.npz') as images:
    outputs, seconds = measure(run, [*images.values()])
  np.savez(f'{folder}/found.npz', *outputs, seconds)
