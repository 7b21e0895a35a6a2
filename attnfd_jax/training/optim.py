# SPDX-License-Identifier: Apache-2.0
"""The optimizer: poly schedule, parameter groups, phases (METHOD section 4)."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from attnfd_jax.distill.method import CONNECTOR_SCHEDULES
from attnfd_jax.errors import one_of, within


def poly_schedule(lr, *, num_steps, power, warmup_steps=0):
  """step -> lr (1 - step / num_steps)^power, after a linear warm-up."""

  def schedule(step):
    # An integer divided by an integer is float32 even where x64 is on.
    progress = jnp.minimum(jnp.asarray(step, float) / num_steps, 1.0)
    scale = (1 - progress) ** power
    if warmup_steps:
      scale = scale * jnp.minimum((step + 1) / warmup_steps, 1.0)
    return lr * scale

  return schedule


def make_labels(groups=()):
  """params -> the group of every leaf; see WeightedSum.parameter_groups."""
  rules = [
    (r'student/backbone/.*', 'backbone'),
    (r'student/.*', 'head'),
    *((f'distiller/(?:{regex})', group) for regex, group in groups),
    (r'distiller/.*', 'head'),
  ]

  def label(path, _):
    name = '/'.join(key.key for key in path)
    return next(group for rule, group in rules if re.fullmatch(rule, name))

  return lambda params: jax.tree_util.tree_map_with_path(label, params)


def _clip_what_trains(clip_norm, labels, trains):
  """optax.clip_by_global_norm over the groups that train at a step."""
  clip = optax.clip_by_global_norm(clip_norm)

  def update(updates, count, params=None):
    active = {group: now(count) for group, now in trains.items()}

    def resting(update, group):
      # Groups of a method's own optimizer always train.
      return jnp.where(active.get(group, group != 'frozen'), update, 0)

    updates = jax.tree.map(resting, updates, labels(updates))
    updates, _ = clip.update(updates, clip.init(params), params)
    return updates, count + 1

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def make_optimizer(
  schedule,
  *,
  name='sgd',
  head_lr_scale=10.0,
  weight_decay=5e-4,
  momentum=0.9,
  nesterov=True,
  clip_norm=None,
  connector_schedule='always',
  epoch_steps=0,
  groups=(),
  optimizers=None,
):
  """An Optax transformation with PyTorch's SGD, or AdamW, for each group.

  Weight decay is of every trained tensor, norms and biases included; in SGD it
  is added to the gradient, before momentum.

  Args:
    schedule: step -> learning rate of the backbone; that of everything else is
      `head_lr_scale` times as high.
    clip_norm: largest norm of the gradient of what trains at a step, or None.
    connector_schedule: 'always' trains all groups all the time. 'first_epoch'
      trains the connectors alone in the first `epoch_steps` steps, at the
      learning rate of the backbone, and fixes them afterwards. 'warmup' starts
      the same way and continues with all of them.
    groups, optimizers: of methods, see WeightedSum.
  """
  one_of('config.optim.name', name, ('sgd', 'adamw'))
  one_of('connector_schedule', connector_schedule, CONNECTOR_SCHEDULES)
  within('config.optim.head_lr_scale', head_lr_scale, 0)
  within('config.optim.weight_decay', weight_decay, 0)
  within('config.optim.momentum', momentum, 0, 1)
  if clip_norm is not None:
    within('config.optim.clip_norm', clip_norm, 0)
  decay = optax.add_decayed_weights(weight_decay)
  core = optax.chain(decay, optax.trace(momentum, nesterov=nesterov))
  if name == 'adamw':
    core = optax.chain(optax.scale_by_adam(), decay)
  phased, trains = connector_schedule != 'always', {}
  if phased:
    trains['backbone'] = trains['head'] = lambda step: step >= epoch_steps
  if connector_schedule == 'first_epoch':
    trains['connectors'] = lambda step: step < epoch_steps

  def rate(group, step):
    scale = 1.0 if group == 'backbone' else head_lr_scale
    if group == 'connectors' and phased:
      # The authors' scheduler overwrites the tenfold rate of a single group.
      scale = jnp.where(step < epoch_steps, 1.0, scale)
    return -scale * schedule(step)

  def make_group(name):
    inner = core
    if name in trains:
      # Outside its phase a group keeps weights and momentum as they are.
      inner = optax.conditionally_mask(core, trains[name])
    scale = optax.scale_by_schedule(functools.partial(rate, name))
    return optax.chain(inner, scale)

  labels = make_labels(groups)
  made = {x: make_group(x) for x in ('backbone', 'head', 'connectors')}
  made |= {'frozen': optax.set_to_zero()} | (optimizers or {})
  tx = optax.partition(made, labels)
  if clip_norm:
    tx = optax.chain(_clip_what_trains(clip_norm, labels, trains), tx)
  return tx
