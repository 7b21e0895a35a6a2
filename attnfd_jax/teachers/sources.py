# SPDX-License-Identifier: Apache-2.0
"""Where a teacher comes from: a stage, a PyTorch file, a function of a user's.

In a config: `teacher.factory`, 'file.py:make', a function without arguments
that returns a Teacher; `teacher.checkpoint`, the folder of a stage or a PyTorch
file; neither: the stage `teacher` of the run.
"""

import dataclasses
import json

from attnfd_jax import paths, user_code
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import loading
from attnfd_jax.teachers.teacher import FrozenNetwork


def from_config(config, workdir, class_names, mesh):
  """The teacher of a resolved config, its variables on the mesh.

  `workdir` has the teacher of its own, `class_names` are those of the data set.
  InputError if the teacher is absent, damaged or of other classes.
  """
  options, everywhere = config.teacher, sharding.replicated(mesh)
  if options.factory:
    return _from_factory(options.factory, class_names, everywhere)
  teacher, given = _without_variables(config, class_names), options.checkpoint
  directory = paths.as_path(given or workdir / 'teacher')
  if given and directory.is_file():
    return _from_file(given, teacher, everywhere)
  network, variables, info = loading.load_network(
    directory,
    sharding=everywhere,
    # The code of this run's own stage is that of its config.
    network=None if given else teacher.network,
    allow_code=options.allow_code,
  )
  _check_classes(directory, info['class_names'], class_names)
  result = directory / 'result.json'
  if networks.is_ours(network):
    dtype = networks.compute_dtype(config.optim.dtype)
    network = network.clone(dtype=dtype, aspp_dropout=0.0)
  return dataclasses.replace(
    teacher,
    network=network,
    variables=variables,
    name=networks.describe(info[loading.role_of(info)]),
    gates=loading.load_attention(directory, network),
    source=str(given) or 'this run',
    miou=json.loads(result.read_text())['miou'] if result.exists() else None,
  )


def abstract(config, class_names):
  """The teacher that a stage of this run will train: shapes as variables."""
  teacher = _without_variables(config, class_names)
  variables = networks.abstract_variables(teacher.network)
  return dataclasses.replace(teacher, variables=variables)


def _without_variables(config, class_names):
  dtype, size = config.optim.dtype, len(class_names)
  return FrozenNetwork(
    networks.make_network(config.teacher, size, dtype=dtype, aspp_dropout=0.0),
    variables={},
    name=networks.describe(config.teacher),
    class_names=class_names,
    batch_statistics=config.distill.teacher_bn == 'batch',
    dropout=config.distill.teacher_dropout,
  )


def _check_classes(source, found, class_names):
  if list(found) != list(class_names):
    text = f'{source}: the teacher knows {len(found)} classes {list(found)}'
    raise InputError(f'{text}, the data set {list(class_names)}.')


def _from_factory(factory, class_names, everywhere):
  option = 'config.teacher.factory'
  with user_code.explained(f'{option}={factory!r}'):
    teacher = user_code.load_object(factory, option=option)()
  names = ('name', 'class_names', 'variables', 'apply')
  if missing := [name for name in names if not hasattr(teacher, name)]:
    raise InputError(
      f'{option}={factory!r} returned {type(teacher).__name__} without '
      f'{", ".join(missing)}; see attnfd_jax/teachers/teacher.py.'
    )
  _check_classes(factory, teacher.class_names, class_names)
  return _Placed(teacher, sharding.place(teacher.variables, everywhere))


class _Placed:
  """A teacher of the user's with its variables on the devices."""

  def __init__(self, teacher, variables):
    self._teacher, self.variables = teacher, variables

  def __getattr__(self, name):
    return getattr(self._teacher, name)


def _from_file(path, teacher, everywhere):
  found = torch_networks.import_network(path, teacher.network)
  variables, gates, report = found
  if not report.complete:
    raise InputError(
      f'{path}: not a whole {teacher.name} with {len(teacher.class_names)} '
      f'classes: {report}. A part can be config.teacher.pretrained.'
    )
  variables = sharding.place(variables, everywhere)
  return dataclasses.replace(
    teacher,
    variables=variables,
    gates=gates,
    source=str(path),
    remarks=report.remarks,
  )
