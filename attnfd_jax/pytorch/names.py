# SPDX-License-Identifier: Apache-2.0
"""Maps our variables to names in the authors' PyTorch checkpoints and back.

Every leaf of our variables has one name there (METHOD section 3). Import and
export use the same tables; nothing is guessed from shapes.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any, NamedTuple, TypeAlias

from flax import traverse_util
import numpy as np

from attnfd_jax.types import AnyArray, PyTree

_Rows: TypeAlias = tuple[tuple[str, str, str, str], ...]
# From the path of a leaf, such as 'aspp/pool/bn/scale', to its PyTorch name.
NameOf: TypeAlias = Callable[[str], str]

# (regex of our module, PyTorch prefix, its names of conv and bn), all below
# 'backbone', 'aspp' or 'decoder'. The first full match is used.
_RESNET = (
  (r'stem', '', 'conv1', 'bn1'),
  (r'layer(\d)_(\d+)/conv(\d)', r'layer\1.\2.', r'conv\3', r'bn\3'),
  (r'layer(\d)_(\d+)/downsample', r'layer\1.\2.downsample.', '0', '1'),
)
_MOBILENET = (
  (r'stem', 'features.0.', '0', '1'),
  # Block 1 has no expansion: numbers start at its depthwise convolution.
  (r'block1/depthwise', 'features.1.conv.', '0', '1'),
  (r'block1/project', 'features.1.conv.', '3', '4'),
  (r'block(\d+)/expand', r'features.\1.conv.', '0', '1'),
  (r'block(\d+)/depthwise', r'features.\1.conv.', '3', '4'),
  (r'block(\d+)/project', r'features.\1.conv.', '6', '7'),
)
_EFFICIENTNET = (
  (r'stem', '', '_conv_stem', '_bn0'),
  # Block 0 has no expansion, but its norms are numbered as in other blocks.
  (r'block(\d+)/expand', r'_blocks.\1.', '_expand_conv', '_bn0'),
  (r'block(\d+)/depthwise', r'_blocks.\1.', '_depthwise_conv', '_bn1'),
  (r'block(\d+)/project', r'_blocks.\1.', '_project_conv', '_bn2'),
)
# By the start of the name of a backbone.
_TRUNKS: dict[str, _Rows] = {
  'resnet': _RESNET,
  'mobilenet': _MOBILENET,
  'efficientnet': _EFFICIENTNET,
}
_HEADS: _Rows = (
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
# By rank: kernels are [in, out] or [h, w, in, out] in Flax, and [out, in] or
# [out, in, h, w] in torch.
_TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def network_name(path: str, backbone: str) -> str:
  """PyTorch name of a leaf of DeepLabV3Plus, such as 'aspp/pool/bn/scale'."""
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


def gate_name(tap: str, path: str) -> str:
  """PyTorch name of a leaf of the CBAM at `tap`."""
  # Leaves of the MLP are not nested: mlp_reduce_kernel.
  module, leaf = re.split('/|_(?=kernel$|bias$)', path)
  return f'{tap}.cbam.{_GATES[module]}.{_LEAVES[leaf]}'


def connector_name(tap: str, path: str) -> str:
  """PyTorch name of a leaf of the connector at `tap`.

  The authors register six connectors and use the last three.
  """
  *_, part, leaf = path.split('/')
  index = 0 if part == 'conv' else 1
  return f'Connectors.{_CONNECTOR_NUMBER[tap]}.{index}.{_LEAVES[leaf]}'


def distiller_name(path: str) -> str:
  """PyTorch name of a leaf of AttnFD."""
  module, inner = path.split('/', 1)
  kind, _, tap = module.rpartition('_')
  if kind == 'connectors':
    return connector_name(tap, inner)
  if kind == 'student_gates':
    return f's_net.{gate_name(tap, inner)}'
  # The teacher's gates are in a collection of their own, in 'params' and
  # 'batch_stats'.
  return f't_net.{gate_name(*inner.split("/", 1))}'


def aliases(name: str) -> list[str]:
  """Other names of the same tensor: MobileNetV2's trunk is registered twice."""
  match = re.match(r'(.*backbone\.)(features\.(\d+)\..*)', name)
  if not match:
    return []
  half = 'low' if int(match[3]) <= 3 else 'high'
  return [f'{match[1]}{half}_level_{match[2]}']


class Report(NamedTuple):
  """Which tensors an import used, by their names in the file.

  Attributes:
    loaded: tensors that were used.
    missing: needed by the network, but not in the file.
    unexpected: in the file, but not needed by the network.
    reshaped: of another shape, and so not used: (shape in the file, expected).
    remarks: how the network was located in the file.
  """

  loaded: list[str]
  missing: list[str]
  unexpected: list[str]
  reshaped: dict[str, tuple]
  remarks: Sequence[str] = ()

  @property
  def complete(self) -> bool:
    """Whether the file and the network match exactly."""
    return not (self.missing or self.unexpected or self.reshaped)

  @property
  def fills_backbone(self) -> bool:
    """Whether the whole backbone was loaded."""
    not_loaded = [*self.missing, *self.reshaped]
    return not any(
      re.match(r'backbone\.(?!cbam\.)', name) for name in not_loaded
    )

  @property
  def backbone_only(self) -> bool:
    """Whether nothing but the backbone was loaded."""
    return all(name.startswith('backbone.') for name in self.loaded)

  def __str__(self) -> str:
    kinds = ('loaded', 'missing', 'unexpected', 'reshaped')
    counts = (f'{kind} {len(getattr(self, kind))}' for kind in kinds)
    parts = [', '.join(counts), *self.remarks]
    for kind in ('missing', 'unexpected'):
      if names := getattr(self, kind):
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        parts.append(f'{kind}: {", ".join(names[:5])}{more}')
    for name, (shape, expected) in [*self.reshaped.items()][:5]:
      parts.append(f'{name}: has {shape}, needs {expected}')
    return '; '.join(parts)


def flatten(tree: Any) -> dict[str, Any]:
  """Flattens nested dicts to {'collection/path': leaf}."""
  return traverse_util.flatten_dict(tree, sep='/')


def fill(
  target: PyTree, tensors: Mapping[str, AnyArray], name_of: NameOf
) -> tuple[PyTree, Report]:
  """Arranges PyTorch tensors in the structure of Flax variables.

  Args:
    target: variables or their abstract values.
    tensors: by PyTorch name.
    name_of: from the path of a leaf, without its collection, to its PyTorch
      name.

  Returns:
    Variables, with None for leaves without a tensor of the right shape; and a
    report.
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
      value = value.transpose(_TO_FLAX.get(value.ndim, range(value.ndim)))
    if value.shape == leaf.shape:
      loaded.append(name)
      filled[path] = np.ascontiguousarray(value, dtype=leaf.dtype)
    else:
      reshaped[name] = value.shape, leaf.shape
  unexpected = sorted(tensors.keys() - {*loaded, *reshaped})
  report = Report(sorted(loaded), missing, unexpected, reshaped)
  return traverse_util.unflatten_dict(filled, sep='/'), report


def export(tree: PyTree, name_of: NameOf) -> dict[str, np.ndarray]:
  """PyTorch tensors by name of Flax variables; `fill` is the inverse.

  Adds a num_batches_tracked of 0 for each batch normalization.
  """
  tensors = {}
  for path, leaf in flatten(tree).items():
    name = name_of(path.split('/', 1)[1])
    value = np.asarray(leaf)
    if path.endswith('kernel'):
      value = value.transpose(_TO_TORCH[value.ndim])
    tensors[name] = np.ascontiguousarray(value)
    if name.endswith('.running_var'):
      counter = name.removesuffix('running_var') + 'num_batches_tracked'
      tensors[counter] = np.zeros((), np.int64)
  return tensors
