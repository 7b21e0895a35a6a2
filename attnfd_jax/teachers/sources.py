# SPDX-License-Identifier: Apache-2.0
"""Loads teachers from stages, PyTorch files and functions of the user.

The config decides: `teacher.factory`, such as 'file.py:make', is a function
without arguments that returns a torch.nn.Module, a tuple of one and a dict of
facts about it, or a Teacher. `teacher.checkpoint` is the folder of a stage or a
PyTorch file. Without both it is the stage `teacher` of the run.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any, NamedTuple

import jax

from attnfd_jax import paths
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import loading
from attnfd_jax.teachers import class_order, factory
from attnfd_jax.teachers.teacher import FrozenNetwork, Scored
from attnfd_jax.types import Config, PyTree, StrPath


def from_config(
  config: Config,
  workdir: Any,
  class_names: Sequence[str],
  mesh: jax.sharding.Mesh,
) -> Any:
  """Loads the Teacher of a config.

  Args:
    config: a resolved ConfigDict.
    workdir: path of the run; not used if the config names a teacher.
    class_names: of the data set.
    mesh: the variables are replicated on its devices.

  Raises:
    InputError: if the teacher does not exist, is damaged or has other classes.
  """
  options, everywhere = config.teacher, sharding.replicated(mesh)
  if options.factory:
    return factory.from_factory(config, class_names, everywhere)
  given, class_map = options.checkpoint, options.class_map
  directory = paths.as_path(given or workdir / 'teacher')
  if class_map and not given:
    raise InputError(
      f'config.teacher.class_map={class_map} needs teacher.checkpoint or '
      'teacher.factory.'
    )
  if given and directory.is_file():
    return _from_file(given, config, class_names, everywhere)
  teacher = _without_variables(config, class_names)
  network, variables, info = loading.load_network(
    directory,
    sharding=everywhere,
    # A stage of this run has the network of this config.
    network=None if given else teacher.network,
    allow_code=options.allow_code,
  )
  result = directory / 'result.json'
  if networks.is_ours(network):
    dtype = networks.compute_dtype(config.optim.dtype)
    network = network.clone(dtype=dtype, aspp_dropout=0.0)
  teacher = dataclasses.replace(
    teacher,
    network=network,
    variables=variables,
    class_names=tuple(info['class_names']),
    name=networks.describe(info[loading.role_of(info)]),
    gates=loading.load_attention(directory, network),
    source=str(given) or 'this run',
    miou=json.loads(result.read_text())['miou'] if result.exists() else None,
  )
  return class_order.in_order(directory, teacher, class_names, class_map)


def abstract(config: Config, class_names: Sequence[str]) -> FrozenNetwork:
  """The teacher that this run will train; its variables are abstract."""
  teacher = _without_variables(config, class_names)
  variables = networks.abstract_variables(teacher.network)
  return dataclasses.replace(teacher, variables=variables)


def _without_variables(
  config: Config, class_names: Sequence[str]
) -> FrozenNetwork:
  dtype, size = config.optim.dtype, len(class_names)
  return FrozenNetwork(
    networks.make_network(config.teacher, size, dtype=dtype, aspp_dropout=0.0),
    variables={},
    name=networks.describe(config.teacher),
    class_names=class_names,
    batch_statistics=config.distill.teacher_bn == 'batch',
    dropout=config.distill.teacher_dropout,
  )


def _from_file(
  path: StrPath,
  config: Config,
  class_names: Sequence[str],
  everywhere: jax.sharding.Sharding,
) -> Any:
  source = torch_networks.read_network(path)
  count, teacher_names = len(class_names), class_names
  if class_map := config.teacher.class_map:
    count = torch_networks.infer_options(source.tensors).get('num_classes', 0)
    class_order.check_class_map(class_map, len(class_names), count)
    teacher_names = [str(i) for i in range(count)]
  teacher = _without_variables(config, teacher_names)
  variables, gates, report = torch_networks.import_network(
    source, teacher.network
  )
  if not report.complete:
    raise InputError(
      f'{path}: not a complete {teacher.name} with {count} classes: {report}. '
      'For a part of one, use config.teacher.pretrained.'
    )
  variables = sharding.place(variables, everywhere)
  teacher = dataclasses.replace(
    teacher,
    variables=variables,
    gates=gates,
    source=str(path),
    remarks=report.remarks,
  )
  if not class_map:
    return teacher
  return class_order.Reordered(teacher, class_map, class_names)


class Alone(NamedTuple):
  """A teacher in the form that `loading.load_network` returns for a stage."""

  network: Scored
  variables: PyTree
  info: dict[str, Any]


def load_given(config: Config) -> Alone:
  """Loads the teacher that a config names, to evaluate it or predict with it.

  Args:
    config: a resolved ConfigDict; its data set is the one to evaluate on.

  Raises:
    InputError: if the config names no teacher, or the data set does not exist.
  """
  if not (config.teacher.factory or config.teacher.checkpoint):
    raise InputError(
      'The config names no teacher (config.teacher.factory or '
      'config.teacher.checkpoint); for a stage of a run use --checkpoint=DIR.'
    )
  dataset = load_dataset(config.data, splits=('val',))
  names = dataset.class_names
  teacher = from_config(config, None, names, sharding.make_mesh())
  size = predictor.eval_size(dataset.splits['val'].size(0), config.eval)
  inputs = {'variables': teacher.variables, 'rng': None}
  networks.checked_outputs(teacher, len(names), size, **inputs)
  info = json.loads(config.to_json_best_effort()) | {
    'stage': 'teacher',
    'class_names': list(names),
    'palette': dataset.palette,
    'checkpoint_step': None,
    'description': f'teacher {teacher.name} of {teacher.source}',
  }
  return Alone(Scored(teacher), teacher.variables, info)
