# SPDX-License-Identifier: Apache-2.0
"""Teachers that a function of the user's makes: modules of PyTorch, or ours."""

from collections.abc import Mapping
import dataclasses

from attnfd_jax import user_code
from attnfd_jax.devices import sharding
from attnfd_jax.errors import explained, InputError, known
from attnfd_jax.teachers import class_order, torch_module, torch_tracing

# What a factory may say about its module, beside taps and dtype.
_FACTS = ('name', 'class_names', 'mean', 'std', 'size_multiple')


def from_factory(config, class_names, everywhere):
  """The Teacher that config.teacher.factory makes, its variables `everywhere`.

  InputError if it fails, or returns neither a module nor a Teacher.
  """
  factory, option = config.teacher.factory, 'config.teacher.factory'
  given = f'{option}={factory!r}'
  try:
    with user_code.explained(given):
      made = user_code.load_object(factory, option=option)()
  except InputError as error:
    if not _names(error, 'torchvision::nms'):
      raise
    remedy = (
      'install a pair that fits, such as pip install '
      "'torch==2.12.1' 'torchvision==0.27.1' 'torchax==0.0.13'"
    )
    raise InputError(
      f'{error} This torchvision is not of this torch; {remedy}.'
    ) from error
  pair = isinstance(made, tuple) and len(made) == 2
  module, facts = made if pair else (made, {})
  if torch_tracing.is_module(module):
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
  return class_order.in_order(
    factory, teacher, class_names, config.teacher.class_map
  )


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
  return class_order.in_order(factory, teacher, class_names, options.class_map)


class _Placed:
  """A teacher of the user's with its variables on the devices."""

  def __init__(self, teacher, variables):
    self._teacher, self.variables = teacher, variables

  def __getattr__(self, name):
    return getattr(self._teacher, name)
