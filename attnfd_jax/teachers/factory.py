# SPDX-License-Identifier: Apache-2.0
"""Teachers from a function of the user, which returns a module or a Teacher."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax

from attnfd_jax import user_code
from attnfd_jax.devices import sharding
from attnfd_jax.errors import check_name, convert_errors, InputError
from attnfd_jax.teachers import class_order, torch_module, torch_tracing
from attnfd_jax.types import Config, PyTree

# Keys of the dict that a factory may return with a module.
_FACTS = ('name', 'class_names', 'mean', 'std', 'size_multiple')


def from_factory(
  config: Config,
  class_names: Sequence[str],
  everywhere: jax.sharding.Sharding,
) -> Any:
  """Calls config.teacher.factory and returns its Teacher.

  Args:
    config: a resolved ConfigDict.
    class_names: of the data set.
    everywhere: sharding of the variables.

  Raises:
    InputError: if the function fails, or returns neither a module nor a
      Teacher.
  """
  factory, option = config.teacher.factory, 'config.teacher.factory'
  given = f'{option}={factory!r}'
  try:
    with user_code.convert_user_errors(given):
      returned = user_code.load_object(factory, option=option)()
  except InputError as error:
    if not _mentions(error, 'torchvision::nms'):
      raise
    remedy = (
      'install versions that fit, such as pip install '
      "'torch==2.12.1' 'torchvision==0.27.1' 'torchax==0.0.13'"
    )
    raise InputError(
      f'{error} This torchvision does not fit this torch; {remedy}.'
    ) from error
  module, facts = _module_and_facts(returned)
  if torch_tracing.is_module(module):
    return _of_module(config, module, facts, class_names, everywhere)
  names = ('name', 'class_names', 'variables', 'apply')
  if missing := [name for name in names if not hasattr(returned, name)]:
    raise InputError(
      f'{given} returned {type(returned).__name__} without '
      f'{", ".join(missing)}: return a torch.nn.Module, or a Teacher, see '
      'docs/any_teacher.md.'
    )
  if config.teacher.taps:
    raise InputError(
      'config.teacher.taps are submodules of a torch.nn.Module; this teacher '
      'has features of its own.'
    )
  variables = sharding.place(returned.variables, everywhere)
  teacher = _Placed(returned, variables)
  return class_order.in_order(
    factory, teacher, class_names, config.teacher.class_map
  )


def _module_and_facts(returned: Any) -> tuple[Any, Any]:
  is_pair = isinstance(returned, tuple) and len(returned) == 2
  return returned if is_pair else (returned, {})


def _mentions(error: BaseException | None, text: str) -> bool:
  """Whether the message of an error, or of one of its causes, has this text."""
  while error is not None and text not in str(error):
    error = error.__cause__ or error.__context__
  return error is not None


def _of_module(
  config: Config,
  module: Any,
  facts: Any,
  class_names: Sequence[str],
  everywhere: jax.sharding.Sharding,
) -> Any:
  """The Teacher of a torch.nn.Module and the dict that comes with it."""
  options, factory = config.teacher, config.teacher.factory
  if not isinstance(facts, Mapping):
    raise InputError(
      f'config.teacher.factory={factory!r} must return a module, or a module '
      f'and a dict, not a module and {type(facts).__name__}.'
    )
  with convert_errors(f'config.teacher.factory={factory!r}'):
    for key in facts:
      check_name('fact', key, _FACTS)
    teacher = torch_module.from_torch(
      module, dict(options.taps), dtype=config.optim.dtype, **facts
    )
  remarks, distill = [], config.distill
  if distill.teacher_bn == 'batch' or distill.teacher_dropout:
    remarks.append(
      'always in evaluation mode: distill.teacher_bn and '
      'distill.teacher_dropout are not used'
    )
  teacher = dataclasses.replace(
    teacher,
    variables=sharding.place(teacher.variables, everywhere),
    # Without names, the number of classes is checked when it is traced.
    class_names=teacher.class_names
    or (() if options.class_map else tuple(class_names)),
    source=factory,
    remarks=tuple(remarks),
  )
  return class_order.in_order(factory, teacher, class_names, options.class_map)


class _Placed:
  """A teacher of the user's with its variables on the devices."""

  def __init__(self, teacher: Any, variables: PyTree):
    self._teacher, self.variables = teacher, variables

  def __getattr__(self, name: str) -> Any:
    return getattr(self._teacher, name)
