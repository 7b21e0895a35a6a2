# SPDX-License-Identifier: Apache-2.0
"""Names of our variables in the authors' PyTorch checkpoints, both ways.

Every leaf of a tree of ours has one name there (METHOD section 3), so import
and export walk the same table: nothing is guessed from shapes.
"""

import re
from typing import NamedTuple

from flax import traverse_util
import numpy as np

# (regex of our module, its name there); first full match wins. A ConvNorm ends
# in conv or bn here, and in two names that the last two columns give there.
_RESNET = (
  (r'stem', '', 'conv1', 'bn1'),
  (r'layer(\d)_(\d+)/conv(\d)', r'layer\1.\2.', r'conv\3', r'bn\3'),
  (r'layer(\d)_(\d+)/downsample', r'layer\1.\2.downsample.', '0', '1'),
)
_MOBILENET = (
  (r'stem', 'features.0.', '0', '1'),
  # Block 1 has no expansion: its convolutions are numbered from there.
  (r'block1/depthwise', 'features.1.conv.', '0', '1'),
  (r'block1/project', 'features.1.conv.', '3', '4'),
  (r'block(\d+)/expand', r'features.\1.conv.', '0', '1'),
  (r'block(\d+)/depthwise', r'features.\1.conv.', '3', '4'),
  (r'block(\d+)/project', r'features.\1.conv.', '6', '7'),
)
_HEADS = (
  (r'aspp/point', 'aspp.aspp1.', 'atrous_conv', 'bn'),
  (r'aspp/atrous1', 'aspp.aspp2.', 'atrous_conv', 'bn'),
  (r'aspp/atrous2', 'aspp.aspp3.', 'atrous_conv', 'bn'),
  (r'aspp/atrous3', 'aspp.aspp4.', 'atrous_conv', 'bn'),
  (r'aspp/pool', 'aspp.global_avg_pool.', '1', '2'),
  (r'aspp/merge', 'aspp.', 'conv1', 'bn1'),
  (r'decoder/low_level', 'decoder.', 'conv1', 'bn1'),
  (r'decoder/conv1', 'decoder.last_conv.', '0', '1'),
  (r'decoder/conv2', 'decoder.last_conv.', '4', '5'),
)
_CONNECTOR_NUMBER = {'backbone': 3, 'aspp': 4, 'decoder': 5}
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_GATES = {
  'mlp_reduce': 'ChannelGate.mlp.1',
  'mlp_expand': 'ChannelGate.mlp.3',
  'spatial_conv': 'SpatialGate.spatial.conv',
  'spatial_bn': 'SpatialGate.spatial.bn',
}
# Ours is [in, out] or [h, w, in, out], theirs [out, in] or [out, in, h, w].
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_THEIRS = {2: (1, 0), 4: (3, 2, 0, 1)}


def _conv_norm(rules, module, part, leaf):
  """Name of a leaf of the 'conv' or 'bn' of a ConvNorm at `module`."""
  for pattern, prefix, *parts in rules:
    if match := re.fullmatch(pattern, module):
      name = match.expand(prefix + parts[part == 'bn'])
      return f'{name}.{_LEAVES[leaf]}'
  raise KeyError(module)


def network_name(path, backbone):
  """Name of a leaf of DeepLabV3Plus.

  Args:
    path: without its collection, e.g. 'aspp/pool/bn/scale'.
    backbone: key of BACKBONES.
  """
  module, leaf = path.rsplit('/', 1)
  if module == 'classifier':
    return f'decoder.last_conv.8.{_LEAVES[leaf]}'
  if gate := re.fullmatch(r'attention_(\w+?)/(.*)', path):
    return gate_name(*gate.groups())
  module, part = module.rsplit('/', 1)
  if not module.startswith('backbone/'):
    return _conv_norm(_HEADS, module, part, leaf)
  rules = _RESNET if backbone.startswith('resnet') else _MOBILENET
  module = module.removeprefix('backbone/')
  return f'backbone.{_conv_norm(rules, module, part, leaf)}'


def gate_name(tap, path):
  """Name of a leaf of the CBAM at `tap`."""
  # The MLP has its leaves in its own names: mlp_reduce_kernel.
  module, leaf = re.split('/|_(?=kernel$|bias$)', path)
  return f'{tap}.cbam.{_GATES[module]}.{_LEAVES[leaf]}'


def connector_name(tap, path):
  """Name of a leaf of the Connector at `tap`: the last three of their six."""
  *_, part, leaf = path.split('/')
  index = 0 if part == 'conv' else 1
  return f'Connectors.{_CONNECTOR_NUMBER[tap]}.{index}.{_LEAVES[leaf]}'


def aliases(name):
  """Other names of one tensor: MobileNetV2's trunk is registered twice."""
  match = re.fullmatch(r'(.*backbone)\.features\.(\d+)\.(.*)', name)
  if not match:
    return []
  trunk, index, rest = match.groups()
  half = 'low' if int(index) <= 3 else 'high'
  return [f'{trunk}.{half}_level_features.{index}.{rest}']


class Report(NamedTuple):
  """What an import found; names are those of the file.

  Attributes:
    loaded: tensors that were used.
    missing: names that the network needs and the file lacks.
    unexpected: names that the network has no place for.
    reshaped: {name: (its shape, the shape that fits)}, not used.
  """

  loaded: list[str]
  missing: list[str]
  unexpected: list[str]
  reshaped: dict[str, tuple]

  @property
  def complete(self):
    return not (self.missing or self.unexpected or self.reshaped)

  def __str__(self):
    counts = [f'{kind} {len(names)}' for kind, names in self._asdict().items()]
    parts = [', '.join(counts)]
    for kind in ('missing', 'unexpected'):
      if names := getattr(self, kind):
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        parts.append(f'{kind}: {", ".join(names[:5])}{more}')
    for name, (found, fits) in [*self.reshaped.items()][:5]:
      parts.append(f'{name}: has {found}, needs {fits}')
    return '; '.join(parts)


def flatten(tree):
  """{'collection/path': leaf} of a tree of collections."""
  return traverse_util.flatten_dict(tree, sep='/')


def fill(target, tensors, name_of):
  """Arrays of `tensors` in the structure of `target`.

  Args:
    target: {collection: tree} of arrays or shapes.
    tensors: {their name: array}.
    name_of: path without collection -> their name.

  Returns:
    The filled tree, in which leaves without a tensor are None, and a Report.
  """
  filled, loaded, missing, reshaped = {}, [], [], {}
  for key, leaf in flatten(target).items():
    path = key.split('/', 1)[1]
    name = name_of(path)
    filled[key] = None
    if name not in tensors:
      missing.append(name)
      continue
    value = np.asarray(tensors[name])
    if path.endswith('kernel'):
      value = value.transpose(_TO_OURS.get(value.ndim, range(value.ndim)))
    if value.shape != leaf.shape:
      reshaped[name] = (value.shape, leaf.shape)
      continue
    loaded.append(name)
    filled[key] = np.ascontiguousarray(value, dtype=leaf.dtype)
  unexpected = sorted(tensors.keys() - {*loaded, *reshaped})
  report = Report(sorted(loaded), missing, unexpected, reshaped)
  return traverse_util.unflatten_dict(filled, sep='/'), report


def export(tree, name_of):
  """{their name: array} of a tree of collections, with batch counters."""
  tensors = {}
  for key, leaf in flatten(tree).items():
    path = key.split('/', 1)[1]
    name = name_of(path)
    value = np.asarray(leaf)
    if path.endswith('kernel'):
      value = value.transpose(_TO_THEIRS[value.ndim])
    tensors[name] = np.ascontiguousarray(value)
    if name.endswith('.running_var'):
      counter = name.removesuffix('running_var') + 'num_batches_tracked'
      tensors[counter] = np.zeros((), np.int64)
  return tensors
