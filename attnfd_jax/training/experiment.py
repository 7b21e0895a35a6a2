# SPDX-License-Identifier: Apache-2.0
"""A run: the stages teacher, student and distill, one after the other."""

import contextlib
import dataclasses
import errno
import json

import numpy as np

from attnfd_jax import distill, paths, user_code
from attnfd_jax.config import leaves, resolve, STAGES
from attnfd_jax.data import checking, transforms
from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import memory, processes, sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.progress import write
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.reporting.page import write_report
from attnfd_jax.runs import checkpoints, lock, loggers, logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored
from attnfd_jax.training import loop, results, task_loss
from attnfd_jax.training.stage import make_stage, plan, with_teacher
from attnfd_jax.training.stopping import Stop

# Keys that may change between the parts of an interrupted run.
HARMLESS = (
  *('stages', 'log_every_steps', 'loggers'),
  *('checkpoint.every_minutes', 'checkpoint.keep_best'),
  *('data.root', 'data.prepared', 'data.cache', 'data.decoded_cache'),
  *('data.threads', 'data.workers', 'eval.batch_size', 'eval.num_pictures'),
  *('mesh.data', 'mesh.fsdp', 'mesh.spatial'),
  *('teacher.allow_code', 'teacher.min_miou'),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def train(
  config, workdir, *, stop=None, teacher_scores=None, harmless=HARMLESS
):
  """Trains what is missing in a run, and writes its report.

  What `python -m attnfd_jax.main` does; finished stages are skipped.

  Args:
    config: as of config.default_config.
    workdir: folder of the run, or an address such as gs://bucket/run.
    stop: stopping.Stop of a command that listens to signals.
    teacher_scores: of a given teacher on val, as of metrics.summarise, where
      they are known: it is not scored again.
    harmless: keys of the config in which a run may differ from its beginning.

  Returns:
    {stage: its result.json}.

  Raises:
    InputError: whenever the user can fix it.
    Stopped: after a signal.
  """
  config, workdir = resolve(config), paths.as_path(workdir)
  dataset = load_dataset(config.data)
  # So that scoring reads other files as training read these.
  config.data.update(dataset.settled)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  scores = check(config, dataset, mesh, workdir, teacher_scores)
  loggers.check(config.loggers)
  table, stop = {}, stop or Stop()
  with contextlib.ExitStack() as stack:
    stack.enter_context(_disk_errors(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    if processes.is_first():
      stack.enter_context(lock.locked(workdir))
    claim(workdir / 'config.json', config, harmless=harmless)
    sizes = ', '.join(f'{k} {len(v)}' for k, v in dataset.splits.items())
    line = f'{dataset.name}: {dataset.num_classes} classes, {sizes} images'
    place = f'{logs.device_name()}; writing to {workdir.name}/'
    print('\n'.join([f'{line}; {place}', *dataset.notes]), flush=True)
    for name in config.stages:
      if name == 'teacher' and (given := _given_teacher(config)):
        print(f'[teacher] given: {given}', flush=True)
        continue
      table[name] = _run_stage(
        name, config, dataset, mesh, workdir, stop, scores
      )
      path = workdir / 'results.json'
      logs.write_json(path, logs.read_json(path) | table)
  if processes.is_first():
    write_report([workdir], workdir / 'report.html')
  return table


def summary_lines(results):
  """A line for each stage, with its scores."""
  for name, result in results.items():
    yield f'{name:8} {result["network"]:20} {_scores(result)}'


def _scores(result):
  text = f'val mIoU {logs.percent(result["miou"])}'
  if test := result.get('test'):
    score = logs.percent(test['miou'])
    text += f', test mIoU {score}'
    if test['miou'] is None:
      text += ' (no labels, not scored)'
  return text


@contextlib.contextmanager
def _disk_errors(workdir):
  """A full disk and a forbidden folder get their remedy."""
  try:
    yield
  except OSError as error:
    if error.errno not in (*_FULL, *_FORBIDDEN):
      raise
    remedy = 'make room' if error.errno in _FULL else 'make it writable'
    raise InputError(
      f'{error.filename or workdir}: {error.strerror}; {remedy} and start the '
      'same command again. What was saved before is still there.'
    ) from error


def check(config, dataset, mesh, workdir, scores=None):
  """Refuses what is wrong with any stage before the first one begins.

  Returns the scores on val of a given teacher, if distillation begins, or None;
  `scores`, where they are known.
  """
  devices, parts = mesh.shape['data'], config.optim.accumulate
  if config.batch_size % (devices * parts):
    raise InputError(
      f'config.batch_size={config.batch_size} must be a multiple of the '
      f'{devices} devices times optim.accumulate={parts}.'
    )
  splits = dataset.splits
  required = {'train', 'val', config.eval.test_split or 'val'}
  missing = [x for x in sorted(required) if not len(splits.get(x, ()))]
  if missing:
    raise InputError(
      f'{dataset.name} has no images in {", ".join(missing)}; have '
      f'{", ".join(splits)}.'
    )
  _require_classes(config, dataset, mesh)
  task_loss.check(config.loss, dataset.class_names)
  known = [name for name in distill.METHODS if name in config.distill]
  distill.make_distiller('+'.join(known), config.distill)  # Chosen or not.
  given = _given_teacher(config)
  for name in STAGES:
    stage = plan(name, config, dataset, mesh)
    chosen = name in config.stages
    begins = chosen and not (workdir / name).exists()
    if name != 'distill' and user_code.is_code(stage.options.network):
      size = tuple(config.data.crop_size)
      networks.check_network(stage.network, dataset.num_classes, size)
    pretrained = stage.options.pretrained
    if name == 'teacher' and given and pretrained:
      write(f'config.teacher.pretrained is not used: {given} is the teacher')
    elif begins and pretrained:
      torch_networks.load_pretrained(pretrained, stage.network)
    if name == 'distill' and (begins if given else chosen):
      names = dataset.class_names
      # What is given is read again when the stage begins, and takes no memory
      # of the devices before.
      if given:
        teacher = teachers.from_config(config, workdir, names, mesh)
      else:
        teacher = teachers.abstract(config, names)
      stage = with_teacher(stage, teacher)
      _require_unlabeled(stage)
    stage.make_optimizer()
  if stage.teacher and given:  # Last, for it computes.
    _check_given(stage)
    if scores is None:
      write(f'scoring the teacher {given} on val ...')
      scores = _score(stage)
    _require_score(config, scores['miou'])
  if 'distill' in config.stages and not given:
    _check_own_teacher(config, workdir)
  return scores


def _require_classes(config, dataset, mesh):
  """In val, and in what has labels for each of the roles."""
  limits = {config[x].labeled_limit: x for x in ('student', 'teacher')}
  parts = [
    (plan(role, config, dataset, mesh).dataset, ('train',))
    for role in limits.values()
  ]
  for part, splits in [*parts, (dataset, ('val',))]:
    for note in checking.require_classes(part, splits, config.data.threads):
      write(note)


def _require_unlabeled(stage):
  """Refuses methods that would have nothing to teach."""
  names = stage.distiller.needs_unlabeled
  if names and UNLABELED not in stage.dataset.splits:
    method = stage.config.distill.method
    what = f'{names[0]} learns from unlabeled images, and there are none'
    raise InputError(
      f'config.distill.method={method}: {what}; name them by '
      'config.data.unlabeled, or set '
      f'config.distill.{names[0]}.everywhere=True.'
    )


def _score(stage):
  """Of its teacher on val."""
  teacher = stage.teacher
  # Where one has a module, that is scored: programs are shared by it.
  network = getattr(teacher, 'network', None) or Scored(teacher)
  return stage.evaluate(teacher.variables, network=network)


def _require_score(config, score):
  floor = config.teacher.min_miou
  if floor > 0 and not score >= floor:  # NaN is not.
    raise InputError(
      f'{_given_teacher(config) or "teacher"}: val mIoU {score:.4f} is below '
      f'config.teacher.min_miou={floor:g}; use a better teacher or lower it.'
    )


def _check_given(stage):
  """Tries a teacher from elsewhere on images of the size that is scored, and
  one whose results can be compared on some that are real.
  """
  teacher, config = stage.teacher, stage.config
  val = stage.dataset.splits['val']
  seen = predictor.seen_size(val.size(0), config.eval)
  inputs = {'variables': teacher.variables, 'rng': None}
  networks.checked_outputs(teacher, len(teacher.class_names), seen, **inputs)
  if not hasattr(teacher, 'compare'):
    return
  size = tuple(config.data.crop_size)
  images = [val[i]['image'] for i in range(min(len(val), 2))]
  batch = np.stack([transforms.resize(x, size) for x in images])
  found = teacher.compare(np.asarray(normalise(batch)))
  _, out = stage.output_shapes
  maps = {'logits': out['logits'], **out['features']}
  lines = (
    f'{key} ({"x".join(map(str, maps[key].shape[1:]))}) {difference:.1e}'
    for key, difference in found.items()
  )
  write(f'teacher {teacher.name}, JAX - PyTorch: {", ".join(lines)}')


def _check_own_teacher(config, workdir):
  """The teacher that this run has, or will have, for distillation."""
  folder = workdir / 'teacher'
  finished = (folder / 'result.json').exists()
  trains = 'teacher' in config.stages and not finished
  if trains or (workdir / 'distill' / 'result.json').exists():
    return
  needed = ('config.json', 'checkpoints')
  missing = [name for name in needed if not (folder / name).exists()]
  if missing:
    again = 'add teacher to --config.stages'
    if 'teacher' in config.stages:
      again = 'move the rest of it away to train it again'
    raise InputError(
      f'{folder}: no {" and no ".join(missing)} there, and distilling needs '
      f'the teacher; put them back, {again}, or name another by '
      '--config.teacher.checkpoint.'
    )


def claim(path, config, *, harmless=HARMLESS):
  """Writes the config, or refuses a folder that was begun with another; keys
  that are `harmless` may differ.
  """
  ours = json.loads(config.to_json_best_effort())
  new = dict(leaves(ours))
  try:
    old = dict(leaves(json.loads(path.read_text()))) if path.exists() else new
  except (ValueError, AttributeError):
    raise InputError(
      f'{path}: damaged; put a copy back, or move it away to resume with the '
      'config of this command.'
    ) from None
  changed = [
    f'{key}: {old.get(key)} -> {new.get(key)}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in harmless
  ]
  if changed:
    raise InputError(
      f'{path.parent} was begun with another config ({"; ".join(changed)}). '
      'Use another --workdir, or the old values.'
    )
  logs.write_json(path, ours)


def _run_stage(name, config, dataset, mesh, workdir, stop, scores):
  """Trains a stage from wherever it is, scores it, and returns its result.

  `scores` are those of a given teacher, as of `check`.
  """
  directory = workdir / name
  finished = directory / 'result.json'
  if finished.exists():
    print(f'[{name}] already finished, skipped', flush=True)
    return logs.read_json(finished)
  directory.mkdir(exist_ok=True)
  stage = make_stage(name, config, dataset, mesh, workdir)
  config = stage.config
  _describe(stage, directory)
  log = logs.StageLog(directory)
  for note in dataset.notes:
    log.line(note, shown=False)  # It was, once for all stages.
  log.line(
    f'{networks.describe(stage.options)}, {stage.num_steps} steps of '
    f'{config.batch_size} images; preparing the network ...'
  )
  if text := _labels_text(stage):
    log.line(text)
  saved, facts = directory / 'checkpoints', stage.run_facts
  state = stage.init_state(fresh=not checkpoints.steps(saved), log=log.line)
  state, latest = checkpoints.restore_latest(saved, state, facts, log=log.line)
  log.forget_after(latest)
  processes.wait('the log is whole')
  if latest:
    log.line(f'resumed from step {latest}')
  kept, parts = config.checkpoint.keep_best, config.optim.accumulate
  with (
    loggers.attached(config.loggers, log, stage.description()),
    checkpoints.managed(saved, keep_best=kept) as manager,
  ):
    if stage.teacher is not None:
      stage = _with_scored_teacher(stage, log, scores, resumed=latest > 0)
    devices = mesh.shape['data']
    with memory.explained(config.batch_size, devices=devices, accumulate=parts):
      state = loop.train(stage, state, manager=manager, log=log, stop=stop)
    best = manager.best_step()
    log.line(f'scoring the best checkpoint, step {best}')
    state, _ = checkpoints.restore(saved, state, step=best)
  result = results.write(stage, state, directory, step=best, log=log)
  log.line(f'finished: {_scores(result)}')
  log.upload()
  # The next stage reads what the first process wrote.
  processes.wait(f'{name} finished')
  return result


def _labels_text(stage):
  """How many images have labels, where not all do."""
  count, facts = len(stage.dataset.splits['train']), stage.run_facts
  if rows := facts.get('unlabeled_rows'):
    return (
      f'{count} labeled and {facts["unlabeled_records"]} unlabeled images; '
      f'{rows} of the {facts["batch_size"]} of a batch are unlabeled'
    )
  limit = stage.options.labeled_limit
  return f'{count} labeled images (labeled_limit={limit})' if limit else ''


def _describe(stage, directory):
  """Writes config.json and environment.json, and keeps the user's code."""
  stored, kept = {}, {}
  # The stages of a run use the same files: else they could not be compared.
  for other in directory.parent.glob('*/config.json'):
    with contextlib.suppress(ValueError, AttributeError):
      stored |= json.loads(other.read_text()).get('code', {})
  if user_code.specs(stage.config) and processes.is_first():
    kept = {'code': user_code.store(directory, stage.config, stored)}
  logs.write_json(directory / 'config.json', stage.description() | kept)
  logs.write_json(directory / 'environment.json', logs.environment())


def _given_teacher(config):
  """What the config names in place of a stage `teacher`, or ''."""
  return config.teacher.factory or config.teacher.checkpoint


def _with_scored_teacher(stage, log, scores, *, resumed):
  """The stage with its teacher's mIoU on val; bad teachers stop here."""
  teacher, score = stage.teacher, getattr(stage.teacher, 'miou', None)
  remarks = '; '.join(['', *getattr(teacher, 'remarks', ())])
  method = stage.config.distill.method
  log.line(f'teacher {teacher.name}, method {method}{remarks}')
  if resumed:
    score = log.last('teacher', 'miou', default=score)
  elif scores or _given_teacher(stage.config) or score is None:
    # That of this run was scored on the same images, by the same protocol.
    scores = scores or _score(stage)
    log.metrics('teacher', 0, scores)
    score = scores['miou']
  log.line(f'teacher val mIoU {logs.percent(score)}')
  if not resumed:
    _require_score(stage.config, score)
  return dataclasses.replace(stage, teacher_miou=score)
