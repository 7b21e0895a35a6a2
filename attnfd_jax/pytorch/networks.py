# SPDX-License-Identifier: Apache-2.0
"""Converts PyTorch checkpoints to Flax variables and back, without torch.

Reads the authors' models and Distiller, plain DeepLabV3+ of the same family,
and backbones of torchvision (ResNet, MobileNetV2), tonylins (MobileNetV2) and
efficientnet_lite_pytorch, below any prefix (recognition.py).
"""

import difflib
import functools
import itertools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.errors import InputError
from attnfd_jax.models import efficientnet_lite
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus, TAPS
from attnfd_jax.pytorch import files, names, recognition, weights
from attnfd_jax.pytorch.files import Tensors
from attnfd_jax.pytorch.names import Report
from attnfd_jax.pytorch.recognition import Found, read_network, TorchSource
from attnfd_jax.types import PyTree, StrPath, Variables

# (option, tensor, n): the first axis of the tensor has n times the option.
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
# (width, depth) of a variant -> key of BACKBONES.
_EFFICIENTNETS = {
  (1.0, 1.0): 'efficientnet_lite0',
  (1.0, 1.1): 'efficientnet_lite1',
  (1.1, 1.2): 'efficientnet_lite2',
}
_IMAGENET = f'pretrained={weights.NAME!r}'


# Tracing a network takes seconds.
_abstract = functools.lru_cache(networks.abstract_variables)


def split_gates(variables: Variables) -> tuple[dict, dict]:
  """Moves the CBAMs out of the variables of a network, into a tree by tap."""
  network, gates = {}, {}
  for part, tree in variables.items():
    gates[part] = {tap: tree[f'attention_{tap}'] for tap in TAPS}
    network[part] = {k: x for k, x in tree.items() if k[:10] != 'attention_'}
  return network, gates


def import_network(
  source: TorchSource | Found, network: Any, *, trunk: bool = False
) -> tuple[dict, dict | None, Report]:
  """Reads the variables of a DeepLabV3Plus from PyTorch tensors.

  Args:
    source: path of a file, mapping of names to tensors, or a network found in
      one of these.
    network: the module whose variables are read.
    trunk: accept networks of other projects that contain the backbone.

  Returns:
    The variables, with None for leaves without a tensor of the right shape; the
    gates, {'params', 'batch_stats'} of the three CBAMs, if they are in the file
    and not in the network's forward path, else None; and a report.

  Raises:
    InputError: if `network` is not a DeepLabV3Plus, the source holds a network
      of another project, or a tensor has NaN or infinite values.
  """
  found = source if isinstance(source, Found) else read_network(source)
  if not networks.is_ours(network):
    raise InputError(
      f'{type(network).__name__}: PyTorch files are read for DeepLabV3Plus '
      'only; load the weights of your own network in its own code.'
    )
  if not (trunk and found.tensors):
    check_is_ours(found)
  return _fill(found, network)


def _fill(
  found: Found, network: DeepLabV3Plus
) -> tuple[dict, dict | None, Report]:
  """See import_network."""
  tensors, in_path, gates = found.tensors, network.in_path_attention, None
  # Files of parameter-free CBAMs have convolutions that are not used.
  has_gates = 'backbone.cbam.ChannelGate.mlp.1.weight' in tensors
  if not has_gates:
    tensors = {k: x for k, x in tensors.items() if '.cbam.' not in k}
  gated = network.clone(in_path_attention=in_path or has_gates)
  # Linen makes dataclasses hashable.
  target = _abstract(gated)  # pyright: ignore[reportArgumentType]
  name_of = functools.partial(names.network_name, backbone=network.backbone)
  variables, report = _fill_finite(target, tensors, name_of, where=found.where)
  if has_gates and not in_path:
    variables, gates = split_gates(variables)
  return variables, gates, report._replace(remarks=found.remarks)


def _fill_finite(
  target: PyTree, tensors: Tensors, name_of: names.NameOf, *, where: str
) -> tuple[PyTree, Report]:
  """Like names.fill; InputError if a value is not finite in float32."""
  with np.errstate(over='ignore'):
    variables, report = names.fill(target, tensors, name_of)
    used = [*report.loaded, *report.reshaped]
    bad = [
      name
      for name in used
      if not np.isfinite(np.asarray(tensors[name], np.float32)).all()
    ]
  if bad:
    raise InputError(
      f'{where}: {len(bad)} of {len(used)} tensors hold NaN or infinity: '
      f'{recognition.show(bad[:3])}; the run diverged or float16 overflowed, '
      'take an earlier checkpoint.'
    )
  return variables, report


def check_is_ours(found: Found) -> None:
  """Raises InputError, with alternatives, for a network of another project."""
  if not found.foreign:
    return
  text = f'{found.where}: {found.foreign}'
  options = infer_options(found.tensors)
  if 'backbone' in options:
    keys = ('backbone', 'width_multiplier')
    options = {key: options[key] for key in keys if key in options}
    _, _, report = _fill(found, DeepLabV3Plus(num_classes=2, **options))
    if report.fills_backbone:
      flags = [f'{key}={x}' for key, x in options.items() if x != 1]
      flags = [f'--config.student.{x}' for x in (*flags, 'pretrained=FILE')]
      text += f'; its backbone can initialize a student: {" ".join(flags)}'
  raise InputError(
    f'{text}; the whole network can be a teacher through PyTorch: '
    'config.teacher.factory (docs/any_teacher.md).'
  )


def infer_options(tensors: Tensors) -> dict[str, Any]:
  """Infers fields of DeepLabV3Plus from tensors, as far as they show them."""
  options: dict[str, Any] = {}
  for option, name, unit in _SHOWN:
    shape = tensors[name].shape if name in tensors else ()
    if shape and shape[0]:
      options[option] = shape[0] if unit == 1 else shape[0] / unit
  if any(name.startswith('backbone.features.') for name in tensors):
    return options | {'backbone': 'mobilenet_v2'}
  if 'backbone._conv_stem.weight' in tensors:
    return options | _infer_efficientnet(tensors)
  layer3 = [name for name in tensors if name.startswith('backbone.layer3.')]
  blocks = len({name.split('.')[2] for name in layer3})
  kind = (blocks, 'backbone.layer3.0.conv3.weight' in tensors)
  return options | ({'backbone': _RESNETS[kind]} if kind in _RESNETS else {})


def _infer_efficientnet(tensors: Tensors) -> dict[str, Any]:
  """The 'backbone' and 'width_multiplier' of a trunk; {} if it fits no variant.

  Channels are rounded to multiples of 8, so that several multipliers, even of
  other variants, give the same network; the roundest multiplier is returned.
  """

  def channels(name: str) -> int:
    shape = np.shape(tensors.get(f'backbone.{name}.weight', 0))
    return shape[0] if shape else 0

  blocks = (f'_blocks.{i}._project_conv' for i in itertools.count())
  in_file = [*itertools.takewhile(bool, map(channels, blocks))]
  for divisor in (1, 2, 4, 8, 16, 10, 20, 100, 1000):
    for (width, depth), name in _EFFICIENTNETS.items():
      table = [row[3] for row in efficientnet_lite.block_table(depth, 16)]
      if len(in_file) != len(table):
        continue
      least, most = ((in_file[-1] + n) / table[-1] / width for n in (-4, 4))
      first, last = (math.ceil(x * divisor) for x in (least, most))
      for i in range(max(1, first), last):
        multiplier = i / divisor
        widths = [efficientnet_lite.scaled(32, multiplier)]
        scale = width * multiplier
        widths += [efficientnet_lite.scaled(n, scale) for n in table]
        if widths == [channels('_conv_stem'), *in_file]:
          return {'backbone': name, 'width_multiplier': multiplier}
  return {}


def load_torch(
  source: TorchSource, *, backbone: str, num_classes: int, **options: Any
) -> tuple[dict, dict | None]:
  """Loads a DeepLabV3Plus and its attention from a PyTorch checkpoint.

  Args:
    source: path of a .pth, .pth.tar or .safetensors file, or a mapping of
      names to arrays or torch tensors, with any prefix and below any key.
    backbone: key of BACKBONES.
    num_classes: of the classifier in the file.
    **options: other fields of DeepLabV3Plus.

  Returns:
    The variables {'params', 'batch_stats'} of the DeepLabV3Plus, and those of
    its three CBAMs, {'params', 'batch_stats'} with the taps as keys, or None if
    the file has none.

  Raises:
    InputError: if a tensor is missing, unexpected or of another shape.
  """
  network = DeepLabV3Plus(backbone, num_classes, **options)
  variables, attention, report = import_network(source, network)
  if not report.complete:
    raise InputError(f'Not a {backbone} with {num_classes} classes: {report}.')
  return variables, attention


def find_imagenet(network: Any) -> pathlib.Path:
  """Path of the ImageNet weights of a network; InputError if it has none."""
  if not networks.is_ours(network):
    problem = 'is a network of your own; load them in its own code'
    raise InputError(f'{_IMAGENET}: {type(network).__name__} {problem}.')
  backbone, width = network.backbone, network.width_multiplier
  if backbone not in weights.IMAGENET:
    have = ', '.join(weights.IMAGENET)
    raise InputError(f'{_IMAGENET}: none for {backbone!r}; have {have}.')
  if width != 1:
    raise InputError(
      f'{_IMAGENET}: width_multiplier={width:g} of {backbone} must be 1; set '
      "it, or pretrained='' to start from random weights."
    )
  return weights.find(backbone)


def load_pretrained(path: StrPath, network: Any) -> tuple[dict, str]:
  """Loads the backbone, and what else fits, of a file of pretrained weights.

  Args:
    path: of the file, or 'imagenet' for published weights (weights.py). A file
      with that name is './imagenet'.
    network: the module to initialize.

  Returns:
    The variables, with None for leaves that are not loaded; and a log line.

  Raises:
    InputError: if the file cannot be read or lacks a part of the backbone.
  """
  source = path
  if path == weights.NAME:
    path = find_imagenet(network)
    source = weights.describe(weights.facts(network.backbone))
  try:
    variables, _, report = import_network(path, network, trunk=True)
  except OSError as error:
    hint = 'is pretrained of config.teacher or config.student right'
    if difflib.get_close_matches(str(path).lower(), [weights.NAME], cutoff=0.7):
      hint = f'did you mean {weights.NAME!r}'
    raise InputError(
      f'{path}: cannot be read ({error.strerror}); {hint}?'
    ) from error
  if not report.fills_backbone:
    raise InputError(
      f'{path}: does not fill the backbone {network.backbone}: {report}.'
    )
  parts = 'whole network' if report.complete else 'backbone and what else fits'
  parts = 'backbone' if report.backbone_only else parts
  return variables, f'starts from the {parts} of {source}: {report}'


def export_torch(
  variables: Variables, attention: Variables | None = None, *, backbone: str
) -> dict[str, np.ndarray]:
  """The state dict of a DeepLabV3Plus, as the authors' code loads it strictly.

  Args:
    variables: of the network.
    attention: the three CBAMs, as from `load_torch`. Without them the result is
      that of a plain DeepLabV3+ of the same family.
    backbone: key of BACKBONES.
  """
  for part, gates in (attention or {}).items():
    gates = {f'attention_{tap}': x for tap, x in gates.items()}
    variables = {**variables, part: variables[part] | gates}
  name_of = functools.partial(names.network_name, backbone=backbone)
  tensors = names.export(variables, name_of)
  # An array under two names is stored once.
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
  state_dict: TorchSource,
  *,
  student_backbone: str,
  teacher_backbone: str,
  num_classes: int,
) -> DistillationPair:
  """Loads the authors' Distiller, with the options of the recipe reference.

  Args:
    state_dict: names to arrays or torch tensors, or the path of a file; names
      start with t_net, s_net or Connectors.
    student_backbone: key of BACKBONES.
    teacher_backbone: key of BACKBONES.
    num_classes: of both networks.

  Raises:
    InputError: if a network or a connector is incomplete.
  """
  tensors = files.choose(recognition.read_groups(state_dict))
  student = DeepLabV3Plus(
    student_backbone, num_classes, aspp_dropout=0.0, update_norms_twice=True
  )
  teacher = DeepLabV3Plus(teacher_backbone, num_classes, aspp_dropout=0.0)
  loaded, maps = [], []
  for network, prefix in ((student, 's_net.'), (teacher, 't_net.')):
    own = {
      name.removeprefix(prefix): x
      for name, x in tensors.items()
      if name.startswith(prefix)
    }
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
  distiller_variables, report = _fill_finite(
    target, tensors, names.distiller_name, where='Connectors'
  )
  if report.missing or report.reshaped:
    report = report._replace(unexpected=[])  # These are of the networks.
    raise InputError(f'Connectors do not fit: {report}.')
  student_variables, teacher_variables = loaded
  return DistillationPair(
    student,
    teacher,
    distiller,
    student_variables,
    teacher_variables,
    distiller_variables,
  )
