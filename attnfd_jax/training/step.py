# SPDX-License-Identifier: Apache-2.0
"""The state, and the one jitted, sharded, donated step of all stages."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from attnfd_jax.devices import sharding
from attnfd_jax.losses import upsampled_cross_entropy
from attnfd_jax.models import cpu_forms
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.resizing import score_precision
from attnfd_jax.training import mixing

# Bytes of logits on a device above which the loss is taken part by part.
LARGE_LOGITS = 2**26


@flax.struct.dataclass
class TrainState:
  """State of one stage, arrays only.

  Attributes:
    step: int32 scalar, updates applied so far.
    params: {'student': ..., 'distiller': ...}; the network in training is
      called student in every stage. Without a teacher there is no distiller.
    collections: same keys, everything that is not trained: running statistics,
      memories, the teacher's frozen gates.
    opt_state: of the optimizer.
    ema: averaged params, of the same keys, or {}. Statistics are averages
      already, and are not averaged again.
  """

  step: jax.Array
  params: dict
  collections: dict
  opt_state: optax.OptState
  ema: dict

  def variables(self, name):
    """Of 'student' or 'distiller' as they are evaluated: averaged if kept."""
    params = (self.ema or self.params)[name]
    return {'params': params, **self.collections[name]}


def make_state(variables, tx, *, ema):
  """TrainState of {'student': variables, ...}; `ema` keeps an average."""
  collections = {name: dict(parts) for name, parts in variables.items()}
  params = {name: x.pop('params', {}) for name, x in collections.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections=collections,
    opt_state=tx.init(params),
    # Copies: a donated state must not hold one buffer twice.
    ema=jax.tree.map(jnp.copy, params) if ema else {},
  )


def _with_second(first, second):
  """Both gradients, and what the first one has beside them."""

  def both(*arguments):
    grads, rest = first(*arguments)
    return (grads, second(*arguments)[0]), rest

  return both


def _compare_gradients(total, task):
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
  student,
  tx,
  *,
  task_loss,
  teacher=None,
  distiller=None,
  schedule,
  mesh,
  state_sharding=None,
  plain_cross_entropy=False,
  ce_batch_division=False,
  log_gradients=False,
  cutmix=0.0,
  accumulate=1,
  remat=False,
  ema_decay=0.0,
):
  """Returns jitted (state, teacher_variables, batch, rng) -> state, metrics.

  Batch statistics and norms are over the global batch on any mesh, so that
  the result does not depend on the number of devices.

  Args:
    task_loss: (logits, labels) -> {term: Mean}.
    schedule: step -> learning rate, for the log.
    state_sharding: as of sharding.split_state: the weights are gathered for the
      gradient, which comes back split. None is a whole state on every device.
    plain_cross_entropy: task_loss is the cross-entropy: large logits that are
      the resize of coarse ones need never exist as a whole.
    ce_batch_division: as the authors divide the task loss (utils/loss.py).
    log_gradients: adds to the metrics, of the gradients of the student's
      weights, 'cosine' between that of the task and that of the distillation,
      and both norms, 'task_norm' and 'distill_norm'; by a second backward pass.
    cutmix: probability of an image to be mixed with another, see mixing.py.
    accumulate: parts of the batch, one after the other, in less memory. What is
      a Mean is divided once, by what the whole batch counts; batch statistics,
      norms and other losses are over a part, and their mean is taken.
    remat: compute all but block outputs again for the backward pass.
    ema_decay: of the averaged parameters; 0 keeps none.
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
    whole = not plain_cross_entropy or mesh.shape['spatial'] > 1
    if parts == 1 or whole or 'coarse_logits' not in out:
      return task_loss(logits, label)
    precision = score_precision(getattr(student, 'dtype', None))
    loss = upsampled_cross_entropy(
      out['coarse_logits'], label, parts=parts, precision=precision
    )
    return {'ce': loss}

  def compute_losses(
    params, collections, batch, rng, *, teacher_variables, step
  ):
    """Two dicts {term: Mean}, new collections, and scalars for the log."""
    image = batch['image']
    if image.dtype == jnp.uint8:
      image = normalise(image)
    image = sharding.split_height(image, mesh)
    label = sharding.split_height(batch['label'], mesh)
    student_rng, teacher_rng = jax.random.split(rng)
    variables = {'params': params['student'], **collections['student']}
    out, updated = forward(variables, image, student_rng)
    task = task_terms(out, label)
    collections = {**collections, 'student': updated}
    if distiller is None:
      return task, {}, collections, {}
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
    """The loss of a batch, or its share of it; counts are the whole batch's."""
    found = compute_losses(params, collections, batch, rng, **fixed)
    task, distances, collections, terms = found
    values = {
      name: loss._replace(count=counts.get(name, loss.count)).value
      for name, loss in (task | distances).items()
    }
    loss = sum(values[name] for name in task)
    if ce_batch_division:
      loss = loss / (accumulate * batch['image'].shape[0])
    if distances:
      loss = loss * distiller.task_weight(fixed['step'])
    if distances and not task_only:
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
      # Every device keeps its images: the parts interleave.
      parts = x.reshape(-1, accumulate, *x.shape[1:])
      return jnp.swapaxes(parts, 0, 1)

    def count(part):
      # The compiler drops all that the counts do not need: for most losses
      # that is everything but the labels.
      index, batch = part
      own = jax.random.fold_in(rng, index)
      task, distances, _, _ = compute_losses(*start, batch, own, **fixed)
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
    whole = state
    if state_sharding is not None:
      # Said, not left to XLA, which might split channels of maps instead.
      constrain = jax.lax.with_sharding_constraint
      whole = state.replace(params=constrain(state.params, everywhere))
    rng = jax.random.fold_in(rng, state.step)
    if cutmix:
      # An index that no part of the batch has.
      own = jax.random.fold_in(rng, accumulate)
      batch = mixing.cutmix(batch, own, probability=cutmix)
    fixed = {'teacher_variables': teacher_variables, 'step': state.step}
    grads, (collections, metrics) = gradients(whole, batch, rng, **fixed)
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
      # Warmed up: a young average would be the random start.
      decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
      ema = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, ema, params
      )
    return TrainState(step, params, collections, opt_state, ema), metrics

  place = everywhere if state_sharding is None else state_sharding
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(place, everywhere, sharding.by_batch(mesh), everywhere),
    out_shardings=(place, everywhere),
  )
