# SPDX-License-Identifier: Apache-2.0
"""ONNX files of `export`, run where a stage's network is expected."""

import contextlib
import importlib
import json
import pathlib

import numpy as np

from attnfd_jax.errors import explained, InputError
from attnfd_jax.models.deeplab import normalise

# Logits of class ids: so far above the others that they stay the largest, and
# with a probability of 1.
_CERTAIN = 100.0


def import_onnxruntime():
  """The package, or InputError that says how to install it."""
  try:
    return importlib.import_module('onnxruntime')
  except ImportError as error:
    remedy = "pip install 'attnfd_jax[onnx]'"
    raise InputError(f'ONNX files need onnxruntime; {remedy}.') from error


class OnnxNetwork:
  """A file in onnxruntime on the CPU, in place of a network and its variables.

  Attributes:
    has_logits: whether it returns logits, and not class ids.
    device: where it runs, for results.
    metadata: {name: value} that was stored in it.
  """

  is_file = True  # See predictor.is_file.

  def __init__(self, path):
    runtime = import_onnxruntime()
    if not pathlib.Path(path).is_file():
      raise InputError(f'--model={path}: no such file.')
    self.device = f'CPU (onnxruntime {runtime.__version__})'
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # What is wrong is raised.
    with explained(f'{path} is not a usable ONNX file'):
      self._session = runtime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider']
      )
      stored = self._session.get_modelmeta().custom_metadata_map
    self.metadata = _decoded(stored)
    self.has_logits = self._session.get_outputs()[0].name == 'logits'
    self._is_uint8 = 'uint8' in self._session.get_inputs()[0].type
    self._num_classes = len(self.metadata.get('class_names', ()))

  def prepared(self, image):
    """What the file takes, of uint8 images [b, h, w, 3]."""
    return image if self._is_uint8 else np.asarray(normalise(image))

  def find(self, prepared):
    """What the file finds: logits [b, h, w, k] or class ids [b, h, w]."""
    return self._session.run(None, {'image': prepared})[0]

  def run(self, image):
    """Logits, float32 [b, h, w, k], of uint8 images [b, h, w, 3]."""
    found = self.find(self.prepared(image))
    if self.has_logits:
      return found
    return (
      np.float32(_CERTAIN) * np.eye(self._num_classes, dtype=np.float32)[found]
    )


def _decoded(metadata):
  """Those that are JSON, as ours are; other programs add their own."""
  found = {}
  for name, value in metadata.items():
    with contextlib.suppress(ValueError):
      found[name] = json.loads(value)
  return found


def load(path):
  """A file's network, no variables, and its config.json as far as a Predictor
  and scoring read it; as loading.load_network returns a stage.

  InputError if the file is absent, damaged, or not from `export`.
  """
  network = OnnxNetwork(path)
  metadata = network.metadata
  if not {'class_names', 'palette', 'training'} <= metadata.keys():
    what = 'does not say what it was trained for'
    remedy = 'export the stage again with this version'
    raise InputError(f'--model={path} {what}; {remedy}.')
  stage = metadata['training']
  kind = 'int8' if 'quantized' in metadata else 'float32'
  described = f'{path}: {stage["network"]} of {stage["stage"]}'
  return (
    network,
    {},
    {
      'stage': stage['stage'],
      'checkpoint_step': stage['step'],
      'class_names': metadata['class_names'],
      'palette': np.array(metadata['palette'], np.uint8),
      'data': stage['data'],
      'eval': stage['eval'],
      'description': f'{described}, step {stage["step"]}, in {kind}',
    },
  )
