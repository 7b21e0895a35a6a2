# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a stage: the last two and the best by mIoU.

Each contains checksums of its arrays: Orbax does not notice a flipped bit.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import operator
from typing import Any
import zlib

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.devices import sharding as shardings
from attnfd_jax.errors import InputError
from attnfd_jax.runs.logs import reason
from attnfd_jax.types import PyTree, StrPath


def steps(directory: epath.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, in ascending order."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def _scores(directory: epath.Path) -> dict[int, float]:
  """The mIoU by step of the checkpoints that were evaluated."""
  scores = {}
  for step in steps(directory):
    path = directory / str(step) / 'metrics' / 'metrics'
    try:
      if path.exists():
        scores[step] = float(json.loads(path.read_text())['miou'])
    except (ValueError, KeyError, TypeError):
      raise InputError(
        f'{path}: damaged; restore a copy, or move the folder {step} away to '
        'resume without this checkpoint.'
      ) from None
  return scores


@contextlib.contextmanager
def managed(
  directory: StrPath, *, keep_best: int = 1
) -> Iterator[ocp.CheckpointManager]:
  """Opens a CheckpointManager; at exit all checkpoints are complete.

  It keeps the last two checkpoints, in case the last one cannot be read.

  Args:
    directory: folder of the checkpoints.
    keep_best: number of checkpoints with the best mIoU to keep.

  Raises:
    InputError: if a checkpoint cannot be saved, or an mIoU cannot be read.
  """
  directory = paths.as_path(directory)
  _scores(directory)  # Its error is clearer than that of Orbax.
  policies, miou = ocp.checkpoint_managers, operator.itemgetter('miou')
  best = policies.BestN(
    get_metric_fn=miou, n=keep_best, keep_checkpoints_without_metrics=False
  )
  kept = policies.AnyPreservationPolicy([policies.LatestN(2), best])
  options = ocp.CheckpointManagerOptions(
    save_decision_policy=policies.FixedIntervalPolicy(1),
    preservation_policy=kept,
    best_fn=miou,  # Or the best checkpoint would be unknown after a restart.
    cleanup_tmp_directories=True,  # Incomplete ones of a killed process.
  )
  with _saving(directory):
    manager = ocp.CheckpointManager(directory, options=options)
  try:
    yield manager
  except BaseException:
    # Reports the first error, not those of closing.
    with contextlib.suppress(Exception):
      manager.close()
    raise
  with _saving(directory):
    manager.close()


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: PyTree,
  run: dict[str, Any],
  *,
  miou: float | None = None,
) -> None:
  """Saves a state in the background; replaces a checkpoint of the same step.

  Args:
    manager: from `managed`.
    step: number of updates applied so far.
    state: a pytree of arrays.
    run: what a resumed run must find unchanged, such as seed and batch size.
    miou: score of the state; without it, it is never the best checkpoint.

  Raises:
    InputError: if it, or the checkpoint before it, cannot be saved.
  """
  facts = ocp.args.JsonSave({'run': run, 'checksums': _checksums(state)})
  args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=facts)
  # JSON has no NumPy or JAX scalars.
  metrics = None if miou is None else {'miou': float(miou)}
  with _saving(manager.directory):
    if step in manager.all_steps():
      manager.wait_until_finished()
      manager.delete(step)
    if not manager.directory.is_dir():
      raise InputError(
        f'{manager.directory}: the folder is gone, and step {step} was not '
        'saved; restore it, or start the same command again for a new stage.'
      )
    manager.save(step, args=args, metrics=metrics)


def wait(manager: ocp.CheckpointManager) -> None:
  """Waits until all checkpoints are saved; InputError if one cannot be."""
  with _saving(manager.directory):
    manager.wait_until_finished()


@contextlib.contextmanager
def _saving(directory: StrPath) -> Iterator[None]:
  """Turns errors of saving into an InputError."""
  try:
    yield
  # A training step that failed on the device may be reported here first.
  except (InputError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise InputError(
      f'{directory}: cannot save ({reason(error)}); make room, or make it '
      'writable, and start the same command again. Earlier checkpoints remain.'
    ) from error


def _checksums(tree: PyTree) -> dict[str, int]:
  """CRC-32 of the arrays of a tree by path; all processes must call this."""

  def checksum(x):
    x = np.ascontiguousarray(shardings.to_host(x))
    return zlib.crc32(x.reshape(-1).view(np.uint8).data)

  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): checksum(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _read(
  folder: epath.Path,
  shapes: PyTree,
  *,
  partial: bool = False,
  alone: bool = False,
) -> tuple[PyTree, dict[str, Any]]:
  """Reads the state of a checkpoint, and the argument `run` of `save`.

  Args:
    folder: of the checkpoint.
    shapes: what to read, see `restore`.
    partial: whether the checkpoint may contain more arrays.
    alone: whether process 0 reads alone, without the others taking part.

  Raises:
    InputError: with the reason only, without the checkpoint.
  """
  options: dict[str, Any] = {}
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
      restored = checkpointer.restore(folder, args=args)
    expected = restored['run']['checksums']
    for path, value in _checksums(restored['state']).items():
      if expected.get(path) != value:
        raise ValueError(f'{path} is damaged')
    return restored['state'], restored['run']['run']
  except jax.errors.JaxRuntimeError:
    raise  # Out of memory: the files may be fine.
  except Exception as error:
    raise InputError(reason(error)) from error


def restore_latest(
  directory: StrPath,
  state: PyTree,
  run: dict[str, Any],
  *,
  log: Callable[[str], Any] = print,
) -> tuple[PyTree, int]:
  """Restores the newest readable checkpoint; returns the state and its step.

  Newer checkpoints that cannot be read are moved next to `directory`, with a
  line to `log`. No other process may write there. With several processes, the
  first one decides which checkpoints can be read.

  Args:
    directory: folder of the checkpoints.
    state: defines shapes and shardings; it is returned, with step 0, if there
      are no checkpoints.
    run: see `save`.
    log: gets lines for the user.

  Raises:
    InputError: if there are checkpoints, but none can be read, or another run
      wrote them.
  """
  directory = paths.as_path(directory)
  alone, target = jax.process_count() > 1, state
  if alone:  # One process has only its part of a sharded array.
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
  restored, step, skipped = None, None, []
  for saved in reversed(steps(directory) if processes.is_first() else []):
    try:
      restored, step = _read(directory / str(saved), target, alone=alone), saved
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
      f'{why}). Nothing was deleted; restore a copy, or move '
      f'{directory.parent} away to train this stage again.'
    )
  folder = directory / str(step)
  try:
    if alone or restored is None:
      restored = _read(folder, state)
    restored_state, saved_run = restored
  except InputError as error:  # The first process could read it.
    raise InputError(
      f'{folder}: process {jax.process_index()} cannot read it ({error}); do '
      'all processes see the same disk?'
    ) from error
  if saved_run != run:
    changed = ', '.join(
      f'{key} {saved_run.get(key)}, now {run.get(key)}'
      for key in (saved_run | run)
      if saved_run.get(key) != run.get(key)
    )
    raise InputError(
      f'{directory}: written with {changed}; restore the old values, or use '
      'another --workdir.'
    )
  for bad, why in skipped:
    aside = _move_aside(directory / str(bad))
    line = f'checkpoint {bad} cannot be read ({why}), moved to {aside}'
    log(f'{line}; resuming from step {step}')
  return restored_state, step


def _move_aside(folder: epath.Path) -> str:
  """Moves a checkpoint out of its folder; its step will be saved again."""
  aside = folder.parent.parent / f'damaged_{folder.name}'
  while aside.exists():  # Nothing is ever overwritten.
    aside = aside.with_name(f'{aside.name}_')
  processes.wait(f'moving {folder.name}')
  if processes.is_first():
    folder.rename(aside)
  processes.wait(f'moved {folder.name}')
  return aside.name


def restore(
  directory: StrPath, shapes: PyTree, *, step: int | None = None
) -> tuple[PyTree, int]:
  """Restores a state, or a part of it; returns it and its step.

  Args:
    directory: folder of the checkpoints.
    shapes: a pytree of arrays, or ShapeDtypeStructs with shardings.
    step: which checkpoint; the best by default.

  Raises:
    InputError: if there is no such checkpoint, it is damaged, or it lacks some
      of the arrays.
  """
  directory = paths.as_path(directory)
  available = steps(directory)
  if step is None and (scores := _scores(directory)):
    # Of equal scores the last, as in Orbax.
    step = sorted(scores, key=lambda step: scores[step])[-1]
  if step not in available:
    missing = 'evaluated checkpoint' if step is None else f'checkpoint {step}'
    raise InputError(f'{directory}: no {missing}; have {available}.')
  try:
    return _read(directory / str(step), shapes, partial=True)[0], step
  except InputError as error:
    raise InputError(
      f'{directory}: checkpoint {step} cannot be read ({error}): it is '
      'damaged, or does not match config.json; restore a copy, or move it away.'
    ) from error
