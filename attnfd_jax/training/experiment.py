# SPDX-License-Identifier: Apache-2.0
"""A run: the stages teacher, student and distill, one after the other."""

import contextlib
import dataclasses
import errno
import functools
import json
import math

import jax

from attnfd_jax import distill, paths, user_code
from attnfd_jax.config import leaves, resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import memory, processes, sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.reporting.page import write_report
from attnfd_jax.runs import checkpoints, lock, loggers, logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.training import finite, loop, results, task_loss
from attnfd_jax.training.stage import (
  make_stage,
  make_student,
  Stage,
  with_teacher,
)
from attnfd_jax.training.stopping import Stop

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
  'teacher.allow_code',
  'teacher.min_miou',
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def train(config, workdir, *, stop=None):
  """Trains what is missing in a run, and writes its report.

  What `python -m attnfd_jax.main` does; finished stages are skipped.

  Args:
    config: as of config.default_config.
    workdir: folder of the run, or an address such as gs://bucket/run.
    stop: stopping.Stop of a command that listens to signals.

  Returns:
    {stage: its result.json}.

  Raises:
    InputError: whenever the user can fix it.
    Stopped: after a signal.
  """
  workdir = paths.as_path(workdir)
  results = run_stages(config, workdir, stop=stop or Stop())
  if processes.is_first():
    write_report([workdir], workdir / 'report.html')
  return results


def summary_lines(results):
  """A line for each stage, with its scores."""
  for name, result in results.items():
    line = f'{name:8} {result["network"]:20} val mIoU'
    line += f' {_percent(result["miou"]):>6}'
    if result.get('test'):
      line += f'   test mIoU {_percent(result["test"]["miou"]):>6}'
    yield line


def run_stages(config, workdir, *, stop):
  """The stages of `train`, without its report."""
  config = resolve(config)
  dataset = load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  check(config, dataset, mesh, workdir)
  loggers.check(config.loggers)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_disk_errors(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    if processes.is_first():
      stack.enter_context(lock.locked(workdir))
    _claim(workdir / 'config.json', config)
    sizes = ', '.join(f'{k} {len(v)}' for k, v in dataset.splits.items())
    print(
      f'{dataset.name}: {dataset.num_classes} classes, {sizes} images; '
      f'{logs.device_name()}; writing to {workdir.name}/',
      flush=True,
    )
    table = {}
    for name in config.stages:
      given = config.teacher.factory or config.teacher.checkpoint
      if name == 'teacher' and given:
        print(f'[teacher] given: {given}', flush=True)
        continue
      table[name] = _run_stage(name, config, dataset, mesh, workdir, stop)
      path = workdir / 'results.json'
      known = json.loads(path.read_text()) if path.exists() else {}
      logs.write_json(path, known | table)
    return table


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


def check(config, dataset, mesh, workdir):
  """Refuses what is wrong with any stage before the first one begins.

  Args:
    config: resolved.
    dataset, mesh: what it trains on.
    workdir: of the run, a Path; nothing is written.

  Raises:
    InputError: names the key, or the file, and what is possible.
  """
  parts = mesh.shape['data']
  if config.batch_size % (parts * config.optim.accumulate):
    raise InputError(
      f'config.batch_size={config.batch_size} must be a multiple of the '
      f'{parts} devices times optim.accumulate={config.optim.accumulate}.'
    )
  required = {'train', 'val', config.eval.test_split} - {''}
  missing = [
    split for split in required if not len(dataset.splits.get(split, ()))
  ]
  if missing:
    raise InputError(
      f'{dataset.name} has no images in {", ".join(sorted(missing))}; have '
      f'{", ".join(dataset.splits)}.'
    )
  task_loss.check_class_weights(config.loss, dataset.class_names)
  task_loss.make_task_loss(config.loss)
  known = [name for name in distill.METHODS if name in config.distill]
  distill.make_distiller('+'.join(known), config.distill)  # Chosen or not.
  for role in ('teacher', 'student'):
    network = _checked_network(role, config, dataset)
    _ = Stage(role, config, dataset, mesh, network).tx  # Checks its values.
  student = make_student(config, dataset.num_classes, distilled=True)
  given = config.teacher.checkpoint or config.teacher.factory
  if 'distill' in config.stages and not given:
    stage = Stage('distill', config, dataset, mesh, student)
    teacher = teachers.abstract(config, dataset.class_names)
    _ = with_teacher(stage, teacher).tx
  _check_files(config, dataset, mesh, workdir)


def _checked_network(role, config, dataset):
  """Of a group of the config; errors name the group."""
  options, dtype = config[role], config.optim.dtype
  try:
    network = networks.make_network(options, dataset.num_classes, dtype=dtype)
  except InputError as error:
    raise InputError(f'config.{role}.{error}') from error
  if user_code.is_code(options.network):
    size = tuple(config.data.crop_size)
    networks.check_outputs(network, dataset.num_classes, size)
  return network


def _check_files(config, dataset, mesh, workdir):
  """What stages that have not begun will read can be read."""
  given = config.teacher.checkpoint or config.teacher.factory
  for name in config.stages:
    if (workdir / name).exists():
      continue
    role = 'teacher' if name == 'teacher' else 'student'
    pretrained = config[role].pretrained
    if pretrained and not (role == 'teacher' and given):
      network = networks.make_network(config[role], dataset.num_classes)
      torch_networks.load_pretrained(pretrained, network)
    if name == 'distill' and given:
      network = make_student(config, dataset.num_classes, distilled=True)
      stage = with_teacher(
        Stage('distill', config, dataset, mesh, network),
        teachers.from_config(config, workdir, dataset.class_names, mesh),
      )
      _ = stage.tx
  if 'distill' in config.stages and not given:
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


def _stored(path):
  """{key: value} of a stored config."""
  try:
    return dict(leaves(json.loads(path.read_text())))
  except (ValueError, AttributeError):
    raise InputError(
      f'{path}: damaged; put a copy back, or move it away to resume with the '
      'config of this command.'
    ) from None


def _claim(path, config):
  """Writes the config, or refuses a folder that was begun with another."""
  ours = json.loads(config.to_json_best_effort())
  if path.exists():
    theirs, new = _stored(path), dict(leaves(ours))
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


def _run_stage(name, config, dataset, mesh, workdir, stop):
  """Trains a stage from wherever it is, scores it, and returns its result."""
  directory = workdir / name
  finished = directory / 'result.json'
  if finished.exists():
    print(f'[{name}] already finished, skipped', flush=True)
    return json.loads(finished.read_text())
  directory.mkdir(exist_ok=True)
  stage = make_stage(name, config, dataset, mesh, workdir)
  _describe(stage, directory)
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
  processes.wait('the log is whole')
  if latest:
    log.line(f'resumed from step {latest}')
  with loggers.attached(config.loggers, log, stage.description()):
    if stage.teacher is not None:
      stage = _with_scored_teacher(stage, log, resumed=latest > 0)
    keep_best = config.checkpoint.keep_best
    with checkpoints.managed(saved, keep_best=keep_best) as manager:
      state = _train(stage, state, manager, run_facts, log, stop)
      best = manager.best_step()
      log.line(f'scoring the best checkpoint, step {best}')
      state, _ = checkpoints.restore(saved, state, step=best)
  result = results.write(stage, state, directory, step=best, log=log)
  scores = f'val mIoU {_percent(result["miou"])}'
  if 'test' in result:
    scores += f', test mIoU {_percent(result["test"]["miou"])}'
  log.line(f'finished: {scores}')
  log.upload()
  # The next stage reads what the first process wrote.
  processes.wait(f'{name} finished')
  return result


def _percent(miou):
  unknown = miou is None or math.isnan(miou)
  return 'unknown' if unknown else f'{100 * miou:.2f}'


def _describe(stage, directory):
  """Writes config.json and environment.json, and keeps the user's code."""
  path, stored, kept = directory / 'config.json', {}, {}
  # The stages of a run use the same files: else they could not be compared.
  for other in directory.parent.glob('*/config.json'):
    with contextlib.suppress(ValueError, AttributeError):
      stored |= json.loads(other.read_text()).get('code', {})
  if user_code.specs(stage.config) and processes.is_first():
    kept = {'code': user_code.store(directory, stage.config, stored)}
  logs.write_json(path, stage.description() | kept)
  logs.write_json(directory / 'environment.json', logs.environment())


def _with_scored_teacher(stage, log, *, resumed):
  """The stage with its teacher's mIoU on val; bad teachers stop here."""
  teacher = stage.teacher
  known = getattr(teacher, 'miou', None)
  options = stage.config.teacher
  given = options.checkpoint or options.factory
  log.line(f'teacher {teacher.name}, method {stage.config.distill.method}')
  if resumed:
    score = log.last('teacher', 'miou', default=known)
  elif known is not None and not given:
    score = known  # Of this run: the same images, the same protocol.
  else:
    scores = stage.score_teacher()
    log.metrics('teacher', 0, scores)
    score = scores['miou']
  if score is not None:
    log.line(f'teacher val mIoU {_percent(score)}')
  floor = options.min_miou
  if not resumed and floor > 0 and not (score is not None and score >= floor):
    value = 'unknown' if score is None else f'{score:.4f}'
    raise InputError(
      f'{given or "teacher"}: val mIoU {value} is below '
      f'config.teacher.min_miou={floor:g}; use a better teacher or lower the '
      'floor.'
    )
  return dataclasses.replace(stage, teacher_miou=score)


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
