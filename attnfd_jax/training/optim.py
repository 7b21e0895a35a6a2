# SPDX-License-Identifier: Apache-2.0
"""The optimizer: poly schedule, parameter groups, phases (METHOD section 4)."""

from collections.abc import Callable, Hashable, Iterable, Mapping
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnfd_jax.distill.method import CONNECTOR_SCHEDULES
from attnfd_jax.errors import check_choice, check_range
from attnfd_jax.types import PyTree


def poly_schedule(
  lr: float, *, num_steps: int, power: float, warmup_steps: int = 0
) -> optax.Schedule:
  """Learning rate lr (1 - step / num_steps)^power, after a linear warm-up."""

  def schedule(step):
    # An integer divided by an integer is float32 even where x64 is on.
    progress = jnp.minimum(jnp.asarray(step, float) / num_steps, 1.0)
    scale = (1 - progress) ** power
    if warmup_steps:
      scale = scale * jnp.minimum((step + 1) / warmup_steps, 1.0)
    return lr * scale

  return schedule


def make_labels(
  groups: Iterable[tuple[str, str]] = (),
) -> Callable[[PyTree], PyTree]:
  """Returns a function from parameters to the group of every leaf.

  Args:
    groups: (regex, group) of the distiller, see WeightedSum.parameter_groups.
  """
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


def _clip_active_groups(
  clip_norm: float,
  labels: Callable[[PyTree], PyTree],
  is_active: Mapping[str, Callable],
) -> optax.GradientTransformation:
  """optax.clip_by_global_norm over the groups that are trained at a step."""
  clip = optax.clip_by_global_norm(clip_norm)

  def update(updates: Any, state: Any, params: Any = None):
    # The state counts the steps.
    active = {group: at_step(state) for group, at_step in is_active.items()}

    def zero_inactive(update, group):
      # Groups with an optimizer of their own are always trained.
      return jnp.where(active.get(group, group != 'frozen'), update, 0)

    updates = jax.tree.map(zero_inactive, updates, labels(updates))
    updates, _ = clip.update(updates, clip.init(params), params)
    return updates, state + 1

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  name: str = 'sgd',
  head_lr_scale: float = 10.0,
  weight_decay: float = 5e-4,
  momentum: float = 0.9,
  nesterov: bool = True,
  clip_norm: float | None = None,
  connector_schedule: str = 'always',
  epoch_steps: int = 0,
  groups: Iterable[tuple[str, str]] = (),
  optimizers: Mapping[str, optax.GradientTransformation] | None = None,
) -> optax.GradientTransformation:
  """An Optax transformation with PyTorch's SGD, or AdamW, for each group.

  Weight decay applies to every trained tensor, including norms and biases; with
  SGD it is added to the gradient before momentum.

  Args:
    schedule: learning rate of the backbone at each step.
    name: 'sgd' or 'adamw'.
    head_lr_scale: factor of the learning rate outside the backbone.
    weight_decay: coefficient of the weights in the update.
    momentum: for SGD.
    nesterov: for SGD.
    clip_norm: largest global norm of the gradients of the groups that are
      trained at a step; None or 0 does not clip.
    connector_schedule: 'always' trains all groups at every step. 'first_epoch'
      trains only the connectors in the first `epoch_steps` steps, at the
      learning rate of the backbone, and freezes them afterwards. 'warmup'
      starts the same way and then trains all groups.
    epoch_steps: length of the first phase.
    groups: (regex, group) of the distiller, see WeightedSum.parameter_groups.
    optimizers: of groups with one of their own, see WeightedSum.optimizers.

  Raises:
    InputError: for a value outside its choices or its range.
  """
  check_choice('config.optim.name', name, ('sgd', 'adamw'))
  check_choice('connector_schedule', connector_schedule, CONNECTOR_SCHEDULES)
  check_range('config.optim.head_lr_scale', head_lr_scale, 0)
  check_range('config.optim.weight_decay', weight_decay, 0)
  check_range('config.optim.momentum', momentum, 0, 1)
  if clip_norm is not None:
    check_range('config.optim.clip_norm', clip_norm, 0)
  decay = optax.add_decayed_weights(weight_decay)
  core = optax.chain(decay, optax.trace(momentum, nesterov=nesterov))
  if name == 'adamw':
    core = optax.chain(optax.scale_by_adam(), decay)
  phased, is_active = connector_schedule != 'always', {}
  if phased:
    is_active['backbone'] = is_active['head'] = lambda step: step >= epoch_steps
  if connector_schedule == 'first_epoch':
    is_active['connectors'] = lambda step: step < epoch_steps

  def rate(group, step):
    scale = 1.0 if group == 'backbone' else head_lr_scale
    if group == 'connectors' and phased:
      # A single group: the authors' scheduler overwrites its tenfold rate.
      scale = jnp.where(step < epoch_steps, 1.0, scale)
    return -scale * schedule(step)

  def make_group(name):
    inner = core
    if name in is_active:
      # Outside its phase, a group keeps its weights and its momentum.
      inner = optax.conditionally_mask(core, is_active[name])
    scale = optax.scale_by_schedule(functools.partial(rate, name))
    return optax.chain(inner, scale)

  labels = make_labels(groups)
  transforms: dict[Hashable, optax.GradientTransformation] = {
    group: make_group(group) for group in ('backbone', 'head', 'connectors')
  }
  transforms['frozen'] = optax.set_to_zero()
  for group, own in (optimizers or {}).items():
    transforms[group] = own
  tx = optax.partition(transforms, labels)
  if clip_norm:
    tx = optax.chain(_clip_active_groups(clip_norm, labels, is_active), tx)
  return tx
