# SPDX-License-Identifier: Apache-2.0
"""A run: the stages teacher, student and distill, one after the other."""

import contextlib
import dataclasses
import errno
import functools
import json
import pathlib

import jax

from attnfd_jax.config import default_config
from attnfd_jax.config import leaves
from attnfd_jax.config import RECIPES
from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import memory
from attnfd_jax.devices import processes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import checkpoints
from attnfd_jax.runs import lock
from attnfd_jax.runs import loggers
from attnfd_jax.runs import logs
from attnfd_jax.training import finite
from attnfd_jax.training import loop
from attnfd_jax.training import results
from attnfd_jax.training.stage import load_teacher
from attnfd_jax.training.stage import make_stage
from attnfd_jax.training.stage import make_stage_distiller
from attnfd_jax.training.stage import make_student
from attnfd_jax.training.stopping import Stop
from attnfd_jax.training.task_loss import check_class_weights

# Keys that may change between the parts of an interrupted run.
HARMLESS = (
  'stages',
  'log_every_steps',
  'loggers',
  'checkpoint.every_minutes',
  'checkpoint.keep_best',
  'data.root',
  'data.prepared',
  'data.cache',
  'data.decoded_cache',
  'data.threads',
  'data.workers',
  'eval.batch_size',
  'eval.num_pictures',
  'mesh.data',
  'mesh.fsdp',
  'mesh.spatial',
  'teacher.min_miou',
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def run(config, workdir, *, stop=None):
  """All stages of `config`; finished ones are skipped. Returns the table.

  Args:
    config: as of config.default_config.
    workdir: folder of the run; ARCHITECTURE of the output is in the README.
    stop: stopping.Stop of a command that listens to signals.

  Returns:
    {stage: its result.json}.

  Raises:
    InputError: whenever the user can mend it.
    Stopped: after a signal.
  """
  config = resolve(config)
  workdir = pathlib.Path(workdir).absolute()
  dataset = load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  _check(config, dataset, mesh)
  _check_files(config, dataset, mesh, workdir)
  loggers.check(config.loggers)
  with _disk_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    one = (
      lock.locked(workdir) if processes.is_first() else contextlib.nullcontext()
    )
    with one:
      return _run(config, dataset, mesh, workdir, stop or Stop())


@contextlib.contextmanager
def _disk_errors(workdir):
  """A full disk and a forbidden folder get their remedy."""
  try:
    yield
  except OSError as error:
    if error.errno in _FULL:
      remedy = 'make room'
    elif error.errno in _FORBIDDEN:
      remedy = 'make it writable'
    else:
      raise
    raise InputError(
      f'{error.filename or workdir}: {error.strerror}; {remedy} and start the '
      'same command again. What was saved before is still there.'
    ) from error


def _run(config, dataset, mesh, workdir, stop):
  _claim(workdir / 'config.json', config)
  sizes = ', '.join(f'{k} {len(v)}' for k, v in dataset.splits.items())
  print(
    f'{dataset.name}: {dataset.num_classes} classes, {sizes} images; '
    f'{logs.device_name()}; writing to {workdir.name}/',
    flush=True,
  )
  table = {}
  for name in config.stages:
    if name == 'teacher' and config.teacher.checkpoint:
      print(f'[teacher] given: {config.teacher.checkpoint}', flush=True)
      continue
    table[name] = _run_stage(name, config, dataset, mesh, workdir, stop)
    path = workdir / 'results.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    logs.write_json(path, known | table)
  return table


def _check(config, dataset, mesh):
  """What is wrong with a later stage is wrong before the first one."""
  parts = mesh.shape['data']
  if config.batch_size % (parts * config.optim.accumulate):
    raise InputError(
      f'config.batch_size={config.batch_size} must be a multiple of the '
      f'{parts} devices times optim.accumulate={config.optim.accumulate}.'
    )
  wanted = {'train', 'val', config.eval.test_split} - {''}
  missing = [
    split for split in wanted if not len(dataset.splits.get(split, ()))
  ]
  if missing:
    raise InputError(
      f'{dataset.name} has no images in {", ".join(sorted(missing))}; have '
      f'{", ".join(dataset.splits)}.'
    )
  check_class_weights(config.loss, dataset.class_names)
  teacher = networks.make_network(config.teacher, dataset.num_classes)
  student = make_student(config, dataset.num_classes, distilled=True)
  if 'distill' in config.stages:
    make_stage_distiller(config, student, teacher)


def _check_files(config, dataset, mesh, workdir):
  """What stages that have not begun will read can be read."""
  begun = [name for name in config.stages if (workdir / name).exists()]
  for name in {*config.stages} - {*begun}:
    role = 'teacher' if name == 'teacher' else 'student'
    given = role == 'teacher' and config.teacher.checkpoint
    if config[role].pretrained and not given:
      network = networks.make_network(config[role], dataset.num_classes)
      torch_models.load_pretrained(config[role].pretrained, network)
    if name == 'distill' and config.teacher.checkpoint:
      load_teacher(config, workdir, dataset, mesh)
  if 'distill' in config.stages and not config.teacher.checkpoint:
    _check_own_teacher(config, workdir)


def _check_own_teacher(config, workdir):
  """The teacher that this run has, or will have, for distillation."""
  folder = workdir / 'teacher'
  finished = (folder / 'result.json').exists()
  trains = 'teacher' in config.stages and not finished
  if trains or (workdir / 'distill' / 'result.json').exists():
    return
  missing = [
    name
    for name in ('config.json', 'checkpoints')
    if not (folder / name).exists()
  ]
  if missing:
    again = 'add teacher to --config.stages'
    if 'teacher' in config.stages:
      again = 'move the rest of it away to train it again'
    raise InputError(
      f'{folder}: no {" and no ".join(missing)} there, and distilling needs '
      f'the teacher; put them back, {again}, or name another by '
      '--config.teacher.checkpoint.'
    )


def _known(path):
  """A stored config, with the defaults of keys that are younger than it."""
  try:
    stored = dict(leaves(json.loads(path.read_text())))
  except (ValueError, AttributeError):
    raise InputError(
      f'{path}: damaged; put a copy back, or move it away to go on with the '
      'config of this command.'
    ) from None
  defaults = json.loads(default_config().to_json_best_effort())
  recipe = RECIPES.get(stored.get('recipe'), {})
  return dict(leaves(defaults)) | recipe | stored


def _claim(path, config):
  """Writes the config, or refuses a folder that was begun with another."""
  ours = json.loads(config.to_json_best_effort())
  if path.exists():
    theirs, new = _known(path), dict(leaves(ours))
    changed = [
      f'{key}: {theirs.get(key)} -> {new.get(key)}'
      for key in sorted(theirs.keys() | new.keys())
      if theirs.get(key) != new.get(key) and key not in HARMLESS
    ]
    if changed:
      raise InputError(
        f'{path.parent} was begun with another config ({"; ".join(changed)}). '
        'Use another --workdir, or the old values.'
      )
  logs.write_json(path, ours)


def _score_teacher(stage, log, *, resumed):
  """The stage with its teacher's mIoU on val; bad teachers stop here."""
  teacher = stage.teacher
  if resumed:
    score = log.last('teacher', 'miou', default=teacher.miou)
  elif teacher.miou is not None and not stage.config.teacher.checkpoint:
    score = teacher.miou  # Of this run: the same images, the same protocol.
  else:
    scores = stage.evaluate(teacher.variables, network=teacher.network)
    log.metrics('teacher', 0, scores)
    score = scores['miou']
  if score is not None:
    log.line(f'teacher val mIoU {100 * score:.2f}')
  floor = stage.config.teacher.min_miou
  if not resumed and floor > 0 and not (score is not None and score >= floor):
    known = 'unknown' if score is None else f'{score:.4f}'
    raise InputError(
      f'{stage.config.teacher.checkpoint or "teacher"}: val mIoU {known} is '
      f'below config.teacher.min_miou={floor:g}; use a better teacher or lower '
      'the floor.'
    )
  return dataclasses.replace(
    stage, teacher=dataclasses.replace(teacher, miou=score)
  )


def _train(stage, state, manager, run_facts, log, stop):
  config = stage.config
  devices = stage.mesh.shape['data']

  def evaluate(variables):
    with memory.explained(config.eval.batch_size, devices=devices):
      return stage.evaluate(variables)

  with memory.explained(
    config.batch_size, devices=devices, accumulate=config.optim.accumulate
  ):
    return loop.train(
      state,
      train_step=stage.make_train_step(),
      teacher_variables=stage.teacher.variables if stage.teacher else {},
      make_batches=stage.make_batches,
      batch_names=functools.partial(
        finite.configured_names, config, stage.dataset
      ),
      evaluate=evaluate,
      manager=manager,
      run=run_facts,
      log=log,
      rng=sharding.place(
        jax.random.key(config.seed), sharding.replicated(stage.mesh)
      ),
      num_steps=stage.num_steps,
      eval_every=stage.eval_every,
      log_every=config.log_every_steps,
      save_minutes=config.checkpoint.every_minutes,
      batch_size=config.batch_size,
      stop=stop,
    )


def _run_stage(name, config, dataset, mesh, workdir, stop):
  directory = workdir / name
  finished = directory / 'result.json'
  if finished.exists():
    print(f'[{name}] already finished, skipped', flush=True)
    return json.loads(finished.read_text())
  directory.mkdir(exist_ok=True)
  stage = make_stage(name, config, dataset, mesh, workdir)
  logs.write_json(directory / 'config.json', stage.description())
  logs.write_json(directory / 'environment.json', logs.environment())
  run_facts = {
    'seed': config.seed,
    'batch_size': config.batch_size,
    'records': len(dataset.splits['train']),
  }
  log = logs.StageLog(directory)
  log.line(
    f'{networks.describe(stage.options)}, {stage.num_steps} steps of '
    f'{config.batch_size} images; preparing the network ...'
  )
  saved = directory / 'checkpoints'
  state = stage.init_state(fresh=not checkpoints.steps(saved), log=log.line)
  state, latest = checkpoints.restore_latest(
    saved, state, run_facts, log=log.line
  )
  log.forget_after(latest)
  if latest:
    log.line(f'goes on at step {latest}')
  facts = stage.description()
  told = loggers.opened(config.loggers, directory, facts=facts, say=log.line)
  with told as each:
    log.tell(each)
    if stage.teacher:
      attention = results.attention_of(stage.distiller)
      log.line(f'teacher {stage.teacher.name}, attention {attention}')
      stage = _score_teacher(stage, log, resumed=latest > 0)
    keep_best = config.checkpoint.keep_best
    with checkpoints.managed(saved, keep_best=keep_best) as manager:
      state = _train(stage, state, manager, run_facts, log, stop)
      best = manager.best_step()
      log.line(f'scoring the best checkpoint, step {best}')
      state = checkpoints.restore(manager, best, state, run_facts)
  result = results.write(stage, state, directory, step=best)
  scores = f'val mIoU {100 * result["miou"]:.2f}'
  if 'test' in result:
    scores += f', test mIoU {100 * result["test"]["miou"]:.2f}'
  log.line(f'finished: {scores}')
  # The next stage reads what the first process wrote.
  processes.wait(f'{name} finished')
  return result
