# SPDX-License-Identifier: Apache-2.0
"""What is transferred from teacher to student, one file per method.

method.py has the contract; to add a method, write its file and a line here.
"""

import functools

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
from attnfd_jax.errors import explained, InputError, known, one_of, within
from attnfd_jax.models import layers

METHODS = {}  # Name -> class.
WEIGHTS = {}  # Name -> default weight.
TITLES = {}  # Name -> as people write it.
# Of other terms in the log of a step.
_TAKEN = ('loss', 'ce', 'ohem', 'focal', 'dice', 'grad_norm', 'learning_rate')
_TAKEN += ('cosine', 'task_norm', 'distill_norm')
# {field: default} of a Method's class: what its config has.
option_defaults = layers.options_of


def register(name, method, *, weight=1.0, title=None):
  """Makes a Method's class known by name; its weight is published, or 1."""
  METHODS[name], WEIGHTS[name] = method, weight
  TITLES[name] = title or name.upper()


register('attnfd', AttnFDMethod, weight=2.0, title='AttnFD')
register('kd', LogitKD)
register('at', AttentionTransfer, weight=10_000.0)  # CIRKD.
register('cwd', ChannelWise)  # Weights of its parts are options.
register('dist', Dist)
register('fitnet', FitNet, weight=10.0, title='FitNet')  # CIRKD.
# Weights of sp, pad, cad and ickd are chosen on val (experiments/methods);
# none is published for segmentation.
register('ickd', ClassCorrelation, weight=0.1)
register('sp', SimilarityPreserving, weight=10.0)
register('lad', LAD, weight=10.0)
register('pad', PAD, weight=0.1)
register('cad', CAD, weight=0.1)
register('aicsd', AICSD, weight=9500.0)  # README of the authors.
register('cirkd', CIRKD)  # With weights of its terms as options.
register('ofd', OFD, weight=1e-5)
register('skd', SKD)
register('ifv', IFV, weight=200.0)
register('dsd', DSD)
register('pseudo', PseudoLabels, title='Pseudo-labels')


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
  method_class = _find(name)
  with explained(f'config.distill.{name}'):
    method = method_class(**options)
  abstract_variables(method, student_outputs, teacher_outputs)
  return method


def init_distiller(distiller, shapes, rng=None, *, train=False):
  """Variables of a method, or a sum, for Outputs of these shapes."""
  rng = jax.random.key(0) if rng is None else rng
  outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  labels = jnp.full(outputs[0]['logits'].shape[:-1], 255, jnp.uint8)
  rngs = {'params': rng, 'distill': jax.random.fold_in(rng, 1)}
  return distiller.init(rngs, *outputs, labels, train=train, step=0)


def abstract_variables(distiller, *shapes):
  """Shapes of its variables; InputError if it cannot compare these Outputs."""
  init = functools.partial(init_distiller, distiller, shapes, train=True)
  with explained('config.distill.method'):
    return jax.eval_shape(init)


def _find(name):
  if user_code.is_code(name):
    return user_code.load_object(name, option='config.distill.method')
  known('method', name, METHODS, others=', joined by "+", or "file.py:Class"')
  return METHODS[name]


def title(method):
  """'AttnFD + KD' of 'attnfd+kd'; of 'file.py:Class' the class."""
  if user_code.is_code(method):
    return method.rpartition(':')[2]
  return ' + '.join(TITLES[name] for name in method.split('+'))


def make_distiller(
  method, groups, *, options=None, num_steps=1, task_schedule='constant'
):
  """The WeightedSum of 'attnfd', 'attnfd+kd' or 'file.py:Class'.

  `groups` are {name: {'weight', 'weight_schedule', fields ...}}, and `options`
  is such a group of the user's class; `num_steps` is of the stage, for
  schedules of weights, `task_schedule` that of the task loss.
  """
  if user_code.is_code(method):
    name = title(method).lower()
    name = f'{name}_method' if name in _TAKEN else name
    chosen = {name: (_find(method), 'options', options or {})}
  elif options:
    raise InputError(
      f'config.distill.options={dict(options)} are of a class of your own; '
      f'those of {method} are keys of config.distill.{method.split("+")[0]}.'
    )
  else:
    names = method.split('+')
    if twice := [x for x in names if names.count(x) > 1]:
      raise InputError(
        f'config.distill.method={method} names {twice[0]} twice.'
      )
    chosen = {x: (_find(x), x, groups[x]) for x in names}
  methods, weights, schedules = {}, {}, {}
  for name, (method_class, key, fields) in chosen.items():
    group, fields = f'config.distill.{key}', dict(fields)
    weights[name] = fields.pop('weight', 1.0)
    schedules[name] = fields.pop('weight_schedule', 'constant')
    within(f'{group}.weight', weights[name], 0, 1e30)
    one_of(f'{group}.weight_schedule', schedules[name], SCHEDULES)
    with explained(group):
      methods[name] = method_class(**fields)
  one_of('config.distill.task_weight_schedule', task_schedule, SCHEDULES)
  return WeightedSum(methods, weights, schedules, num_steps, task_schedule)
