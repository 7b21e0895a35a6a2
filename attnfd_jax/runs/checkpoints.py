# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a stage: the last two and the best by mIoU.

Each holds a list of its files with their checksums, so that a damaged one is
known before it is read: Orbax reads over a flipped bit without a word.
"""

import contextlib
import json
import operator
import os
import pathlib
import re
import zlib

import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from attnfd_jax.errors import InputError

_FILES = 'files.json'  # Of a checkpoint: {path: [bytes, crc32]}.


def steps(directory):
  """Steps of the finished checkpoints in `directory`, in order."""
  directory = pathlib.Path(directory)
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
  directory = pathlib.Path(directory).absolute()
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
    async_options=ocp.AsyncOptions(
      post_finalization_callback=lambda: _seal(directory)
    ),
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
    # The first failure is the one to tell.
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
  args = ocp.args.Composite(
    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
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
  text = str(error).strip() or type(error).__name__
  system = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(system[1])) if system else text.splitlines()[0][:160]


def _seal(directory):
  """Lists the files of the checkpoints that are not listed yet.

  Called when the files are complete and their folder has no name yet.
  """
  if jax.process_index():
    return
  for folder in directory.iterdir():
    path = folder / _FILES
    if '.' in folder.name and folder.is_dir() and not path.exists():
      items = sorted(p for p in folder.glob('*/**/*') if p.is_file())
      files = {
        str(p.relative_to(folder)): [p.stat().st_size, _crc(p)] for p in items
      }
      path.write_text(json.dumps(files))


def _crc(path):
  found = 0
  with path.open('rb') as file:
    while data := file.read(1 << 22):
      found = zlib.crc32(data, found)
  return found


def _damage(folder):
  """What is wrong with the files of a checkpoint, or ''."""
  try:
    files = json.loads((folder / _FILES).read_text())
  except FileNotFoundError:
    return ''  # Of an older version: Orbax will see.
  except ValueError:
    return f'{_FILES} is damaged'
  for name, (size, crc) in files.items():
    path = folder / name
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes of {size}'
    if _crc(path) != crc:
      return f'{name} is damaged'
  return ''


def _check_metrics(folder):
  path = folder / 'metrics' / 'metrics'
  try:
    if path.exists():
      float(json.loads(path.read_text())['miou'])
  except (ValueError, KeyError, TypeError):
    raise InputError(
      f'{path}: damaged; put a copy back, or move the folder {folder.name} '
      'away to go on without this checkpoint.'
    ) from None


def _read(folder, args):
  handler = ocp.CompositeCheckpointHandler()
  with ocp.Checkpointer(handler) as checkpointer:
    return checkpointer.restore(folder, args=args)


def _read_state(folder, state):
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  return _read(
    folder,
    ocp.args.Composite(
      state=ocp.args.StandardRestore(shapes), run=ocp.args.JsonRestore()
    ),
  )


def _try_state(folder, state):
  """What `_read_state` gives and '', or None and why it cannot be read."""
  reason = _damage(folder)
  if reason:
    return None, reason
  try:
    return _read_state(folder, state), ''
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
  folder = pathlib.Path(manager.directory) / str(step)
  found, reason = _try_state(folder, state)
  if reason:
    raise InputError(
      f'{folder}: cannot be read ({reason}); put a copy back, or move it away '
      'and start the same command again.'
    )
  _check_run(manager.directory, found['run'], run)
  return found['state']


def restore_latest(directory, state, run, *, log=print):
  """The newest state that can be read, and its step; `state` and 0 if none.

  Newer ones that cannot be read are moved out of `directory`, beside it.

  Args:
    directory: `checkpoints` of a stage; nothing else may write there.
    state: a TrainState with shardings, which is replaced.
    run: see `save`.
    log: called with a line for each that is skipped.

  Raises:
    InputError: if there are some and none can be read, or another run wrote
      them.
  """
  directory = pathlib.Path(directory).absolute()
  reasons, found = {}, None
  for step in reversed(steps(directory)):
    folder = directory / str(step)
    found, reason = _try_state(folder, state)
    if not reason:
      break
    reasons[step] = reason
  if found is None:
    if reasons:
      step, reason = next(iter(reasons.items()))
      raise InputError(
        f'{directory}: none of the checkpoints {", ".join(map(str, reasons))} '
        f'can be read ({step}: {reason}). Nothing was deleted; put a copy '
        f'back, or move {directory.parent} away to begin this stage again.'
      )
    return state, 0
  _check_run(directory, found['run'], run)
  for bad, reason in reasons.items():
    aside = _move_aside(directory / str(bad))
    log(
      f'checkpoint {bad} cannot be read ({reason}), moved to {aside}; goes on '
      f'from {step}'
    )
  return found['state'], step


def _move_aside(folder):
  """Moves a checkpoint beside the others; its step will be saved again."""
  stage = folder.parent.parent
  name = f'damaged_{folder.name}'
  while (stage / name).exists():  # Nothing is ever overwritten.
    name += '_'
  if jax.process_index() == 0:
    folder.rename(stage / name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'moved {folder.name}')
  return name


def restore_parts(directory, wanted, *, step=None):
  """A part of a saved state, and its step.

  Args:
    directory: `checkpoints` of a stage.
    wanted: the part: a tree of arrays or ShapeDtypeStruct with shardings.
    step: which checkpoint; the best by default.

  Raises:
    InputError: if there is none, it is damaged, or it has no such part.
  """
  directory = pathlib.Path(directory).absolute()
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
  folder = directory / str(step)
  reason = _damage(folder)
  if reason:
    raise InputError(
      f'{folder}: {reason}; put a copy back or use another checkpoint.'
    )
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
  part = ocp.args.PyTreeRestore(
    wanted, restore_args=restore_args, partial_restore=True
  )
  try:
    return _read(folder, ocp.args.Composite(state=part))['state'], step
  except ValueError as error:
    raise InputError(
      f'{directory}: checkpoint {step} is of another network than '
      f'config.json beside it says ({_reason(error)}).'
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
