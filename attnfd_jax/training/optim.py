# SPDX-License-Identifier: Apache-2.0
"""The optimiser: poly schedule, parameter groups, phases (METHOD section 4)."""

import functools
import re

import jax
import jax.numpy as jnp
import optax


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


def group_rules(*, mlp_frozen):
  """[(regex of a path, group)], first match wins; distiller.py, deeplab.py.

  With `mlp_frozen` the gates are grouped as by the authors, whose generators
  yield only convolutions and norms of the module that holds the gate.
  """
  gates = []
  if mlp_frozen:
    gates = [
      (r'distiller/.*student_gates_\w+/mlp_.*', 'frozen'),
      (r'distiller/.*student_gates_backbone/.*', 'backbone'),
    ]
  return [
    (r'student/backbone/.*', 'backbone'),
    (r'student/.*', 'head'),
    (r'distiller/.*connectors_\w+/.*', 'connectors'),
    *gates,
    (r'distiller/.*', 'head'),
  ]


def label_parameters(params, rules):
  """The group of every leaf, as a tree."""

  def label(path, _):
    name = '/'.join(key.key for key in path)
    return next(group for rule, group in rules if re.fullmatch(rule, name))

  return jax.tree_util.tree_map_with_path(label, params)


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
  mlp_frozen=False,
):
  """An Optax transformation with PyTorch's SGD, or AdamW, for each group.

  Args:
    schedule: step -> learning rate of the backbone.
    name: 'sgd' or 'adamw'.
    head_lr_scale: learning rate of everything else over the backbone's.
    weight_decay: of every trained tensor, norms and biases included; in SGD
      it is added to the gradient, before momentum.
    momentum, nesterov: of SGD.
    clip_norm: largest norm of the whole gradient, or None.
    connector_schedule: 'always' trains all groups all the time. 'first_epoch'
      trains the connectors alone in the first `epoch_steps` steps, at the
      learning rate of the backbone, and fixes them afterwards: the authors'
      scheduler overwrites the tenfold rate of a single group. 'warmup' starts
      the same way and goes on with all of them.
    epoch_steps: length of that first phase.
    mlp_frozen: see `group_rules`.
  """
  if name == 'adamw':
    core = optax.chain(
      optax.scale_by_adam(), optax.add_decayed_weights(weight_decay)
    )
  else:
    core = optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.trace(momentum, nesterov=nesterov),
    )

  def group(scale, should_train=None):
    inner = core
    if should_train is not None:
      # Outside its phase a group keeps weights and momentum as they are.
      inner = optax.conditionally_mask(core, should_train)
    rate = optax.scale_by_schedule(lambda step: -scale(step) * schedule(step))
    return optax.chain(inner, rate)

  def in_first_epoch(step):
    return step < epoch_steps

  def after_first_epoch(step):
    return step >= epoch_steps

  def connector_scale(step):
    if connector_schedule == 'always':
      return head_lr_scale
    return jnp.where(in_first_epoch(step), 1.0, head_lr_scale)

  main = None if connector_schedule == 'always' else after_first_epoch
  connectors = in_first_epoch if connector_schedule == 'first_epoch' else None
  rules = group_rules(mlp_frozen=mlp_frozen)
  tx = optax.partition(
    {
      'backbone': group(lambda step: 1.0, main),
      'head': group(lambda step: head_lr_scale, main),
      'connectors': group(connector_scale, connectors),
      'frozen': optax.set_to_zero(),
    },
    functools.partial(label_parameters, rules=rules),
  )
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx
