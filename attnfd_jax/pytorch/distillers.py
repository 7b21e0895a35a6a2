# SPDX-License-Identifier: Apache-2.0
"""The authors' Distiller from a PyTorch checkpoint: two networks and AttnFD."""

import functools
from typing import NamedTuple

import jax

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.pytorch import names
from attnfd_jax.pytorch.networks import import_network, read_tensors


class DistillationPair(NamedTuple):
  """Student, teacher and distiller with their variables."""

  student: DeepLabV3Plus
  teacher: DeepLabV3Plus
  distiller: AttnFD
  student_variables: dict
  teacher_variables: dict
  distiller_variables: dict


def _name_of(path):
  """Name of a leaf of AttnFD; the teacher's gates are params or batch_stats."""
  module, rest = path.split('/', 1)
  kind, _, tap = module.rpartition('_')
  if kind == 'connectors':
    return names.connector_name(tap, rest)
  if kind == 'student_gates':
    return f's_net.{names.gate_name(tap, rest)}'
  return f't_net.{names.gate_name(*rest.split("/", 1))}'


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
    own = {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
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
  init = functools.partial(distiller.init, train=False)
  target = jax.eval_shape(init, jax.random.key(0), *maps)
  variables, report = names.fill(target, tensors, _name_of)
  if report.missing or report.reshaped:
    report = report._replace(unexpected=[])  # Those of the networks.
    raise InputError(f'Connectors do not fit: {report}.')
  return DistillationPair(student, teacher, distiller, *loaded, variables)
