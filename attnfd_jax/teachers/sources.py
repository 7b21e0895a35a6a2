# SPDX-License-Identifier: Apache-2.0
"""Where a teacher comes from: a stage, a PyTorch file, a function of a user's.

In a config: `teacher.factory`, 'file.py:make', a function without arguments
that returns a torch.nn.Module, such a module and a dict of facts about it, or a
Teacher; `teacher.checkpoint`, the folder of a stage or a PyTorch file; neither:
the stage `teacher` of the run.
"""

import dataclasses
import json
from typing import Any, NamedTuple

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


def from_config(config, workdir, class_names, mesh):
  """The teacher of a resolved config, its variables on the mesh.

  `workdir` has the teacher of its own, `class_names` are those of the data set.
  InputError if the teacher is absent, damaged or of other classes.
  """
  options, everywhere = config.teacher, sharding.replicated(mesh)
  if options.factory:
    return factory.from_factory(config, class_names, everywhere)
  given, class_map = options.checkpoint, options.class_map
  directory = paths.as_path(given or workdir / 'teacher')
  if class_map and not given:
    what = 'is for a teacher given by teacher.checkpoint or teacher.factory'
    raise InputError(f'config.teacher.class_map={class_map} {what}.')
  if given and directory.is_file():
    return _from_file(given, config, class_names, everywhere)
  teacher = _without_variables(config, class_names)
  network, variables, info = loading.load_network(
    directory,
    sharding=everywhere,
    # The code of this run's own stage is that of its config.
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


def _from_file(path, config, class_names, everywhere):
  source, count = torch_networks.read_network(path), len(class_names)
  if class_map := config.teacher.class_map:
    count = torch_networks.infer_options(source.tensors).get('num_classes', 0)
    class_order.check_class_map(class_map, len(class_names), count)
    class_names, ours = [str(i) for i in range(count)], class_names
  teacher = _without_variables(config, class_names)
  found = torch_networks.import_network(source, teacher.network)
  variables, gates, report = found
  if not report.complete:
    raise InputError(
      f'{path}: not a whole {teacher.name} with {count} classes: {report}. A '
      'part can be config.teacher.pretrained.'
    )
  variables = sharding.place(variables, everywhere)
  teacher = dataclasses.replace(
    teacher,
    variables=variables,
    gates=gates,
    source=str(path),
    remarks=report.remarks,
  )
  return (
    class_order.Reordered(teacher, class_map, ours) if class_map else teacher
  )


class Alone(NamedTuple):
  """A given teacher where a stage's network is expected."""

  network: Scored
  variables: Any
  info: dict


def load_given(config):
  """The teacher that a resolved config gives, as `loading.load_network` returns
  a stage: to be scored on the config's data, and to predict.

  InputError if the config gives none, or the data set is not there.
  """
  if not (config.teacher.factory or config.teacher.checkpoint):
    raise InputError(
      'The config gives no teacher (config.teacher.factory or '
      'config.teacher.checkpoint); a stage of a run is --checkpoint=DIR.'
    )
  dataset = load_dataset(config.data, splits=('val',))
  names = dataset.class_names
  teacher = from_config(config, None, names, sharding.make_mesh())
  size = predictor.seen_size(dataset.splits['val'].size(0), config.eval)
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
