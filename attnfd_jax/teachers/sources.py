# SPDX-License-Identifier: Apache-2.0
"""Where a teacher comes from: a stage, a PyTorch file, a function of a user's.

In a config: `teacher.factory`, 'file.py:make', a function without arguments
that returns a torch.nn.Module, such a module and a dict of facts about it, or a
Teacher; `teacher.checkpoint`, the folder of a stage or a PyTorch file; neither:
the stage `teacher` of the run.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any, NamedTuple

from attnfd_jax import paths, user_code
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import explained, InputError, known
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import loading
from attnfd_jax.teachers import torch_module
from attnfd_jax.teachers.teacher import FrozenNetwork, Reordered, Scored


def from_config(config, workdir, class_names, mesh):
  """The teacher of a resolved config, its variables on the mesh.

  `workdir` has the teacher of its own, `class_names` are those of the data set.
  InputError if the teacher is absent, damaged or of other classes.
  """
  options, everywhere = config.teacher, sharding.replicated(mesh)
  if options.factory:
    return _from_factory(config, class_names, everywhere)
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
  return _in_order(directory, teacher, class_names, class_map)


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


def _in_order(source, teacher, class_names, class_map):
  """`teacher` with the classes of the data set; InputError if it has others."""
  theirs, ours = list(teacher.class_names), list(class_names)
  if class_map:
    _check_class_map(class_map, len(ours), len(theirs))
    return Reordered(teacher, class_map, class_names)
  if theirs == ours:
    return teacher
  text = f'{source}: the teacher knows {len(theirs)} classes {theirs}'
  text = f'{text}, the data set {ours}.'
  if {*ours} <= {*theirs}:
    indices = tuple(map(theirs.index, ours))
    text += f' As --config.teacher.class_map="{indices}" its names fit.'
  else:
    text += ' Name its index of each of ours by --config.teacher.class_map.'
  raise InputError(text)


def _check_class_map(class_map, count, limit):
  """`limit` is the number of the teacher's classes, 0 where nobody knows."""
  option = f'config.teacher.class_map={class_map}'
  if len(class_map) != count:
    what = f"must have an index for each of the data set's {count} classes"
    raise InputError(f'{option} {what}, not {len(class_map)}.')
  whole = all(isinstance(x, int) and x >= 0 for x in class_map)
  if not whole or (limit and max(class_map) >= limit):
    last = f' to {limit - 1}' if limit else ''
    raise InputError(f"{option} must be the teacher's indices, from 0{last}.")


# What a factory may say about its module, beside taps and dtype.
_FACTS = ('name', 'class_names', 'mean', 'std', 'size_multiple')


def _from_factory(config, class_names, everywhere):
  factory, option = config.teacher.factory, 'config.teacher.factory'
  given = f'{option}={factory!r}'
  try:
    with user_code.explained(given):
      made = user_code.load_object(factory, option=option)()
  except InputError as error:
    if not _names(error, 'torchvision::nms'):
      raise
    remedy = 'install a pair that does, such as'
    pair = "pip install 'torch==2.12.1' 'torchvision==0.27.1' 'torchax==0.0.13'"
    raise InputError(
      f'{error} This torchvision is not of this torch; {remedy} {pair}.'
    ) from error
  module, facts = (
    made
    if isinstance(made, tuple) and len(made) == 2
    else (
      made,
      {},
    )
  )
  if torch_module.is_module(module):
    return _of_module(config, module, facts, class_names, everywhere)
  names = ('name', 'class_names', 'variables', 'apply')
  if missing := [name for name in names if not hasattr(made, name)]:
    raise InputError(
      f'{given} returned {type(made).__name__} without '
      f'{", ".join(missing)}: return a torch.nn.Module, or a Teacher, see '
      'docs/any_teacher.md.'
    )
  if config.teacher.taps:
    what = 'are submodules of a torch.nn.Module; this teacher has features'
    raise InputError(f'config.teacher.taps {what} of its own.')
  teacher = _Placed(made, sharding.place(made.variables, everywhere))
  return _in_order(factory, teacher, class_names, config.teacher.class_map)


def _names(error, text):
  """Whether an error, or one that it came from, has this text."""
  while error is not None and text not in str(error):
    error = error.__cause__ or error.__context__
  return error is not None


def _of_module(config, module, facts, class_names, everywhere):
  """The Teacher of a torch.nn.Module and of what its maker says about it."""
  options, factory = config.teacher, config.teacher.factory
  if not isinstance(facts, Mapping):
    raise InputError(
      f'config.teacher.factory={factory!r} must return a module, or a module '
      f'and a dict, not a module and {type(facts).__name__}.'
    )
  with explained(f'config.teacher.factory={factory!r}'):
    for key in facts:
      known('fact', key, _FACTS)
    teacher = torch_module.from_torch(
      module, dict(options.taps), dtype=config.optim.dtype, **facts
    )
  remarks, asked = [], config.distill
  if asked.teacher_bn == 'batch' or asked.teacher_dropout:
    remarks.append('as it is evaluated, whatever distill.teacher_bn says')
  teacher = dataclasses.replace(
    teacher,
    variables=sharding.place(teacher.variables, everywhere),
    # Without names of its own their number is compared when it is traced.
    class_names=teacher.class_names
    or (() if options.class_map else tuple(class_names)),
    source=factory,
    remarks=tuple(remarks),
  )
  return _in_order(factory, teacher, class_names, options.class_map)


class _Placed:
  """A teacher of the user's with its variables on the devices."""

  def __init__(self, teacher, variables):
    self._teacher, self.variables = teacher, variables

  def __getattr__(self, name):
    return getattr(self._teacher, name)


def _from_file(path, config, class_names, everywhere):
  source, count = torch_networks.read_network(path), len(class_names)
  if class_map := config.teacher.class_map:
    count = torch_networks.infer_options(source.tensors).get('num_classes', 0)
    _check_class_map(class_map, len(class_names), count)
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
  return Reordered(teacher, class_map, ours) if class_map else teacher


class Alone(NamedTuple):
  """A given teacher where a stage's network is expected."""

  network: Scored
  variables: Any
  info: dict


def load_given(config, mesh):
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
  teacher = from_config(config, None, names, mesh)
  size = dataset.splits['val'][0]['label'].shape
  size = predictor.seen_size(size, config.eval)
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
