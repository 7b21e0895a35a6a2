# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a stage: the last two and the best by mIoU.

Each holds checksums of its arrays: Orbax reads over a flipped bit without a
word.
"""

import contextlib
import json
import operator
import os
import re
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.devices import sharding as shardings
from attnfd_jax.errors import InputError


def steps(directory):
  """Steps of the finished checkpoints in `directory`, in order."""
  directory = paths.as_path(directory)
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def make_manager(directory, *, keep_best=1, read_only=False):
  """A CheckpointManager; use it as a context manager, for errors come late.

  `best_fn` looks redundant and is not: without it metrics stay in memory and
  the best checkpoint is lost after a restart. Checkpoints without an
  evaluation are never the best. Two are kept for the case that the last one
  cannot be read.

  Raises:
    InputError: if the mIoU of a checkpoint cannot be read.
  """
  directory = paths.as_path(directory)
  for step in steps(directory):
    _check_metrics(directory / str(step))
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
      [policies.LatestN(2), best]
    ),
    best_fn=get_metric,
    # What a killed process had half written.
    cleanup_tmp_directories=not read_only,
    read_only=read_only,
  )
  return ocp.CheckpointManager(directory, options=options)


@contextlib.contextmanager
def managed(directory, *, keep_best=1):
  """`make_manager` for a run that writes; what it saves is complete at exit.

  Raises:
    InputError: if a checkpoint could not be saved.
  """
  with _saving(directory):
    manager = make_manager(directory, keep_best=keep_best)
  try:
    yield manager
  except BaseException:
    # The first failure is the one to report.
    with contextlib.suppress(Exception):
      manager.close()
    raise
  with _saving(directory):
    manager.close()


def save(manager, step, state, run, *, miou=None):
  """Saves in the background; one of the same step is replaced.

  Args:
    manager: of `make_manager`.
    step: updates applied so far.
    state: TrainState.
    run: what the data order depends on: seed, batch, records.
    miou: of the evaluation; without one it is never the best.

  Raises:
    InputError: if this one, or the one before it, could not be saved.
  """
  facts = {'run': run, 'checksums': _checksums(state)}
  args = ocp.args.Composite(
    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(facts)
  )
  # Scalars of NumPy and jax are not JSON.
  metrics = None if miou is None else {'miou': float(miou)}
  with _saving(manager.directory):
    if step in manager.all_steps():
      manager.wait_until_finished()
      manager.delete(step)
    if not manager.directory.is_dir():
      raise InputError(
        f'{manager.directory}: the folder is gone, and step {step} cannot be '
        'saved; put it back, or start the same command again to begin this '
        'stage anew.'
      )
    manager.save(step, args=args, metrics=metrics)


def wait(manager):
  """Returns when everything is saved.

  Raises:
    InputError: if something could not be saved.
  """
  with _saving(manager.directory):
    manager.wait_until_finished()


@contextlib.contextmanager
def _saving(directory):
  try:
    yield
  # A step that failed on the device may show here first.
  except (InputError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise InputError(
      f'{directory}: cannot save ({_reason(error)}); make room, or make the '
      'folder writable, and start the same command again. What was saved '
      'before is still there.'
    ) from error


def _reason(error):
  """What the system said, or the first line: messages can be pages of JSON."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error).strip() or type(error).__name__
  system = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(system[1])) if system else text.splitlines()[0][:160]


def _checksums(tree):
  """{path: CRC-32} of the arrays of a tree; all processes call this."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): zlib.crc32(
      np.ascontiguousarray(shardings.to_host(leaf)).reshape(-1).view(np.uint8)
    )
    for path, leaf in leaves
  }


def _check_metrics(folder):
  path = folder / 'metrics' / 'metrics'
  try:
    if path.exists():
      float(json.loads(path.read_text())['miou'])
  except (ValueError, KeyError, TypeError):
    raise InputError(
      f'{path}: damaged; put a copy back, or move the folder {folder.name} '
      'away to resume without this checkpoint.'
    ) from None


def _read(folder, state_args, *, alone=False):
  """{'state', 'run'}; raises ValueError for arrays that have changed.

  Args:
    folder: of the checkpoint.
    state_args: of Orbax, for its item 'state'.
    alone: the first process reads; others do not take part.
  """
  options = {}
  if alone:
    options['multiprocessing_options'] = ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix='first'
    )
  handler = ocp.CompositeCheckpointHandler(
    composite_options=ocp.CompositeOptions(**options)
  )
  with ocp.Checkpointer(handler, **options) as checkpointer:
    found = checkpointer.restore(
      folder,
      args=ocp.args.Composite(state=state_args, run=ocp.args.JsonRestore()),
    )
  expected = found['run']['checksums']
  for path, value in _checksums(found['state']).items():
    if expected.get(path) != value:
      raise ValueError(f'{path} is damaged')
  return found


def _read_whole(folder, state, *, alone=False):
  """What `_read` returns of a TrainState and '', or None and why not."""
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  try:
    args = ocp.args.StandardRestore(shapes)
    return _read(folder, args, alone=alone), ''
  except jax.errors.JaxRuntimeError:
    raise  # Out of memory says nothing about the files.
  except Exception as error:
    return None, _reason(error)


def _check_run(directory, found, run):
  if found != run:
    raise InputError(
      f'{directory}: written with {found}, this run has {run}; use another '
      '--workdir.'
    )


def restore(manager, step, state, run):
  """The saved state on the shardings of `state`, which it replaces.

  Raises:
    InputError: if it cannot be read, or another run wrote it.
  """
  folder = manager.directory / str(step)
  found, reason = _read_whole(folder, state)
  if reason:
    raise InputError(
      f'{folder}: cannot be read ({reason}); put a copy back, or move it away '
      'and start the same command again.'
    )
  _check_run(manager.directory, found['run']['run'], run)
  return found['state']


def restore_latest(directory, state, run, *, log=print):
  """The newest state that can be read, and its step; `state` and 0 if none.

  Newer ones that cannot be read are moved out of `directory`, beside it. Of
  several processes the first one decides which can be read.

  Args:
    directory: `checkpoints` of a stage; nothing else may write there.
    state: a TrainState with shardings, which is replaced.
    run: see `save`.
    log: called with a line for each that is skipped.

  Raises:
    InputError: if there are some and none can be read, or another run wrote
      them.
  """
  directory = paths.as_path(directory)
  found, reasons = None, {}
  if jax.process_count() == 1:
    found, step, reasons = _newest_readable(directory, state)
  else:
    decided = None
    if processes.is_first():
      _, step, reasons = _newest_readable(
        directory, _on_host(state), alone=True
      )
      decided = [step, list(reasons.items())]
    step, reasons = processes.from_first(decided)
    reasons = dict(reasons)
  if step is None and reasons:
    first, reason = next(iter(reasons.items()))
    raise InputError(
      f'{directory}: none of the checkpoints {", ".join(map(str, reasons))} '
      f'can be read ({first}: {reason}). Nothing was deleted; put a copy '
      f'back, or move {directory.parent} away to begin this stage again.'
    )
  if step is None:
    return state, 0
  if found is None:
    found, reason = _read_whole(directory / str(step), state)
    if reason:  # The first process could read it.
      raise InputError(
        f'{directory / str(step)}: process {jax.process_index()} cannot read '
        f'it ({reason}); do all processes see the same disk?'
      )
  _check_run(directory, found['run']['run'], run)
  for bad, reason in reasons.items():
    aside = _move_aside(directory / str(bad))
    log(
      f'checkpoint {bad} cannot be read ({reason}), moved to {aside}; resumes '
      f'from {step}'
    )
  return found['state'], step


def _newest_readable(directory, state, *, alone=False):
  """(what `_read` returns, its step, {newer step: why it cannot be read})."""
  reasons = {}
  for step in reversed(steps(directory)):
    folder = directory / str(step)
    found, reason = _read_whole(folder, state, alone=alone)
    if not reason:
      return found, step, reasons
    reasons[step] = reason
  return None, None, reasons


def _on_host(state):
  """Shapes of a state that are restored as NumPy arrays."""
  return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)


def _move_aside(folder):
  """Moves a checkpoint beside the others; its step will be saved again."""
  stage = folder.parent.parent
  name = f'damaged_{folder.name}'
  while (stage / name).exists():  # Nothing is ever overwritten.
    name += '_'
  processes.wait(f'moving {folder.name}')
  if processes.is_first():
    folder.rename(stage / name)
  processes.wait(f'moved {folder.name}')
  return name


def restore_parts(directory, shapes, *, step=None):
  """A part of a saved state, and its step.

  Args:
    directory: `checkpoints` of a stage.
    shapes: the part: a tree of arrays or ShapeDtypeStruct with shardings.
    step: which checkpoint; the best by default.

  Raises:
    InputError: if there is none, it is damaged, or it has no such part.
  """
  directory = paths.as_path(directory)
  if not directory.is_dir():
    raise InputError(f'{directory}: no checkpoints there.')
  with make_manager(directory, read_only=True) as manager:
    step = manager.best_step() if step is None else step
    known = manager.all_steps()
  if step is None or step not in known:
    raise InputError(
      f'{directory}: no checkpoint {"" if step is None else step}; have '
      f'{known}.'
    )
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, shapes)
  part = ocp.args.PyTreeRestore(
    shapes,
    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
    partial_restore=True,
  )
  try:
    return _read(directory / str(step), part)['state'], step
  except jax.errors.JaxRuntimeError:
    raise
  except Exception as error:
    raise InputError(
      f'{directory}: checkpoint {step} cannot be read ({_reason(error)}): it '
      'is damaged, or of another network than config.json beside it says; put '
      'a copy back or use another checkpoint.'
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
  collections = dict(variables)
  params = {'student': collections.pop('params')}
  key = 'ema' if averaged else 'params'
  shapes = {key: params, 'collections': {'student': collections}}
  found, step = restore_parts(directory, shapes, step=step)
  collections = found['collections']['student']
  return {'params': found[key]['student'], **collections}, step
