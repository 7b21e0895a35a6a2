# SPDX-License-Identifier: Apache-2.0
"""What is transferred from teacher to student, one file per method.

method.py has the contract; to add a method, write its file and a line here.
"""

import functools

import jax

from attnfd_jax import user_code
from attnfd_jax.distill.attnfd_method import AttnFDMethod
from attnfd_jax.distill.kd import LogitKD
from attnfd_jax.distill.weighted_sum import SCHEDULES, WeightedSum
from attnfd_jax.errors import first_line, InputError, known, one_of, within
from attnfd_jax.models import layers

METHODS = {}  # Name -> class.
WEIGHTS = {}  # Name -> default weight.
# Of other terms in the log of a step.
_TAKEN = ('loss', 'ce', 'ohem', 'focal', 'dice', 'grad_norm', 'learning_rate')
TITLES = {}  # Name -> as people write it.


def register(name, method, *, weight=1.0, title=None):
  """Makes the class of a Method known as config.distill.method=`name`.

  `weight` is the published one, or 1, and `title` is for people.
  """
  METHODS[name], WEIGHTS[name] = method, weight
  TITLES[name] = title or name.upper()


register('attnfd', AttnFDMethod, weight=2.0, title='AttnFD')
register('kd', LogitKD)
# {field: default} of a Method's class: what its config has.
option_defaults = layers.options_of


def _build(method, options, name):
  try:
    return method(**options)
  except (TypeError, ValueError) as error:
    raise InputError(f'config.distill.{name}: {error}') from error


def make_method(name, student_outputs, teacher_outputs, **options):
  """A method of the registry for the outputs of any two networks.

  Args:
    name: key of METHODS, or 'file.py:Class'.
    student_outputs, teacher_outputs: Outputs, arrays or their shapes.
    **options: fields of the method.

  Raises:
    InputError: for an unknown method or option, and for outputs that the method
      cannot compare.
  """
  method = _build(_find(name), options, name)
  abstract_variables(method, student_outputs, teacher_outputs)
  return method


def abstract_variables(method, student, teacher):
  """Shapes of the variables of a method, or of a sum, for two Outputs.

  Raises:
    InputError: if it cannot compare these outputs; one line.
  """
  rngs = {name: jax.random.key(0) for name in ('params', 'distill')}
  labels = jax.ShapeDtypeStruct(student['logits'].shape[:-1], 'uint8')
  init = functools.partial(method.init, rngs, train=True, step=0)
  try:
    return jax.eval_shape(init, student, teacher, labels)
  except Exception as error:  # Of a method of the user's, anything.
    raise InputError(f'config.distill.method: {first_line(error)}') from error


def _find(name):
  if user_code.is_code(name):
    return user_code.load_object(name, option='config.distill.method')
  others = ', joined by "+", or \'file.py:Class\''
  known('method', name, METHODS, others=others)
  return METHODS[name]


def title(method):
  """'AttnFD + KD' of 'attnfd+kd'; of 'file.py:Class' the class."""
  if user_code.is_code(method):
    return method.rpartition(':')[2]
  return ' + '.join(TITLES[name] for name in method.split('+'))


def make_distiller(method, groups, *, options=None, num_steps=1):
  """The WeightedSum of 'attnfd', 'attnfd+kd' or 'file.py:Class'.

  Args:
    method: names, joined by '+', or one class of the user's.
    groups: {name: {'weight', 'weight_schedule', fields ...}}.
    options: fields of the user's class, beside 'weight', 'weight_schedule'.
    num_steps: of the stage, for schedules of weights.

  Raises:
    InputError: for a method, an option or a value that does not exist.
  """
  own = user_code.is_code(method)
  if own:
    name = method.rpartition(':')[2].lower()
    if name in _TAKEN:
      name += '_method'
    chosen = {name: (_find(method), dict(options or {}))}
  elif options:
    raise InputError(
      f'config.distill.options={dict(options)} are of a class of your own; '
      f'those of {method} are keys of config.distill.{method.split("+")[0]}.'
    )
  else:
    chosen = {x: (_find(x), dict(groups[x])) for x in method.split('+')}
  methods, weights, schedules = {}, {}, {}
  for name, (method_class, fields) in chosen.items():
    weights[name] = fields.pop('weight', 1.0)
    schedules[name] = fields.pop('weight_schedule', 'constant')
    group = 'config.distill.options' if own else f'config.distill.{name}'
    within(f'{group}.weight', weights[name], 0, 1e30)
    one_of(f'{group}.weight_schedule', schedules[name], SCHEDULES)
    methods[name] = _build(method_class, fields, name)
  return WeightedSum(methods, weights, schedules, num_steps)
