# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints as our variables, and back; torch is not needed.

Recognized: the authors' models and Distiller, plain DeepLabV3+ of the same
family, trunks of torchvision (ResNet, MobileNetV2) and tonylins (MobileNetV2).
"""

from collections.abc import Mapping
import functools
import re
from typing import NamedTuple

import jax
import numpy as np

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus, TAPS
from attnfd_jax.pytorch import files, names

# Options that the first axis of a tensor shows, as a multiple of the last.
_SHOWN = (
  ('num_classes', 'decoder.last_conv.8.weight', 1),
  ('aspp_channels', 'aspp.bn1.weight', 1),
  ('decoder_channels', 'decoder.last_conv.1.weight', 1),
  ('low_level_channels', 'decoder.bn1.weight', 1),
  ('width_multiplier', 'backbone.conv1.weight', 64),
  ('width_multiplier', 'backbone.features.17.conv.6.weight', 320),
)
# (blocks of layer3, bottlenecks) -> key of BACKBONES.
_RESNETS = {
  (2, False): 'resnet18',
  (6, False): 'resnet34',
  (6, True): 'resnet50',
  (23, True): 'resnet101',
}


def read_tensors(source):
  """{name: array} of a file, or of a mapping of arrays or torch tensors."""
  if not isinstance(source, Mapping):
    return files.read_state_dict(source)
  return {
    name: np.asarray(x.detach().cpu() if hasattr(x, 'detach') else x)
    for name, x in source.items()
  }


def reference_names(source):
  """`read_tensors` with trunks of other projects renamed as in the authors'.

  Classifiers of trunks, counters of batches and aliases are left out.
  """
  found = read_tensors(source).items()
  tensors = {k: x for k, x in found if not k.endswith('num_batches_tracked')}
  if not any(name.startswith('backbone.') for name in tensors):
    # tonylins numbers layers as the reference; torchvision nests them.
    nested = 'features.2.conv.0.0.weight' in tensors
    tensors = {
      f'backbone.{_unnest(name) if nested else name}': x
      for name, x in tensors.items()
      if not re.match(r'(fc|classifier|features\.18)\.', name)
    }
  for name in list(tensors):
    for alias in tensors.keys() & names.aliases(name):
      if not np.array_equal(tensors.pop(alias), tensors[name]):
        raise InputError(f'{alias} differs from {name}, which it must repeat.')
  return tensors


def _unnest(name):
  """As the reference numbers the layers that torchvision nests in threes."""
  match = re.fullmatch(r'features\.(\d+)\.conv\.(\d)(?:\.(\d))?\.(\w+)', name)
  if not match:
    return name
  block, index, inner, leaf = match.groups()
  nested = 1 if block == '1' else 2
  layer = 3 * int(index) + int(inner) if inner else int(index) + 2 * nested
  return f'features.{block}.conv.{layer}.{leaf}'


# Tracing a whole network takes seconds.
_abstract = functools.lru_cache(networks.abstract_variables)


def split_gates(variables):
  """The variables without the CBAMs of the forward path, and these by tap."""
  rest, gates = {}, {}
  for part, tree in variables.items():
    gates[part] = {tap: tree[f'attention_{tap}'] for tap in TAPS}
    rest[part] = {k: x for k, x in tree.items() if k[:10] != 'attention_'}
  return rest, gates


def import_network(source, network):
  """Variables of a DeepLabV3Plus, None where no tensor fits; gates; a Report.

  The gates are {'params', 'batch_stats'} of the three CBAMs, if they are in the
  file and not in the forward path, else None.
  """
  tensors = reference_names(source)
  if not networks.is_ours(network):
    raise InputError(
      f'{type(network).__name__}: PyTorch files are read for DeepLabV3Plus '
      'only; load the weights of your own network in its own code.'
    )
  in_path, gates = network.in_path_attention, None
  # A parameter-free CBAM leaves its unused convolution in the file.
  has_gates = 'backbone.cbam.ChannelGate.mlp.1.weight' in tensors
  if not has_gates:
    tensors = {k: x for k, x in tensors.items() if '.cbam.' not in k}
  target = _abstract(network.clone(in_path_attention=in_path or has_gates))
  name_of = functools.partial(names.network_name, backbone=network.backbone)
  variables, report = names.fill(target, tensors, name_of)
  if has_gates and not in_path:
    variables, gates = split_gates(variables)
  return variables, gates, report


def infer_options(tensors):
  """Options of DeepLabV3Plus, as far as tensors of `reference_names` show."""
  found = {}
  for option, name, unit in _SHOWN:
    shape = tensors[name].shape if name in tensors else ()
    if shape and shape[0]:
      found[option] = shape[0] if unit == 1 else shape[0] / unit
  if any(name.startswith('backbone.features.') for name in tensors):
    return found | {'backbone': 'mobilenet_v2'}
  layer3 = [name for name in tensors if name.startswith('backbone.layer3.')]
  blocks = len({name.split('.')[2] for name in layer3})
  kind = (blocks, 'backbone.layer3.0.conv3.weight' in tensors)
  return found | ({'backbone': _RESNETS[kind]} if kind in _RESNETS else {})


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
  variables, attention, report = import_network(source, network)
  if not report.complete:
    raise InputError(f'Not a {backbone} with {num_classes} classes: {report}.')
  return variables, attention


def load_pretrained(path, network):
  """Variables, None where the file has none, as for other classes; and a line.

  InputError, unless the whole backbone is there.
  """
  try:
    variables, _, report = import_network(path, network)
  except OSError as error:
    raise InputError(
      f'{path}: cannot be read ({error.strerror}); is pretrained of '
      'config.teacher or config.student right?'
    ) from error
  holes = [*report.missing, *report.reshaped]
  if any(re.match(r'backbone\.(?!cbam\.)', name) for name in holes):
    raise InputError(
      f'{path}: does not fill the backbone {network.backbone}: {report}.'
    )
  what = 'whole network' if report.complete else 'backbone and what else fits'
  what = 'backbone' if report.backbone_only else what
  return variables, f'starts from the {what} of {path}: {report}'


def export_torch(variables, attention=None, *, backbone):
  """{name: array} that the authors' DeepLab loads strictly.

  Without its three CBAMs, `attention` as of `load_torch`, it is that of a plain
  DeepLabV3+ of the same family.
  """
  for part, gates in (attention or {}).items():
    gates = {f'attention_{tap}': x for tap, x in gates.items()}
    variables = variables | {part: variables[part] | gates}
  name_of = functools.partial(names.network_name, backbone=backbone)
  tensors = names.export(variables, name_of)
  # The same array under two names is one storage in the file.
  return tensors | {
    alias: x for name, x in tensors.items() for alias in names.aliases(name)
  }


class DistillationPair(NamedTuple):
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
  tensors = read_tensors(state_dict)
  student = DeepLabV3Plus(
    student_backbone, num_classes, aspp_dropout=0.0, update_norms_twice=True
  )
  teacher = DeepLabV3Plus(teacher_backbone, num_classes, aspp_dropout=0.0)
  loaded, maps = [], []
  for network, prefix in ((student, 's_net.'), (teacher, 't_net.')):
    found = [name for name in tensors if name.startswith(prefix)]
    own = {name.removeprefix(prefix): tensors[name] for name in found}
    variables, gates, report = import_network(own, network)
    if not report.complete or gates is None:
      raise InputError(f'{prefix}* is not a {network.backbone}: {report}.')
    loaded.append(variables)
    maps.append(networks.abstract_outputs(network, (64, 64))['features'])
  resnets = student_backbone[:6] == teacher_backbone[:6] == 'resnet'
  distiller = AttnFD(
    *({tap: x.shape[-1] for tap, x in taps.items()} for taps in maps),
    teacher_attention='checkpoint',
    student_attention='mlp_frozen',
    reduction='batchmean',
    teacher_bn='batch',
    fan_out_taps=('backbone',) if resnets else (),
  )
  init = functools.partial(distiller.init, jax.random.key(0), train=False)
  target = jax.eval_shape(init, *maps)
  variables, report = names.fill(target, tensors, names.distiller_name)
  if report.missing or report.reshaped:
    report = report._replace(unexpected=[])  # Those of the networks.
    raise InputError(f'Connectors do not fit: {report}.')
  return DistillationPair(student, teacher, distiller, *loaded, variables)
