# SPDX-License-Identifier: Apache-2.0
"""A run: the stages teacher, student and distill, one after the other."""

import dataclasses
import json
import pathlib

import jax

from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError
from attnfd_jax.training import checkpoints
from attnfd_jax.training import logs
from attnfd_jax.training import loop
from attnfd_jax.training import networks
from attnfd_jax.training import results
from attnfd_jax.training import sharding
from attnfd_jax.training.stage import load_teacher
from attnfd_jax.training.stage import make_stage
from attnfd_jax.training.stage import make_stage_distiller
from attnfd_jax.training.stage import make_student

# Keys that may change between the parts of an interrupted run.
HARMLESS = (
  'stages',
  'log_every_steps',
  'data.root',
  'data.cache',
  'data.threads',
  'data.workers',
  'eval.batch_size',
  'eval.num_pictures',
  'mesh.data',
  'teacher.min_miou',
)


def run(config, workdir):
  """All stages of `config`; finished ones are skipped. Returns the table.

  Args:
    config: as of config.default_config.
    workdir: folder of the run; ARCHITECTURE of the output is in the README.

  Returns:
    {stage: its result.json}.

  Raises:
    InputError: whenever the user can mend it.
  """
  config = resolve(config)
  workdir = pathlib.Path(workdir).absolute()
  dataset = load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data)
  _check(config, dataset, mesh)
  _check_files(config, dataset, mesh, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
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
    table[name] = _run_stage(name, config, dataset, mesh, workdir)
    path = workdir / 'results.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    logs.write_json(path, known | table)
  return table


def _check(config, dataset, mesh):
  """What is wrong with a later stage is wrong before the first one."""
  devices = mesh.devices.size
  if config.batch_size % (devices * config.optim.accumulate):
    raise InputError(
      f'config.batch_size={config.batch_size} must be a multiple of the '
      f'{devices} devices times optim.accumulate={config.optim.accumulate}.'
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
      networks.load_pretrained(config[role].pretrained, network)
    if name == 'distill' and config.teacher.checkpoint:
      load_teacher(config, workdir, dataset, mesh)


def _flat(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _claim(path, config):
  """Writes the config, or refuses a folder that was begun with another."""
  ours = json.loads(config.to_json_best_effort())
  if path.exists():
    theirs, new = dict(_flat(json.loads(path.read_text()))), dict(_flat(ours))
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


def _run_stage(name, config, dataset, mesh, workdir):
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
  with checkpoints.make_manager(
    directory / 'checkpoints', keep_best=config.checkpoint.keep_best
  ) as manager:
    latest = manager.latest_step() or 0
    log = logs.StageLog(directory, step=latest)
    log.line(
      f'{networks.describe(stage.options)}, {stage.num_steps} steps of '
      f'{config.batch_size} images; preparing the network ...'
    )
    state = stage.init_state(fresh=not latest, log=log.line)
    if latest:
      state = checkpoints.restore(manager, latest, state, run_facts)
      log.line(f'goes on at step {latest}')
    if stage.teacher:
      attention = results.attention_of(stage.distiller)
      log.line(f'teacher {stage.teacher.name}, attention {attention}')
      stage = _score_teacher(stage, log, resumed=latest > 0)
    state = loop.train(
      state,
      train_step=stage.make_train_step(),
      teacher_variables=stage.teacher.variables if stage.teacher else {},
      make_batches=stage.make_batches,
      evaluate=stage.evaluate,
      manager=manager,
      run=run_facts,
      log=log,
      rng=jax.device_put(
        jax.random.key(config.seed), sharding.replicated(mesh)
      ),
      num_steps=stage.num_steps,
      eval_every=stage.eval_every,
      log_every=config.log_every_steps,
      batch_size=config.batch_size,
    )
    best = manager.best_step()
    log.line(f'scoring the best checkpoint, step {best}')
    state = checkpoints.restore(manager, best, state, run_facts)
  result = results.write(stage, state, directory, step=best)
  scores = f'val mIoU {100 * result["miou"]:.2f}'
  if 'test' in result:
    scores += f', test mIoU {100 * result["test"]["miou"]:.2f}'
  log.line(f'finished: {scores}')
  return result
