# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a stage: the last one and the best by mIoU."""

import operator
import pathlib

import jax
import orbax.checkpoint as ocp

from attnfd_jax.errors import InputError


def make_manager(directory, *, keep_best=1, read_only=False):
  """A CheckpointManager; use it as a context manager, for errors come late.

  `best_fn` looks redundant and is not: without it metrics stay in memory and
  the best checkpoint is lost after a restart.
  """
  policies = ocp.checkpoint_managers
  get_metric = operator.itemgetter('miou')
  best = policies.BestN(
    get_metric_fn=get_metric,
    n=keep_best,
    keep_checkpoints_without_metrics=False,
  )
  options = ocp.CheckpointManagerOptions(
    save_decision_policy=policies.FixedIntervalPolicy(1),
    preservation_policy=policies.AnyPreservationPolicy(
      [policies.LatestN(1), best]
    ),
    best_fn=get_metric,
    read_only=read_only,
  )
  return ocp.CheckpointManager(
    pathlib.Path(directory).absolute(), options=options
  )


def save(manager, step, state, run, *, miou):
  """`run` is what the data order depends on: seed, batch, records."""
  args = ocp.args.Composite(
    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
  )
  # Scalars of NumPy and jax are not JSON.
  manager.save(step, args=args, metrics={'miou': float(miou)})


def restore(manager, step, state, run):
  """The saved state on the shardings of `state`, which it replaces.

  Raises:
    InputError: if another run wrote it.
  """
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  args = ocp.args.Composite(
    state=ocp.args.StandardRestore(shapes), run=ocp.args.JsonRestore()
  )
  found = manager.restore(step, args=args)
  if found['run'] != run:
    raise InputError(
      f'{manager.directory}: written with {found["run"]}, this run has {run}; '
      'use another --workdir.'
    )
  return found['state']


def restore_parts(directory, wanted, *, step=None):
  """A part of a saved state, and its step.

  Args:
    directory: `checkpoints` of a stage.
    wanted: the part: a tree of arrays or ShapeDtypeStruct with shardings.
    step: which checkpoint; the best by default.

  Raises:
    InputError: if there is none, or it has no such part.
  """
  if not pathlib.Path(directory).is_dir():
    raise InputError(f'{directory}: no checkpoints there.')
  with make_manager(directory, read_only=True) as manager:
    step = manager.best_step() if step is None else step
    if step is None or step not in manager.all_steps():
      raise InputError(
        f'{directory}: no checkpoint {"" if step is None else step}; have '
        f'{manager.all_steps()}.'
      )
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        wanted, restore_args=restore_args, partial_restore=True
      )
    )
    try:
      return manager.restore(step, args=args)['state'], step
    except ValueError as error:
      raise InputError(
        f'{directory}: checkpoint {step} is of another network than '
        f'config.json beside it says ({str(error).splitlines()[0]}).'
      ) from error


def restore_student(directory, variables, *, averaged, step=None):
  """Variables of the evaluated network from a stage's checkpoints.

  Args:
    directory: `checkpoints` of a stage.
    variables: the structure, arrays or ShapeDtypeStruct with shardings.
    averaged: the stage kept an average of the weights, which was evaluated.
    step: which one; the best by default.

  Raises:
    InputError: if there is none, or it belongs to another network.
  """
  if averaged:
    found, step = restore_parts(directory, {'ema': variables}, step=step)
    return found['ema'], step
  collections = dict(variables)
  params = collections.pop('params')
  wanted = {
    'params': {'student': params},
    'collections': {'student': collections},
  }
  found, step = restore_parts(directory, wanted, step=step)
  student = found['collections']['student']
  return {'params': found['params']['student'], **student}, step
