# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints as our variables, and back; torch is not needed.

Recognised: the authors' models and distillers, plain DeepLabV3+ of the same
family, and trunks of torchvision (ResNet, MobileNetV2) and tonylins
(MobileNetV2).
"""

from collections.abc import Mapping
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.errors import InputError
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.deeplab import TAPS
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import names as torch_names

# Layers of torchvision's MobileNetV2 blocks -> those of the reference.
_TORCHVISION_BLOCK_1 = {'0.0': '0', '0.1': '1', '1': '3', '2': '4'}
_TORCHVISION_BLOCK = {
  '0.0': '0',
  '0.1': '1',
  '1.0': '3',
  '1.1': '4',
  '2': '6',
  '3': '7',
}


@dataclasses.dataclass(frozen=True)
class Report:
  """What an import found; names are those of the file.

  Attributes:
    loaded: tensors that were used.
    missing: names that the network needs and the file lacks.
    unexpected: names that the network has no place for.
    reshaped: {name: (shape found, shape wanted)}, not used.
  """

  loaded: list
  missing: list
  unexpected: list
  reshaped: dict

  @property
  def complete(self):
    return not (self.missing or self.unexpected or self.reshaped)

  def __str__(self):
    lines = [
      f'loaded {len(self.loaded)}, missing {len(self.missing)}, unexpected '
      f'{len(self.unexpected)}, reshaped {len(self.reshaped)}'
    ]
    for kind in ('missing', 'unexpected'):
      names = getattr(self, kind)
      more = f' and {len(names) - 5} more' if len(names) > 5 else ''
      if names:
        lines.append(f'{kind}: {", ".join(names[:5])}{more}')
    for name, (found, wanted) in list(self.reshaped.items())[:5]:
      lines.append(f'{name}: has {found}, needs {wanted}')
    return '; '.join(lines)


def _as_arrays(state_dict):
  """NumPy arrays of a mapping of arrays or torch tensors."""

  def convert(value):
    if hasattr(value, 'detach'):
      value = value.detach().cpu().numpy()
    return np.asarray(value)

  return {name: convert(value) for name, value in state_dict.items()}


def _read(source):
  if isinstance(source, Mapping):
    return _as_arrays(source)
  return torch_files.read_state_dict(source)


def reference_names(tensors):
  """Renames trunks of other projects; drops classifiers, counters, aliases.

  Raises:
    InputError: if an alias differs from what it repeats.
  """
  trunk_only = not any(name.startswith('backbone.') for name in tensors)
  # tonylins numbers layers as the reference; torchvision nests them.
  nested = any(re.match(r'features\.2\.conv\.0\.0\.', x) for x in tensors)
  found = {}
  for name, value in tensors.items():
    if name.endswith('num_batches_tracked'):
      continue
    if trunk_only:
      if re.match(r'(fc|classifier|features\.18)\.', name):
        continue
      name = f'backbone.{_unnest(name) if nested else name}'
    found[name] = value
  for name in list(found):
    for alias in torch_names.aliases(name):
      if alias in found and not np.array_equal(found.pop(alias), found[name]):
        raise InputError(f'{alias} differs from {name}, which it must repeat.')
  return found


def _unnest(name):
  match = re.fullmatch(r'features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(\w+)', name)
  if not match:
    return name
  block, layer, leaf = match.groups()
  names = _TORCHVISION_BLOCK_1 if block == '1' else _TORCHVISION_BLOCK
  return f'features.{block}.conv.{names[layer]}.{leaf}'


def _abstract(module, *inputs):
  init = functools.partial(module.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), *inputs)


@functools.lru_cache  # Traces the whole network.
def _abstract_network(network):
  return _abstract(network, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def abstract_gates(network):
  """Shapes {'params', 'batch_stats'} of the CBAMs of a network, by tap."""
  gates = {
    tap: _abstract(CBAM(), jax.ShapeDtypeStruct((1, 2, 2, c), jnp.float32))
    for tap, c in feature_channels(network).items()
  }
  return {
    part: {tap: gate[part] for tap, gate in gates.items()}
    for part in ('params', 'batch_stats')
  }


def _gate_path_name(path):
  tap, rest = path.split('/', 1)
  return torch_names.gate_name(tap, rest)


def _merge(*results):
  """(names used, names missing, reshaped) of several calls of `fill`."""
  used, reshaped = set(), {}
  for _, more_used, more_reshaped, _ in results:
    used |= more_used
    reshaped |= more_reshaped
  missing = [name for *_, names in results for name in names]
  return used, missing, reshaped


def _fill(target, tensors, name_of):
  tree, used, reshaped = torch_names.fill(target, tensors, name_of)
  paths = (key.split('/', 1)[1] for key in torch_names.flatten(target))
  missing = [name for name in map(name_of, paths) if name not in tensors]
  return tree, used, reshaped, missing


def import_network(tensors, network):
  """Variables of `network` from named arrays, with holes where none fits.

  Args:
    tensors: {name: array}, names as in `reference_names`.
    network: DeepLabV3Plus.

  Returns:
    The variables, None where a tensor is missing; the three CBAMs as
    {'params', 'batch_stats'} or None; and a Report.
  """
  target = _abstract_network(network)
  name_of = functools.partial(
    torch_names.network_name, backbone=network.backbone
  )
  parts = [_fill(target, tensors, name_of)]
  attention = None
  # A parameter-free CBAM leaves its unused convolution in the file.
  if 'backbone.cbam.ChannelGate.mlp.1.weight' in tensors:
    if not network.in_path_attention:
      gates = abstract_gates(network)
      parts.append(_fill(gates, tensors, _gate_path_name))
      attention = parts[1][0]
  used, missing, reshaped = _merge(*parts)
  left = sorted(
    name
    for name in tensors.keys() - used
    if not ('.cbam.' in name and attention is None)
  )
  report = Report(sorted(used - reshaped.keys()), missing, left, reshaped)
  return parts[0][0], attention, report


def backbone_only(report):
  """Whether the file holds a trunk and no head."""
  return all(name.startswith('backbone.') for name in report.loaded)


def infer_options(tensors):
  """Options of DeepLabV3Plus that a file shows, as far as it shows them.

  Args:
    tensors: {name: array}, names as in `reference_names`.

  Returns:
    A part of {'backbone', 'num_classes', 'width_multiplier', 'aspp_channels',
    'decoder_channels', 'low_level_channels'}.
  """
  found = {}

  def look(option, name, divisor=None):
    size = (*tensors[name].shape, 0)[0] if name in tensors else 0
    if size:
      found[option] = size / divisor if divisor else size

  blocks = {
    match[1]
    for match in (re.match(r'backbone\.layer3\.(\d+)\.', x) for x in tensors)
    if match
  }
  if any(name.startswith('backbone.features.') for name in tensors):
    found['backbone'] = 'mobilenet_v2'
    look('width_multiplier', 'backbone.features.17.conv.6.weight', 320)
  elif blocks:
    bottleneck = 'backbone.layer3.0.conv3.weight' in tensors
    kinds = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101}
    if (len(blocks), bottleneck) in kinds:
      found['backbone'] = f'resnet{kinds[len(blocks), bottleneck]}'
    look('width_multiplier', 'backbone.conv1.weight', 64)
  look('num_classes', 'decoder.last_conv.8.weight')
  look('aspp_channels', 'aspp.bn1.weight')
  look('decoder_channels', 'decoder.last_conv.1.weight')
  look('low_level_channels', 'decoder.bn1.weight')
  return found


@functools.lru_cache
def feature_channels(network):
  """{tap: channels} of a network's taps."""
  image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  apply = functools.partial(network.apply, train=False)
  out = jax.eval_shape(apply, _abstract_network(network), image)
  return {tap: x.shape[-1] for tap, x in out['features'].items()}


def load_torch(source, *, backbone, num_classes, **options):
  """A DeepLabV3Plus and its attention from a PyTorch checkpoint.

  Args:
    source: path of a .pth, .pth.tar or .safetensors file, or a mapping of
      names to arrays or torch tensors.
    backbone: key of BACKBONES.
    num_classes: of the classifier in the file.
    **options: of DeepLabV3Plus.

  Returns:
    variables {'params', 'batch_stats'} of DeepLabV3Plus, and the three CBAMs
    as {'params', 'batch_stats'} with the taps as keys, or None.

  Raises:
    InputError: if any tensor is missing, unexpected or of another shape.
  """
  network = DeepLabV3Plus(backbone, num_classes, **options)
  tensors = reference_names(_read(source))
  variables, attention, report = import_network(tensors, network)
  if not report.complete:
    raise InputError(f'Not a {backbone} with {num_classes} classes: {report}.')
  return variables, attention


def load_pretrained(path, network):
  """Variables of a network from the backbone, or all, of a PyTorch file.

  Args:
    path: of the file; a head for other classes is left out.
    network: DeepLabV3Plus.

  Returns:
    The variables with None where the file has nothing that fits, and a line
    that says so.

  Raises:
    InputError: if it cannot be read, or does not fill the whole backbone.
  """
  try:
    tensors = reference_names(torch_files.read_state_dict(path))
  except OSError as error:
    raise InputError(
      f'{path}: cannot be read ({error.strerror}); is pretrained of '
      'config.teacher or config.student right?'
    ) from error
  variables, _, report = import_network(tensors, network)
  backbone = jax.tree.leaves(
    [tree.get('backbone') for tree in variables.values()],
    is_leaf=lambda x: x is None,
  )
  if any(leaf is None for leaf in backbone):
    raise InputError(
      f'{path}: does not fill the backbone {network.backbone}: {report}.'
    )
  what = 'whole network'
  if not report.complete:
    what = 'backbone and what else fits'
  if backbone_only(report):
    what = 'backbone'
  return variables, f'starts from the {what} of {path}: {report}'


@dataclasses.dataclass(frozen=True)
class DistillationPair:
  """Student, teacher and distiller with their variables."""

  student: DeepLabV3Plus
  teacher: DeepLabV3Plus
  distiller: AttnFD
  student_variables: dict
  teacher_variables: dict
  distiller_variables: dict


def load_torch_distiller(
  state_dict, *, student_backbone, teacher_backbone, num_classes
):
  """The authors' Distiller (t_net.*, s_net.*, Connectors.*), recipe reference.

  Args:
    state_dict: names to arrays or torch tensors, or the path of a file.
    student_backbone, teacher_backbone: keys of BACKBONES.
    num_classes: of both networks.

  Raises:
    InputError: if a network or a connector is incomplete.
  """
  tensors = _read(state_dict)

  def part(prefix):
    return {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if name.startswith(prefix)
    }

  student = DeepLabV3Plus(
    student_backbone, num_classes, aspp_dropout=0.0, update_norms_twice=True
  )
  teacher = DeepLabV3Plus(teacher_backbone, num_classes, aspp_dropout=0.0)
  loaded = []
  for network, prefix in ((student, 's_net.'), (teacher, 't_net.')):
    found = reference_names(part(prefix))
    variables, attention, report = import_network(found, network)
    if not report.complete or attention is None:
      raise InputError(f'{prefix}* is not a {network.backbone}: {report}.')
    loaded.append((variables, attention))
  (student_variables, gates), (teacher_variables, teacher_gates) = loaded
  channels = [feature_channels(network) for network in (student, teacher)]
  backbones = (student_backbone, teacher_backbone)
  resnets = all(name.startswith('resnet') for name in backbones)
  distiller = AttnFD(
    *channels,
    teacher_attention='checkpoint',
    student_attention='mlp_frozen',
    reduction='batchmean',
    teacher_bn='batch',
    fan_out_taps=('backbone',) if resnets else (),
  )
  maps = [
    {tap: jnp.zeros((1, 2, 2, c)) for tap, c in taps.items()}
    for taps in channels
  ]
  target = dict(_abstract(distiller, *maps))
  target.pop('teacher')
  connectors = {
    part: {
      name: tree for name, tree in trees.items() if name.startswith('connec')
    }
    for part, trees in target.items()
  }

  def connector_name(path):
    module, rest = path.split('/', 1)
    return torch_names.connector_name(module.removeprefix('connectors_'), rest)

  filled, _, reshaped, missing = _fill(connectors, tensors, connector_name)
  if missing or reshaped:
    raise InputError(
      f'Connectors do not fit: {Report([], missing, [], reshaped)}.'
    )
  variables = {
    part: filled[part]
    | {f'student_gates_{tap}': gates[part][tap] for tap in TAPS}
    for part in ('params', 'batch_stats')
  }
  variables['teacher'] = teacher_gates
  return DistillationPair(
    student,
    teacher,
    distiller,
    student_variables,
    teacher_variables,
    variables,
  )


def export_torch(variables, attention=None, *, backbone):
  """{name: array} that the authors' DeepLab loads strictly.

  Args:
    variables: of a DeepLabV3Plus.
    attention: its three CBAMs as of `load_torch`; without them the result fits
      a plain DeepLabV3+ of the same family.
    backbone: key of BACKBONES.
  """
  tensors = torch_names.export(
    variables, functools.partial(torch_names.network_name, backbone=backbone)
  )
  if attention is not None:
    tensors |= torch_names.export(attention, _gate_path_name)
  for name in list(tensors):
    # The same array under two names is one storage in the file.
    tensors |= dict.fromkeys(torch_names.aliases(name), tensors[name])
  return tensors
