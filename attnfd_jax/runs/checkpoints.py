# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a stage: the last two and the best by mIoU.

Each holds checksums of its arrays: Orbax reads over a flipped bit without a
word.
"""

import contextlib
import json
import operator
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.devices import sharding as shardings
from attnfd_jax.errors import InputError
from attnfd_jax.runs.logs import reason


def steps(directory):
  """Steps of the finished checkpoints in `directory`, in order."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def _scores(directory):
  """{step: mIoU} of the checkpoints that were evaluated."""
  scores = {}
  for step in steps(directory):
    path = directory / str(step) / 'metrics' / 'metrics'
    try:
      if path.exists():
        scores[step] = float(json.loads(path.read_text())['miou'])
    except (ValueError, KeyError, TypeError):
      raise InputError(
        f'{path}: damaged; put a copy back, or move the folder {step} away to '
        'resume without this checkpoint.'
      ) from None
  return scores


@contextlib.contextmanager
def managed(directory, *, keep_best=1):
  """A CheckpointManager; what it saves is complete at exit.

  Two are kept for the case that the last one cannot be read. InputError if
  something cannot be saved, or an mIoU not read.
  """
  directory = paths.as_path(directory)
  _scores(directory)  # Orbax says less about what it cannot read.
  policies, miou = ocp.checkpoint_managers, operator.itemgetter('miou')
  best = policies.BestN(
    get_metric_fn=miou, n=keep_best, keep_checkpoints_without_metrics=False
  )
  kept = policies.AnyPreservationPolicy([policies.LatestN(2), best])
  options = ocp.CheckpointManagerOptions(
    save_decision_policy=policies.FixedIntervalPolicy(1),
    preservation_policy=kept,
    best_fn=miou,  # Without it the best one is forgotten at a restart.
    cleanup_tmp_directories=True,  # What a killed process had half written.
  )
  with _saving(directory):
    manager = ocp.CheckpointManager(directory, options=options)
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
  """Saves a state in the background; one of the same step is replaced.

  `run` is what the data order depends on: seed, batch, records. Without `miou`
  it is never the best. InputError also if the one before it was not saved.
  """
  facts = ocp.args.JsonSave({'run': run, 'checksums': _checksums(state)})
  args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=facts)
  # Scalars of NumPy and jax are not JSON.
  metrics = None if miou is None else {'miou': float(miou)}
  with _saving(manager.directory):
    if step in manager.all_steps():
      manager.wait_until_finished()
      manager.delete(step)
    if not manager.directory.is_dir():
      raise InputError(
        f'{manager.directory}: the folder is gone, and step {step} not saved; '
        'put it back, or start the same command again for a new stage.'
      )
    manager.save(step, args=args, metrics=metrics)


def wait(manager):
  """Returns when everything is saved; InputError if something could not be."""
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
      f'{directory}: cannot save ({reason(error)}); make room, or make it '
      'writable, and start the same command again. Older ones are still there.'
    ) from error


def _checksums(tree):
  """{path: CRC-32} of the arrays of a tree; all processes call this."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): zlib.crc32(
      np.ascontiguousarray(shardings.to_host(leaf)).reshape(-1).view(np.uint8)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _read(folder, shapes, *, partial=False, alone=False):
  """The arrays `shapes` of a checkpoint, and what `save` got as `run`.

  With `partial` it may hold more. With `alone` the first process reads, and
  others do not take part. The InputError only says why it cannot be read.
  """
  options = {}
  if alone:
    options['multiprocessing_options'] = ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix='first'
    )
  composite = ocp.CompositeOptions(**options)
  handler = ocp.CompositeCheckpointHandler(composite_options=composite)
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, shapes)
  arrays = ocp.args.PyTreeRestore(
    shapes,
    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
    partial_restore=partial,
  )
  args = ocp.args.Composite(state=arrays, run=ocp.args.JsonRestore())
  try:
    with ocp.Checkpointer(handler, **options) as checkpointer:
      found = checkpointer.restore(folder, args=args)
    expected = found['run']['checksums']
    for path, value in _checksums(found['state']).items():
      if expected.get(path) != value:
        raise ValueError(f'{path} is damaged')
    return found['state'], found['run']['run']
  except jax.errors.JaxRuntimeError:
    raise  # Out of memory says nothing about the files.
  except Exception as error:
    raise InputError(reason(error)) from error


def restore_latest(directory, state, run, *, log=print):
  """The newest state that can be read, and its step; `state` and 0 if none.

  Newer ones that cannot be read are moved out of `directory`, beside it, with a
  line to `log`; nothing else may write there. Of several processes the first
  one decides which can be read. `state` has the shardings; `run`: see `save`.
  InputError if there are some and none can be read, or another run wrote them.
  """
  directory = paths.as_path(directory)
  alone, target = jax.process_count() > 1, state
  if alone:  # The arrays are not on the devices of one process.
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
  found, step, skipped = None, None, []
  for saved in reversed(steps(directory) if processes.is_first() else []):
    try:
      found, step = _read(directory / str(saved), target, alone=alone), saved
      break
    except InputError as error:
      skipped.append((saved, str(error)))
  step, skipped = processes.from_first((step, skipped))
  if step is None:
    if not skipped:
      return state, 0
    newest, why = skipped[0]
    raise InputError(
      f'{directory}: none of the checkpoints '
      f'{", ".join(str(bad) for bad, _ in skipped)} can be read ({newest}: '
      f'{why}). Nothing was deleted; put a copy back, or move '
      f'{directory.parent} away to begin this stage again.'
    )
  folder = directory / str(step)
  try:
    found, of_run = _read(folder, state) if alone else found
  except InputError as error:  # The first process could read it.
    raise InputError(
      f'{folder}: process {jax.process_index()} cannot read it ({error}); do '
      'all processes see the same disk?'
    ) from error
  if of_run != run:
    changed = ', '.join(
      f'{key} {of_run.get(key)}, now {run.get(key)}'
      for key in (of_run | run)
      if of_run.get(key) != run.get(key)
    )
    raise InputError(
      f'{directory}: written with {changed}; put back what it was, or use '
      'another --workdir.'
    )
  for bad, why in skipped:
    aside = _move_aside(directory / str(bad))
    line = f'checkpoint {bad} cannot be read ({why}), moved to {aside}'
    log(f'{line}; resumes from {step}')
  return found, step


def _move_aside(folder):
  """Moves a checkpoint beside the others; its step will be saved again."""
  aside = folder.parent.parent / f'damaged_{folder.name}'
  while aside.exists():  # Nothing is ever overwritten.
    aside = aside.with_name(f'{aside.name}_')
  processes.wait(f'moving {folder.name}')
  if processes.is_first():
    folder.rename(aside)
  processes.wait(f'moved {folder.name}')
  return aside.name


def restore(directory, shapes, *, step=None):
  """A saved state, or a part of it, of the best or another step; and the step.

  `shapes` is a tree of arrays or ShapeDtypeStruct with shardings. InputError if
  there is no checkpoint, it is damaged, or it has no such part.
  """
  directory = paths.as_path(directory)
  known = steps(directory)
  if step is None and (scores := _scores(directory)):
    step = sorted(scores, key=scores.get)[-1]  # As Orbax: the last of equals.
  if step not in known:
    wanted = 'evaluated checkpoint' if step is None else f'checkpoint {step}'
    raise InputError(f'{directory}: no {wanted}; have {known}.')
  try:
    return _read(directory / str(step), shapes, partial=True)[0], step
  except InputError as error:
    raise InputError(
      f'{directory}: checkpoint {step} cannot be read ({error}): damaged, or '
      'not of what config.json says; put a copy back, or move it away.'
    ) from error
