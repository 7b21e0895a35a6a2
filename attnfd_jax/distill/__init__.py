# SPDX-License-Identifier: Apache-2.0
"""Makes distillation methods by name; there is one file per method.

method.py defines the interface. To add a method, write its file and a line
here.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax import user_code
from attnfd_jax.distill.aicsd import AICSD
from attnfd_jax.distill.at import AttentionTransfer
from attnfd_jax.distill.attnfd import AttnFDMethod
from attnfd_jax.distill.cirkd import CIRKD
from attnfd_jax.distill.cwd import ChannelWise
from attnfd_jax.distill.dist import Dist
from attnfd_jax.distill.dsd import DSD
from attnfd_jax.distill.fitnet import FitNet
from attnfd_jax.distill.ickd import ClassCorrelation
from attnfd_jax.distill.ifv import IFV
from attnfd_jax.distill.kd import LogitKD
from attnfd_jax.distill.ofd import OFD
from attnfd_jax.distill.pseudo import PseudoLabels
from attnfd_jax.distill.raw_features import CAD, LAD, PAD
from attnfd_jax.distill.skd import SKD
from attnfd_jax.distill.sp import SimilarityPreserving
from attnfd_jax.distill.weighted_sum import SCHEDULES, WeightedSum
from attnfd_jax.errors import (
  check_choice,
  check_name,
  check_range,
  convert_errors,
  InputError,
)
from attnfd_jax.models import layers
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import Config, Variables

METHODS: dict[str, type[nn.Module]] = {}
WEIGHTS: dict[str, float] = {}  # Default weights.
TITLES: dict[str, str] = {}  # Names for tables and reports.
# Names of other terms in the log of a step.
_TAKEN = ('loss', 'ce', 'ohem', 'focal', 'dice', 'grad_norm', 'learning_rate')
_TAKEN += ('cosine', 'task_norm', 'distill_norm')
# Defaults of the fields of a method class, for its config.
option_defaults = layers.options_of


def register(
  name: str,
  method: type[nn.Module],
  *,
  weight: float = 1.0,
  title: str | None = None,
) -> None:
  """Adds a method class to the registry; weights are published ones, or 1."""
  METHODS[name], WEIGHTS[name] = method, weight
  TITLES[name] = title or name.upper()


register('attnfd', AttnFDMethod, weight=2.0, title='AttnFD')
register('kd', LogitKD)
register('at', AttentionTransfer, weight=10_000.0)  # CIRKD.
register('cwd', ChannelWise)  # The weights of its terms are options.
register('dist', Dist)
register('fitnet', FitNet, weight=10.0, title='FitNet')  # CIRKD.
# The weights of sp, pad, cad and ickd were chosen on val (experiments/methods):
# none is published for segmentation.
register('ickd', ClassCorrelation, weight=0.1)
register('sp', SimilarityPreserving, weight=10.0)
register('lad', LAD, weight=10.0)
register('pad', PAD, weight=0.1)
register('cad', CAD, weight=0.1)
register('aicsd', AICSD, weight=9500.0)  # The authors' README.
register('cirkd', CIRKD)  # The weights of its terms are options.
register('ofd', OFD, weight=1e-5)
register('skd', SKD)
register('ifv', IFV, weight=200.0)
register('dsd', DSD)
register('pseudo', PseudoLabels, title='Pseudo-labels')


def make_method(
  name: str,
  student_outputs: Outputs,
  teacher_outputs: Outputs,
  **options: Any,
) -> nn.Module:
  """Makes a method and checks that it can compare the outputs of two networks.

  Args:
    name: key of METHODS, or 'file.py:Class'.
    student_outputs: outputs of the student, arrays or ShapeDtypeStructs.
    teacher_outputs: likewise of the teacher.
    **options: fields of the method.

  Raises:
    InputError: if the method or an option is unknown, or if the method cannot
      compare these outputs.
  """
  method_class = _find(name)
  with convert_errors(f'config.distill.{name}'):
    method = method_class(**options)
  abstract_variables(method, student_outputs, teacher_outputs)
  return method


def init_distiller(
  distiller: nn.Module,
  shapes: Sequence[Outputs],
  rng: jax.Array | None = None,
  *,
  train: bool = False,
) -> Variables:
  """Initializes the variables of a method or a sum.

  Args:
    distiller: a Method or WeightedSum.
    shapes: outputs of student and teacher, arrays or ShapeDtypeStructs.
    rng: key of the initialization, by default jax.random.key(0).
    train: see Method.
  """
  rng = jax.random.key(0) if rng is None else rng
  outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  labels = jnp.full(outputs[0]['logits'].shape[:-1], 255, jnp.uint8)
  rngs = {'params': rng, 'distill': jax.random.fold_in(rng, 1)}
  return distiller.init(rngs, *outputs, labels, train=train, step=0)


def abstract_variables(distiller: nn.Module, *shapes: Outputs) -> Variables:
  """Shapes of the variables of a method or a sum.

  Args:
    distiller: see init_distiller.
    *shapes: see init_distiller.

  Raises:
    InputError: if it cannot compare these outputs.
  """
  init = functools.partial(init_distiller, distiller, shapes, train=True)
  with convert_errors('config.distill.method'):
    return jax.eval_shape(init)


def _find(name: str) -> type[nn.Module]:
  if user_code.is_code(name):
    return user_code.load_object(name, option='config.distill.method')
  check_name(
    'method', name, METHODS, others=', joined by "+", or "file.py:Class"'
  )
  return METHODS[name]


def title(method: str) -> str:
  """Name of a method for tables and reports.

  >>> title('attnfd+kd'), title('file.py:MyMethod')
  ('AttnFD + KD', 'MyMethod')
  """
  if user_code.is_code(method):
    return method.rpartition(':')[2]
  return ' + '.join(TITLES[name] for name in method.split('+'))


def make_distiller(
  method: str,
  groups: Config,
  *,
  options: Config | None = None,
  num_steps: int = 1,
  task_schedule: str = 'constant',
) -> WeightedSum:
  """Makes the sum of the methods 'attnfd', 'attnfd+kd' or 'file.py:Class'.

  Args:
    method: names of METHODS joined by '+', or 'file.py:Class'.
    groups: for each name 'weight', 'weight_schedule' and fields of the method.
    options: such a group for 'file.py:Class'.
    num_steps: number of steps of the stage, for the weight schedules.
    task_schedule: schedule of the weight of the task loss.

  Raises:
    InputError: if a method or an option is invalid.
  """
  chosen: dict[str, tuple[type[nn.Module], str, Any]]
  if user_code.is_code(method):
    name = title(method).lower()
    name = f'{name}_method' if name in _TAKEN else name
    chosen = {name: (_find(method), 'options', options or {})}
  elif options:
    raise InputError(
      f'config.distill.options={dict(options)} is only for a class of your '
      f'own; set options of {method} in config.distill.{method.split("+")[0]}.'
    )
  else:
    names = method.split('+')
    if repeated := [x for x in names if names.count(x) > 1]:
      raise InputError(
        f'config.distill.method={method} names {repeated[0]} twice.'
      )
    chosen = {x: (_find(x), x, groups[x]) for x in names}
  methods, weights, schedules = {}, {}, {}
  for name, (method_class, key, fields) in chosen.items():
    group, fields = f'config.distill.{key}', dict(fields)
    weights[name] = fields.pop('weight', 1.0)
    schedules[name] = fields.pop('weight_schedule', 'constant')
    check_range(f'{group}.weight', weights[name], 0, 1e30)
    check_choice(f'{group}.weight_schedule', schedules[name], SCHEDULES)
    with convert_errors(group):
      methods[name] = method_class(**fields)
  check_choice('config.distill.task_weight_schedule', task_schedule, SCHEDULES)
  return WeightedSum(methods, weights, schedules, num_steps, task_schedule)
