# SPDX-License-Identifier: Apache-2.0
"""Where a teacher comes from: a stage, a PyTorch file, a function of a user's.

In a config: `teacher.factory`, 'file.py:make', a function without arguments
that returns a Teacher; `teacher.checkpoint`, the folder of a stage or a PyTorch
file; neither: the stage `teacher` of the run.
"""

import json

from attnfd_jax import user_code
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import loading
from attnfd_jax.runs.paths import as_path
from attnfd_jax.teachers.teacher import FrozenNetwork


def from_config(config, workdir, class_names, mesh):
  """The teacher of a resolved config, its variables on the mesh.

  Args:
    config: of the run.
    workdir: of the run, for the teacher of its own stage.
    class_names: of the data set.
    mesh: see devices.sharding.make_mesh.

  Raises:
    InputError: if it is absent, damaged or of other classes.
  """
  options = config.teacher
  if options.factory:
    return _from_factory(options.factory, class_names, mesh)
  behavior = _behavior(config.distill)
  everywhere = sharding.replicated(mesh)
  given = options.checkpoint
  if given and as_path(given).is_file():
    network = make_network(config, len(class_names))
    return _from_file(
      given, network, options, class_names, everywhere, behavior
    )
  # The code of this run's own stage is that of its config.
  own = None if given else make_network(config, len(class_names))
  directory = as_path(given or workdir / 'teacher')
  network, variables, info = loading.load_network(
    directory, sharding=everywhere, network=own, allow_code=options.allow_code
  )
  _check_classes(directory, info['class_names'], class_names)
  result = directory / 'result.json'
  if networks.is_ours(network):
    dtype = networks.compute_dtype(config.optim.dtype)
    network = network.clone(dtype=dtype, aspp_dropout=0.0)
  return FrozenNetwork(
    network,
    variables,
    name=networks.describe(info[loading.role_of(info)]),
    class_names=class_names,
    gates=loading.load_attention(directory, network),
    source=str(given) or 'this run',
    miou=json.loads(result.read_text())['miou'] if result.exists() else None,
    **behavior,
  )


def make_network(config, num_classes):
  """The network of config.teacher; what drops in it, ASPP does not."""
  return networks.make_network(
    config.teacher, num_classes, dtype=config.optim.dtype, aspp_dropout=0.0
  )


def _behavior(options):
  """While a student learns, from the group `distill`."""
  return {
    'batch_statistics': options.teacher_bn == 'batch',
    'dropout': options.teacher_dropout,
  }


def abstract(config, class_names):
  """The teacher that a stage of this run will train, without variables."""
  network = make_network(config, len(class_names))
  return FrozenNetwork(
    network,
    networks.abstract_variables(network),
    name=networks.describe(config.teacher),
    class_names=class_names,
    **_behavior(config.distill),
  )


def _check_classes(source, found, class_names):
  if list(found) != list(class_names):
    raise InputError(
      f'{source}: the teacher knows {len(found)} classes {list(found)}, the '
      f'data set {list(class_names)}.'
    )


def _from_factory(factory, class_names, mesh):
  make = user_code.load_object(factory, option='config.teacher.factory')
  try:
    teacher = make()
  except Exception as error:  # Whatever the user's code raises.
    raise InputError(
      f'config.teacher.factory={factory!r}: it raised '
      f'{type(error).__name__}: {error}; see where with --debug.'
    ) from error
  missing = [
    x
    for x in ('name', 'class_names', 'variables', 'apply')
    if not hasattr(teacher, x)
  ]
  if missing:
    raise InputError(
      f'config.teacher.factory={factory!r} returned '
      f'{type(teacher).__name__} without {", ".join(missing)}; see '
      'attnfd_jax/teachers/teacher.py for what a teacher has.'
    )
  _check_classes(factory, teacher.class_names, class_names)
  return _Placed(
    teacher, sharding.place(teacher.variables, sharding.replicated(mesh))
  )


class _Placed:
  """A teacher of the user's with its variables on the devices."""

  def __init__(self, teacher, variables):
    self._teacher, self.variables = teacher, variables

  def __getattr__(self, name):
    return getattr(self._teacher, name)


def _from_file(path, network, options, class_names, everywhere, behavior):
  name = networks.describe(options)
  variables, gates, report = torch_networks.import_network(path, network)
  if not report.complete:
    raise InputError(
      f'{path}: not a whole {name} with {len(class_names)} classes: {report}. '
      'A part of a network can be config.teacher.pretrained.'
    )
  return FrozenNetwork(
    network,
    sharding.place(variables, everywhere),
    name=name,
    class_names=class_names,
    gates=gates,
    source=str(path),
    **behavior,
  )
