# SPDX-License-Identifier: Apache-2.0
"""One jitted, sharded, donated step for all stages."""

import functools

import jax
import jax.numpy as jnp
import optax

from attnfd_jax.devices import sharding
from attnfd_jax.losses import softmax_cross_entropy
from attnfd_jax.losses import upsampled_cross_entropy
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.resizing import score_precision
from attnfd_jax.training.state import TrainState

# Bytes of logits on a device above which the loss is taken part by part.
LARGE_LOGITS = 2**26


def _after(first, x):
  """The tree x, but not before all of the float tree `first` is computed."""
  known = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(first))
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  # XLA for a CPU drops barriers, but no branch that it cannot foresee. If a
  # gradient is not finite, the step is lost anyhow.
  return jax.lax.cond(jnp.isnan(known), zeros, lambda x: x, x)


def make_train_step(
  student,
  tx,
  *,
  teacher=None,
  distiller=None,
  schedule,
  mesh,
  state_sharding=None,
  task_loss=softmax_cross_entropy,
  teacher_bn='running',
  teacher_dropout=False,
  ce_batch_division=False,
  accumulate=1,
  remat=False,
  ema_decay=0.0,
):
  """Returns jitted (state, teacher_variables, batch, rng) -> state, metrics.

  Batch statistics and norms are over the global batch on any mesh, so that
  the result does not depend on the number of devices.

  Args:
    student: the network in training.
    tx: Optax transformation.
    teacher: network or None; teacher_variables are then {}.
    distiller: module called with (student, teacher, labels); see distill/.
    schedule: step -> learning rate, for the log.
    mesh: see sharding.make_mesh.
    state_sharding: TrainState of shardings, as of sharding.split_state: the
      weights are gathered for the gradient, which comes back split. None is
      a whole state on every device.
    task_loss: (logits, labels) -> scalar; 'ce' in the metrics if it is the
      cross-entropy, else 'task'.
    teacher_bn: 'running' or 'batch' statistics in the teacher, whose own
      running ones never change.
    teacher_dropout: drop in the teacher as well.
    ce_batch_division: divide the task loss by the batch, as the authors do
      (utils/loss.py).
    accumulate: parts of the batch, one after the other, in less memory;
      statistics and norms are then over a part.
    remat: keep only block outputs for the backward pass, compute the rest
      again.
    ema_decay: of the averaged student; 0 keeps none.
  """
  everywhere = sharding.replicated(mesh)
  # In a loop XLA's convolutions for a CPU are plain ones on one core.
  unrolled = mesh.devices.flat[0].platform == 'cpu'
  task_name = 'ce' if task_loss is softmax_cross_entropy else 'task'

  def forward(variables, image, rng):
    return student.apply(
      variables,
      image,
      train=True,
      rngs={'dropout': rng},
      mutable=['batch_stats'],
    )

  if remat:
    policy = jax.checkpoint_policies.save_only_these_names('block')
    forward = jax.checkpoint(forward, policy=policy)

  def compute_task_loss(out, label):
    logits = out['logits']
    parts = -(-4 * logits.size // (mesh.shape['data'] * LARGE_LOGITS))
    plain = task_name == 'ce' and mesh.shape['spatial'] == 1
    if parts == 1 or not plain or 'coarse_logits' not in out:
      return task_loss(logits, label)
    return upsampled_cross_entropy(
      out['coarse_logits'],
      label,
      parts=parts,
      precision=score_precision(student.dtype),
    )

  def loss_fn(params, collections, teacher_variables, batch, rng):
    image = batch['image']
    if image.dtype == jnp.uint8:
      image = normalise(image)
    image = sharding.split_height(image, mesh)
    label = sharding.split_height(batch['label'], mesh)
    student_rng, teacher_rng = jax.random.split(rng)
    out, updated = forward(
      {'params': params['student'], **collections['student']},
      image,
      student_rng,
    )
    loss = task = compute_task_loss(out, label)
    if ce_batch_division:
      loss = task / image.shape[0]
    terms = {task_name: task}
    collections = {**collections, 'student': updated}
    if distiller is not None:
      # Statistics are not mutable here: the teacher stays as it is.
      target = jax.lax.stop_gradient(
        teacher.apply(
          teacher_variables,
          image,
          train=teacher_bn == 'batch',
          dropout=teacher_dropout,
          rngs={'dropout': teacher_rng},
        )
      )
      state = collections['distiller']
      (distance, parts), updated = distiller.apply(
        {'params': params['distiller'], **state},
        out,
        target,
        label,
        train=True,
        mutable=list(state),
      )
      loss = loss + distance
      terms |= parts
      collections['distiller'] = {**state, **updated}
    return loss, (collections, terms | {'loss': loss})

  def gradients(state, teacher_variables, batch, rng):
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulate == 1:
      return grad_fn(
        state.params, state.collections, teacher_variables, batch, rng
      )

    def split(x):
      # Every device keeps its images: the parts interleave.
      parts = x.reshape(-1, accumulate, *x.shape[1:])
      return jnp.swapaxes(parts, 0, 1)

    def add_part(carry, part):
      collections, total = carry
      index, batch = part
      if unrolled:
        batch = _after(total, batch)
      grads, (collections, terms) = grad_fn(
        state.params,
        collections,
        teacher_variables,
        batch,
        jax.random.fold_in(rng, index),
      )
      return (collections, jax.tree.map(jnp.add, total, grads)), terms

    start = (state.collections, jax.tree.map(jnp.zeros_like, state.params))
    parts = (jnp.arange(accumulate), jax.tree.map(split, batch))
    (collections, total), terms = jax.lax.scan(
      add_part, start, parts, unroll=accumulate if unrolled else 1
    )
    grads = jax.tree.map(lambda x: x / accumulate, total)
    return grads, (collections, jax.tree.map(jnp.mean, terms))

  def train_step(state, teacher_variables, batch, rng):
    rng = jax.random.fold_in(rng, state.step)
    whole = state
    if state_sharding is not None:
      # Said, not left to XLA, which might split channels of maps instead.
      constrain = jax.lax.with_sharding_constraint
      whole = state.replace(params=constrain(state.params, everywhere))
    grads, (collections, metrics) = gradients(
      whole, teacher_variables, batch, rng
    )
    if state_sharding is not None:
      grads = constrain(grads, state_sharding.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      collections=collections,
      opt_state=opt_state,
      ema=state.ema,
    )
    if ema_decay:
      current = state.replace(ema={}).student_variables()
      # A young average would be the random start.
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      average = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, state.ema, current
      )
      state = state.replace(ema=average)
    return state, metrics

  place = everywhere if state_sharding is None else state_sharding
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(place, everywhere, sharding.by_batch(mesh), everywhere),
    out_shardings=(place, everywhere),
  )
