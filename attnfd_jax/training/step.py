# SPDX-License-Identifier: Apache-2.0
"""The train state, and the jitted training step of all stages."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from attnfd_jax.devices import sharding
from attnfd_jax.distill import WeightedSum
from attnfd_jax.losses import upsampled_cross_entropy
from attnfd_jax.models import cpu_forms
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.models.network import Network
from attnfd_jax.models.resizing import logits_precision
from attnfd_jax.teachers.teacher import Teacher
from attnfd_jax.training import mixing
from attnfd_jax.training.task_loss import TaskLoss
from attnfd_jax.types import PyTree, Variables

# Bytes of logits per device above which the loss is computed in parts.
LARGE_LOGITS = 2**26


@flax.struct.dataclass
class TrainState:
  """State of one stage, arrays only.

  Attributes:
    step: number of updates applied so far, an int32 scalar.
    params: {'student': ..., 'distiller': ...}; the network in training is
      called student in every stage. Without a teacher there is no distiller.
    collections: same keys; variables that are not trained: running statistics,
      memory banks, the teacher's frozen gates.
    opt_state: of the optimizer.
    ema: moving averages of params, or {}. Batch statistics are moving averages
      themselves and are not averaged again.
  """

  step: jax.Array
  params: PyTree
  collections: dict[str, PyTree]
  opt_state: optax.OptState
  ema: PyTree

  def variables(self, name: str) -> Variables:
    """Variables for evaluation; the moving averages if they are kept.

    Args:
      name: 'student' or 'distiller'.
    """
    params = (self.ema or self.params)[name]
    return {'params': params, **self.collections[name]}


def make_state(
  variables: Mapping[str, Variables],
  tx: optax.GradientTransformation,
  *,
  ema: bool,
) -> TrainState:
  """Creates a TrainState at step 0.

  Args:
    variables: of 'student' and, with a teacher, 'distiller'.
    tx: the optimizer.
    ema: whether to keep moving averages of the parameters.
  """
  collections = {name: dict(parts) for name, parts in variables.items()}
  params = {name: x.pop('params', {}) for name, x in collections.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections=collections,
    opt_state=tx.init(params),
    # Copies: a donated state must not contain a buffer twice.
    ema=jax.tree.map(jnp.copy, params) if ema else {},
  )


def _with_second(first: Callable, second: Callable) -> Callable:
  """Joins two gradient functions; the auxiliary data is that of the first."""

  def both(*arguments):
    grads, aux = first(*arguments)
    return (grads, second(*arguments)[0]), aux

  return both


def _compare_gradients(total: PyTree, task: PyTree) -> dict[str, Any]:
  """See `log_gradients` of make_train_step."""
  distill = jax.tree.map(jnp.subtract, total, task)
  norms = optax.tree.norm(task), optax.tree.norm(distill)
  product = optax.tree.vdot(task, distill)
  return {
    'cosine': product / jnp.maximum(norms[0] * norms[1], 1e-30),
    'task_norm': norms[0],
    'distill_norm': norms[1],
  }


def make_train_step(
  student: Network,
  tx: optax.GradientTransformation,
  *,
  task_loss: TaskLoss,
  teacher: Teacher | None = None,
  distiller: WeightedSum | None = None,
  schedule: optax.Schedule,
  mesh: jax.sharding.Mesh,
  state_sharding: TrainState | None = None,
  plain_cross_entropy: bool = False,
  ce_batch_division: bool = False,
  log_gradients: bool = False,
  cutmix: float = 0.0,
  accumulate: int = 1,
  remat: bool = False,
  ema_decay: float = 0.0,
) -> jax.stages.Wrapped:
  """Returns jitted (state, teacher_variables, batch, rng) -> state, metrics.

  The state is donated. Batch statistics and norms are over the global batch on
  any device mesh, so that the result does not depend on the number of devices.

  Args:
    student: the network in training.
    tx: the optimizer of the network and the distiller.
    task_loss: from logits and labels to {term: Mean}.
    teacher: comes with a distiller.
    distiller: the distillation losses; None trains without a teacher.
    schedule: learning rate at each step, for the log.
    mesh: device mesh.
    state_sharding: as of sharding.split_state: parameters are gathered for the
      forward and backward pass, and gradients are sharded like them. None
      replicates the state.
    plain_cross_entropy: whether task_loss is the cross-entropy without class
      weights: large logits are then never materialized at full size, if the
      network returns coarse ones.
    ce_batch_division: divide the task loss by the batch size, as the authors do
      (utils/loss.py).
    log_gradients: add to the metrics, for the gradients of the student's
      weights, the 'cosine' between that of the task and that of distillation,
      and their norms 'task_norm' and 'distill_norm', by a second backward pass.
    cutmix: probability of an image to be mixed with another, see mixing.py.
    accumulate: number of parts of the batch to process one after the other, in
      less memory. Every Mean is divided once, by its count in the whole batch;
      batch statistics, norms and other losses are per part, and these losses
      are averaged.
    remat: recompute activations, except block outputs, in the backward pass.
    ema_decay: of the moving averages of the parameters; 0 keeps none.
  """
  everywhere = sharding.replicated(mesh)
  split_gradients = log_gradients and distiller is not None

  def forward(variables, image, rng):
    mutable = [name for name in variables if name != 'params']
    return student.apply(
      variables, image, train=True, rngs={'dropout': rng}, mutable=mutable
    )

  if remat:
    policy = jax.checkpoint_policies.save_only_these_names('block')
    forward = jax.checkpoint(forward, policy=policy)

  def task_terms(out, label):
    logits = out['logits']
    parts = -(-4 * logits.size // (mesh.shape['data'] * LARGE_LOGITS))
    splits = plain_cross_entropy and mesh.shape['spatial'] == 1
    if parts == 1 or not splits or 'coarse_logits' not in out:
      return task_loss(logits, label)
    precision = logits_precision(getattr(student, 'dtype', None))
    loss = upsampled_cross_entropy(
      out['coarse_logits'], label, parts=parts, precision=precision
    )
    return {'ce': loss}

  def compute_losses(
    params, collections, batch, rng, *, teacher_variables, step
  ):
    """Task losses, distillation losses, new collections, scalars to log."""
    image = batch['image']
    if image.dtype == jnp.uint8:
      image = normalize(image)
    image = sharding.split_height(image, mesh)
    label = sharding.split_height(batch['label'], mesh)
    student_rng, teacher_rng = jax.random.split(rng)
    variables = {'params': params['student'], **collections['student']}
    out, updated = forward(variables, image, student_rng)
    task = task_terms(out, label)
    collections = {**collections, 'student': updated}
    if distiller is None:
      return task, {}, collections, {}
    assert teacher is not None
    target = jax.lax.stop_gradient(
      teacher.apply(teacher_variables, image, rng=teacher_rng)
    )
    state = collections['distiller']
    (distances, terms), updated = distiller.apply(
      {'params': params['distiller'], **state},
      out,
      target,
      label,
      train=True,
      step=step,
      batch_size=accumulate * image.shape[0],
      rngs={'distill': jax.random.fold_in(rng, 2)},
      mutable=list(state),
    )
    collections['distiller'] = {**state, **updated}
    return task, distances, collections, terms

  def loss_fn(
    params, collections, batch, rng, counts, *, task_only=False, **fixed
  ):
    """Loss of a batch, or of a part given the counts of the whole batch."""
    task, distances, collections, terms = compute_losses(
      params, collections, batch, rng, **fixed
    )
    values = {
      name: loss._replace(count=counts.get(name, loss.count)).value
      for name, loss in (task | distances).items()
    }
    loss = sum(values[name] for name in task)
    if ce_batch_division:
      loss = loss / (accumulate * batch['image'].shape[0])
    if distiller is not None:
      loss = loss * distiller.task_weight(fixed['step'])
      if not task_only:
        loss = loss + sum(
          distiller.weight(name, fixed['step']) * values[name]
          for name in distances
        )
    share = jax.tree.map(lambda x: x / accumulate, terms)
    return loss, (collections, values | share | {'loss': loss})

  def gradients(state, batch, rng, **fixed):
    grad_fn = jax.grad(functools.partial(loss_fn, **fixed), has_aux=True)
    if split_gradients:
      of_task = functools.partial(loss_fn, task_only=True, **fixed)
      grad_fn = _with_second(grad_fn, jax.grad(of_task, has_aux=True))
    start = state.params, state.collections
    if accumulate == 1:
      return grad_fn(*start, batch, rng, {})

    def split(x):
      # Interleaved parts, so that every device keeps its images.
      parts = x.reshape(-1, accumulate, *x.shape[1:])
      return jnp.swapaxes(parts, 0, 1)

    def count(part):
      # The compiler drops what the counts do not depend on: for most losses
      # everything but the labels.
      index, batch = part
      part_rng = jax.random.fold_in(rng, index)
      task, distances, _, _ = compute_losses(*start, batch, part_rng, **fixed)
      return {name: loss.count for name, loss in (task | distances).items()}

    def add(carry, part):
      collections, total = carry
      index, batch = part
      grads, (collections, terms) = grad_fn(
        state.params, collections, batch, jax.random.fold_in(rng, index), counts
      )
      return (collections, jax.tree.map(jnp.add, total, grads)), terms

    parts = (jnp.arange(accumulate), jax.tree.map(split, batch))
    counts = jax.tree.map(jnp.sum, jax.lax.map(count, parts))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    zeros = (zeros, zeros) if split_gradients else zeros
    carry = (state.collections, zeros)
    (collections, grads), terms = cpu_forms.scan(
      add, carry, parts, platform=mesh.devices.flat[0].platform
    )
    return grads, (collections, jax.tree.map(jnp.sum, terms))

  def train_step(state, teacher_variables, batch, rng):
    gathered, constrain = state, jax.lax.with_sharding_constraint
    if state_sharding is not None:
      # Explicit: XLA might shard the channels of feature maps instead.
      gathered = state.replace(params=constrain(state.params, everywhere))
    rng = jax.random.fold_in(rng, state.step)
    if cutmix:
      # The index differs from those of the parts of the batch.
      mix_rng = jax.random.fold_in(rng, accumulate)
      batch = mixing.cutmix(batch, mix_rng, probability=cutmix)
    fixed = {'teacher_variables': teacher_variables, 'step': state.step}
    grads, (collections, metrics) = gradients(gathered, batch, rng, **fixed)
    if split_gradients:
      grads, of_task = grads
      metrics |= _compare_gradients(grads['student'], of_task['student'])
    if state_sharding is not None:
      grads = constrain(grads, state_sharding.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    step, ema = state.step + 1, state.ema
    if ema_decay:
      # Warmed up, or early averages would be close to the initial weights.
      decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
      ema = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, ema, params
      )
    return TrainState(step, params, collections, opt_state, ema), metrics

  placement = everywhere if state_sharding is None else state_sharding
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(placement, everywhere, sharding.by_batch(mesh), everywhere),
    out_shardings=(placement, everywhere),
  )
