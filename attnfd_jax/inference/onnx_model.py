# SPDX-License-Identifier: Apache-2.0
"""Runs ONNX files of `export` in place of a stage's network."""

from collections.abc import Mapping
import contextlib
import importlib
import json
import pathlib
import types
from typing import Any

import numpy as np

from attnfd_jax.errors import convert_errors, InputError
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.types import StrPath

# Logit of the class of a file that returns class ids: large enough that it
# stays the largest when maps are averaged, with a probability of 1.
_CERTAIN = 100.0


def import_onnxruntime() -> types.ModuleType:
  """The package, or an InputError that says how to install it."""
  try:
    return importlib.import_module('onnxruntime')
  except ImportError as error:
    remedy = "pip install 'attnfd_jax[onnx]'"
    raise InputError(f'ONNX files need onnxruntime; {remedy}.') from error


class OnnxNetwork:
  """An ONNX file in onnxruntime on the CPU, in place of network and variables.

  Attributes:
    has_logits: whether the file returns logits, not class ids.
    device: where the file runs, for results.
    metadata: {name: value} stored in the file.
  """

  def __init__(self, path: StrPath):
    runtime = import_onnxruntime()
    if not pathlib.Path(path).is_file():
      raise InputError(f'--model={path}: no such file.')
    self.device = f'CPU (onnxruntime {runtime.__version__})'
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # Errors are raised; no warnings.
    with convert_errors(f'{path} is not a usable ONNX file'):
      self._session = runtime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider']
      )
      stored = self._session.get_modelmeta().custom_metadata_map
    self.metadata = _decode(stored)
    self.has_logits = self._session.get_outputs()[0].name == 'logits'
    self._is_uint8 = 'uint8' in self._session.get_inputs()[0].type
    self._num_classes = len(self.metadata.get('class_names', ()))

  def prepared(self, image: np.ndarray) -> np.ndarray:
    """The input of the file from uint8 images [b, h, w, 3]."""
    return image if self._is_uint8 else np.asarray(normalize(image))

  def find(self, prepared: np.ndarray) -> np.ndarray:
    """The output of the file: logits [b, h, w, k] or class ids [b, h, w]."""
    return self._session.run(None, {'image': prepared})[0]

  def run(self, image: np.ndarray) -> np.ndarray:
    """Logits, float32 [b, h, w, k], of uint8 images [b, h, w, 3]."""
    output = self.find(self.prepared(image))
    if self.has_logits:
      return output
    one_hot = np.eye(self._num_classes, dtype=np.float32)[output]
    return np.float32(_CERTAIN) * one_hot


def _decode(metadata: Mapping[str, str]) -> dict[str, Any]:
  """The entries in JSON, as `export` writes them; other programs add more."""
  decoded = {}
  for name, value in metadata.items():
    with contextlib.suppress(ValueError):
      decoded[name] = json.loads(value)
  return decoded


def load(path: StrPath) -> tuple[OnnxNetwork, dict, dict[str, Any]]:
  """An ONNX file of `export` as loading.load_network returns a stage.

  Returns:
    the network, no variables, and the keys of the stage's config.json that
    Predictor and scoring read.

  Raises:
    InputError: if the file is absent, damaged, or not from `export`.
  """
  network = OnnxNetwork(path)
  metadata = network.metadata
  if not {'class_names', 'palette', 'training'} <= metadata.keys():
    problem = 'does not say what it was trained for'
    remedy = 'export the stage again with this version'
    raise InputError(f'--model={path} {problem}; {remedy}.')
  stage = metadata['training']
  kind = 'int8' if 'quantized' in metadata else 'float32'
  name = f'{path}: {stage["network"]} of {stage["stage"]}'
  info = {
    'stage': stage['stage'],
    'checkpoint_step': stage['step'],
    'class_names': metadata['class_names'],
    'palette': np.array(metadata['palette'], np.uint8),
    'data': stage['data'],
    'eval': stage['eval'],
    'description': f'{name}, step {stage["step"]}, in {kind}',
  }
  return network, {}, info
