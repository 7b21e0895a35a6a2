# SPDX-License-Identifier: Apache-2.0
"""Names of our variables in the authors' PyTorch checkpoints, both ways.

Every leaf of a tree of ours has one name there (METHOD section 3), so import
and export walk the same table: nothing is guessed from shapes.
"""

from collections.abc import Sequence
import re
from typing import NamedTuple

from flax import traverse_util
import numpy as np

# (regex of our module, its name there); first full match wins. Both lie below
# the same 'backbone', 'aspp' or 'decoder'. A ConvNorm ends in conv or bn here,
# and in two names that the last two columns give there.
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
_EFFICIENTNET = (
  (r'stem', '', '_conv_stem', '_bn0'),
  # Block 0 has no expansion; the numbers of its norms leave that one out.
  (r'block(\d+)/expand', r'_blocks.\1.', '_expand_conv', '_bn0'),
  (r'block(\d+)/depthwise', r'_blocks.\1.', '_depthwise_conv', '_bn1'),
  (r'block(\d+)/project', r'_blocks.\1.', '_project_conv', '_bn2'),
)
# By what the names of their backbones begin with.
_TRUNKS = {
  'resnet': _RESNET,
  'mobilenet': _MOBILENET,
  'efficientnet': _EFFICIENTNET,
}
_HEADS = (
  (r'point', 'aspp1.', 'atrous_conv', 'bn'),
  (r'atrous1', 'aspp2.', 'atrous_conv', 'bn'),
  (r'atrous2', 'aspp3.', 'atrous_conv', 'bn'),
  (r'atrous3', 'aspp4.', 'atrous_conv', 'bn'),
  (r'pool', 'global_avg_pool.', '1', '2'),
  (r'merge|low_level', '', 'conv1', 'bn1'),
  (r'conv1', 'last_conv.', '0', '1'),
  (r'conv2', 'last_conv.', '4', '5'),
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


def network_name(path, backbone):
  """Name of a leaf of DeepLabV3Plus, given as 'aspp/pool/bn/scale'."""
  if gate := re.fullmatch(r'attention_(\w+?)/(.*)', path):
    return gate_name(*gate.groups())
  if path.startswith('classifier/'):
    return f'decoder.last_conv.8.{_LEAVES[path.removeprefix("classifier/")]}'
  top, *module, part, leaf = path.split('/')
  trunk = (x for kind, x in _TRUNKS.items() if backbone.startswith(kind))
  for pattern, prefix, *parts in next(trunk, ()) + _HEADS:
    if match := re.fullmatch(pattern, '/'.join(module)):
      name = match.expand(prefix + parts[part == 'bn'])
      return f'{top}.{name}.{_LEAVES[leaf]}'
  raise KeyError(path)


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


def distiller_name(path):
  """Name of a leaf of AttnFD; the teacher's gates are params or batch_stats."""
  module, rest = path.split('/', 1)
  kind, _, tap = module.rpartition('_')
  if kind == 'connectors':
    return connector_name(tap, rest)
  if kind == 'student_gates':
    return f's_net.{gate_name(tap, rest)}'
  return f't_net.{gate_name(*rest.split("/", 1))}'


def aliases(name):
  """Other names of one tensor: MobileNetV2's trunk is registered twice."""
  match = re.match(r'(.*backbone\.)(features\.(\d+)\..*)', name)
  if not match:
    return []
  half = 'low' if int(match[3]) <= 3 else 'high'
  return [f'{match[1]}{half}_level_{match[2]}']


class Report(NamedTuple):
  """What an import found, by the names of the file."""

  loaded: list[str]
  missing: list[str]  # The network needs them.
  unexpected: list[str]  # The network has no place for them.
  reshaped: dict[str, tuple]  # Not used: (its shape, the shape that fits).
  remarks: Sequence[str] = ()  # What was done to find the network.

  @property
  def complete(self):
    return not (self.missing or self.unexpected or self.reshaped)

  @property
  def fills_backbone(self):
    holes = [*self.missing, *self.reshaped]
    return not any(re.match(r'backbone\.(?!cbam\.)', name) for name in holes)

  @property
  def backbone_only(self):
    return all(name.startswith('backbone.') for name in self.loaded)

  def __str__(self):
    kinds = ('loaded', 'missing', 'unexpected', 'reshaped')
    counts = (f'{kind} {len(getattr(self, kind))}' for kind in kinds)
    parts = [', '.join(counts), *self.remarks]
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
  """{their name: array} in the structure of `target`, and a Report.

  A leaf without a tensor that fits is None. `name_of` gives their name of a
  path without its collection.
  """
  filled, loaded, missing, reshaped = {}, [], [], {}
  for path, leaf in flatten(target).items():
    name = name_of(path.split('/', 1)[1])
    filled[path] = None
    if name not in tensors:
      missing.append(name)
      continue
    value = np.asarray(tensors[name])
    if path.endswith('kernel'):
      value = value.transpose(_TO_OURS.get(value.ndim, range(value.ndim)))
    if value.shape == leaf.shape:
      loaded.append(name)
      filled[path] = np.ascontiguousarray(value, dtype=leaf.dtype)
    else:
      reshaped[name] = value.shape, leaf.shape
  unexpected = sorted(tensors.keys() - {*loaded, *reshaped})
  report = Report(sorted(loaded), missing, unexpected, reshaped)
  return traverse_util.unflatten_dict(filled, sep='/'), report


def export(tree, name_of):
  """{their name: array} of a tree of collections, with batch counters."""
  tensors = {}
  for path, leaf in flatten(tree).items():
    name = name_of(path.split('/', 1)[1])
    value = np.asarray(leaf)
    if path.endswith('kernel'):
      value = value.transpose(_TO_THEIRS[value.ndim])
    tensors[name] = np.ascontiguousarray(value)
    if name.endswith('.running_var'):
      counter = name.removesuffix('running_var') + 'num_batches_tracked'
      tensors[counter] = np.zeros((), np.int64)
  return tensors
