# SPDX-License-Identifier: Apache-2.0
"""Runs the stages teacher, student and distill, one after the other."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import errno
import json
from typing import Any

from etils import epath
import jax
import numpy as np

from attnfd_jax import distill, paths, user_code
from attnfd_jax.config import leaves, resolve, STAGES
from attnfd_jax.data import checking, transforms
from attnfd_jax.data.pairs import Dataset, UNLABELED
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import memory, processes, sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.progress import write
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.reporting.page import write_report
from attnfd_jax.runs import checkpoints, lock, loggers, logs
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored
from attnfd_jax.training import loop, results, task_loss
from attnfd_jax.training.stage import make_stage, plan, Stage, with_teacher
from attnfd_jax.training.stopping import Stop
from attnfd_jax.types import Config, StrPath

# Keys that may change when a run is resumed.
MAY_CHANGE = (
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
  config: Config,
  workdir: StrPath,
  *,
  stop: Stop | None = None,
  teacher_scores: Mapping[str, Any] | None = None,
  may_change: Collection[str] = MAY_CHANGE,
) -> dict[str, dict[str, Any]]:
  """Trains all stages of a run, or resumes it, and writes its report.

  Same as `python -m attnfd_jax.main`. Finished stages are skipped.

  Args:
    config: an ml_collections.ConfigDict, see config.default_config.
    workdir: folder of the run, or an address such as gs://bucket/run.
    stop: for a command that handles signals.
    teacher_scores: metrics.summarize of a given teacher on val; by default, it
      is evaluated.
    may_change: keys of the config that may change when a run is resumed.

  Returns:
    The content of result.json by stage.

  Raises:
    InputError: for any error that the user can fix.
    Stopped: after a signal.
  """
  config, workdir = resolve(config), paths.as_path(workdir)
  dataset = load_dataset(config.data)
  # So that evaluation reads other files in the same way.
  config.data.update(dataset.detected)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  scores = check(config, dataset, mesh, workdir, teacher_scores)
  loggers.check(config.loggers)
  table, stop = {}, stop or Stop()
  with contextlib.ExitStack() as stack:
    stack.enter_context(_disk_errors(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    if processes.is_first():
      stack.enter_context(lock.locked(workdir))
    save_config(workdir / 'config.json', config, may_change=may_change)
    sizes = ', '.join(f'{k} {len(v)}' for k, v in dataset.splits.items())
    line = f'{dataset.name}: {dataset.num_classes} classes, {sizes} images'
    line += f'; {logs.device_name()}; writing to {workdir.name}/'
    print('\n'.join([line, *dataset.notes]), flush=True)
    for name in config.stages:
      if name == 'teacher' and (given := _given_teacher(config)):
        print(f'[teacher] skipped, using {given}', flush=True)
        continue
      table[name] = _run_stage(
        name, config, dataset, mesh, workdir, stop, scores
      )
      path = workdir / 'results.json'
      logs.write_json(path, logs.read_json(path) | table)
  if processes.is_first():
    write_report([workdir], workdir / 'report.html')
  return table


def summary_lines(results: Mapping[str, Any]) -> Iterator[str]:
  """Yields a line for each stage, with its scores."""
  for name, result in results.items():
    yield f'{name:8} {result["network"]:20} {_scores(result)}'


def _scores(result: Mapping[str, Any]) -> str:
  text = f'val mIoU {logs.percent(result["miou"])}'
  if test := result.get('test'):
    score = logs.percent(test['miou'])
    text += f', test mIoU {score}'
    if test['miou'] is None:
      text += ' (no labels, not scored)'
  return text


@contextlib.contextmanager
def _disk_errors(workdir: epath.Path) -> Iterator[None]:
  """Adds what to do to the error of a full or read-only disk."""
  try:
    yield
  except OSError as error:
    if error.errno not in (*_FULL, *_FORBIDDEN):
      raise
    remedy = 'make room' if error.errno in _FULL else 'make it writable'
    raise InputError(
      f'{error.filename or workdir}: {error.strerror}; {remedy} and start the '
      'same command again. Earlier checkpoints remain.'
    ) from error


def check(
  config: Config,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  workdir: epath.Path,
  scores: Mapping[str, Any] | None = None,
) -> Mapping[str, Any] | None:
  """Checks the inputs of all stages before the first one starts.

  Args:
    config: a resolved config.
    dataset: that of the config.
    mesh: device mesh.
    workdir: folder of the run.
    scores: of a given teacher on val, if they are known.

  Returns:
    `scores`, or those of a given teacher that it evaluates because the stage
    distill has not started, or None.

  Raises:
    InputError: for the first problem.
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
  # The options of all methods, whichever is used.
  methods = [name for name in distill.METHODS if name in config.distill]
  distill.make_distiller('+'.join(methods), config.distill)
  given, distilled = _given_teacher(config), None
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
      # A given teacher is loaded again when the stage starts: until then, it
      # takes no device memory.
      if given:
        teacher = teachers.from_config(config, workdir, names, mesh)
      else:
        teacher = teachers.abstract(config, names)
      stage = distilled = with_teacher(stage, teacher)
      _require_unlabeled(stage)
    stage.make_optimizer()
  if distilled and given:  # The slowest check is the last one.
    _check_given(distilled)
    if scores is None:
      write(f'evaluating the teacher {given} on val ...')
      scores = _score(distilled)
    _require_score(config, scores['miou'])
  if 'distill' in config.stages and not given:
    _check_own_teacher(config, workdir)
  return scores


def _require_classes(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh
) -> None:
  """Checks the classes in val, and in the labeled images of each role."""
  limits = {config[x].labeled_limit: x for x in ('student', 'teacher')}
  parts = [
    (plan(role, config, dataset, mesh).dataset, ('train',))
    for role in limits.values()
  ]
  for part, splits in [*parts, (dataset, ('val',))]:
    for note in checking.require_classes(part, splits, config.data.threads):
      write(note)


def _require_unlabeled(stage: Stage) -> None:
  """Refuses methods that use only unlabeled images if there are none."""
  names = stage.distiller.needs_unlabeled if stage.distiller else ()
  if names and UNLABELED not in stage.dataset.splits:
    method = stage.config.distill.method
    problem = f'{names[0]} needs unlabeled images, and there are none'
    raise InputError(
      f'config.distill.method={method}: {problem}; set config.data.unlabeled, '
      f'or config.distill.{names[0]}.everywhere=True.'
    )


def _score(stage: Stage) -> dict[str, Any]:
  """Evaluates the teacher on val."""
  teacher: Any = stage.teacher
  # The module, if there is one, because compiled programs are cached by it.
  network = getattr(teacher, 'network', None) or Scored(teacher)
  return stage.evaluate(teacher.variables, network=network)


def _require_score(config: Config, score: float) -> None:
  floor = config.teacher.min_miou
  if floor > 0 and not score >= floor:  # NaN is not.
    raise InputError(
      f'{_given_teacher(config) or "teacher"}: val mIoU {score:.4f} is below '
      f'config.teacher.min_miou={floor:g}; use a better teacher or lower it.'
    )


def _check_given(stage: Stage) -> None:
  """Checks a given teacher at the size of evaluation, and on real images."""
  teacher: Any = stage.teacher
  config, val = stage.config, stage.dataset.splits['val']
  size = predictor.eval_size(val.size(0), config.eval)
  inputs = {'variables': teacher.variables, 'rng': None}
  networks.checked_outputs(teacher, len(teacher.class_names), size, **inputs)
  if not hasattr(teacher, 'compare'):
    return
  size = tuple(config.data.crop_size)
  images = [val[i]['image'] for i in range(min(len(val), 2))]
  batch = np.stack([transforms.resize(x, size) for x in images])
  differences = teacher.compare(np.asarray(normalize(batch)))
  _, out = stage.output_shapes
  maps = {'logits': out['logits'], **out['features']}
  lines = (
    f'{key} ({"x".join(map(str, maps[key].shape[1:]))}) {difference:.1e}'
    for key, difference in differences.items()
  )
  write(
    f'teacher {teacher.name}, relative difference between JAX and PyTorch: '
    f'{", ".join(lines)}'
  )


def _check_own_teacher(config: Config, workdir: epath.Path) -> None:
  """Checks that this run has, or will have, a teacher to distill from."""
  folder = workdir / 'teacher'
  finished = (folder / 'result.json').exists()
  trains = 'teacher' in config.stages and not finished
  if trains or (workdir / 'distill' / 'result.json').exists():
    return
  needed = ('config.json', 'checkpoints')
  missing = [name for name in needed if not (folder / name).exists()]
  if missing:
    remedy = 'add teacher to --config.stages'
    if 'teacher' in config.stages:
      remedy = 'move the other files away to train it again'
    raise InputError(
      f'{folder}: no {" and no ".join(missing)} there, and distilling needs '
      f'the teacher; restore them, {remedy}, or set '
      '--config.teacher.checkpoint.'
    )


def save_config(
  path: epath.Path, config: Config, *, may_change: Collection[str] = MAY_CHANGE
) -> None:
  """Writes the config of a run, unless it was started with another one.

  Args:
    path: of config.json.
    config: a resolved config.
    may_change: keys that may differ.

  Raises:
    InputError: if other keys differ, or the file is damaged.
  """
  values = json.loads(config.to_json_best_effort())
  new = dict(leaves(values))
  try:
    old = dict(leaves(json.loads(path.read_text()))) if path.exists() else new
  except (ValueError, AttributeError):
    raise InputError(
      f'{path}: damaged; restore a copy, or move it away to resume with the '
      'config of this command.'
    ) from None
  changed = [
    f'{key}: {old.get(key)} -> {new.get(key)}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in may_change
  ]
  if changed:
    raise InputError(
      f'{path.parent} was started with another config ({"; ".join(changed)}). '
      'Use another --workdir, or the old values.'
    )
  logs.write_json(path, values)


def _run_stage(
  name: str,
  config: Config,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  workdir: epath.Path,
  stop: Stop,
  scores: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Trains or resumes a stage, evaluates it, and returns its result.

  `scores` are those of a given teacher, see `check`.
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
    log.line(note, shown=False)  # Printed once, for all stages.
  log.line(
    f'{networks.describe(stage.options)}, {stage.num_steps} steps of '
    f'{config.batch_size} images; initializing the network ...'
  )
  if text := _labels_text(stage):
    log.line(text)
  saved, facts = directory / 'checkpoints', stage.run_facts
  state = stage.init_state(fresh=not checkpoints.steps(saved), log=log.line)
  state, latest = checkpoints.restore_latest(saved, state, facts, log=log.line)
  log.truncate_after(latest)
  processes.wait('the log is written')
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
    with memory.explain_exhaustion(
      config.batch_size, devices=devices, accumulate=parts
    ):
      state = loop.train(stage, state, manager=manager, log=log, stop=stop)
    best = manager.best_step()
    log.line(f'evaluating the best checkpoint, step {best}')
    state, best = checkpoints.restore(saved, state, step=best)
  result = results.write(stage, state, directory, step=best, log=log)
  log.line(f'finished: {_scores(result)}')
  log.upload()
  # The next stage reads files that the first process wrote.
  processes.wait(f'{name} finished')
  return result


def _labels_text(stage: Stage) -> str:
  """Says how many images are labeled, unless all are."""
  count, facts = len(stage.dataset.splits['train']), stage.run_facts
  if rows := facts.get('unlabeled_rows'):
    return (
      f'{count} labeled and {facts["unlabeled_records"]} unlabeled images; '
      f'{rows} of the {facts["batch_size"]} images of a batch are unlabeled'
    )
  limit = stage.options.labeled_limit
  return f'{count} labeled images (labeled_limit={limit})' if limit else ''


def _describe(stage: Stage, directory: epath.Path) -> None:
  """Writes config.json and environment.json, and stores the user's code."""
  stored, code = {}, {}
  # All stages of a run use the same code, or they could not be compared.
  for other in directory.parent.glob('*/config.json'):
    with contextlib.suppress(ValueError, AttributeError):
      stored |= json.loads(other.read_text()).get('code', {})
  if user_code.specs(stage.config) and processes.is_first():
    code = {'code': user_code.store(directory, stage.config, stored)}
  logs.write_json(directory / 'config.json', stage.description() | code)
  logs.write_json(directory / 'environment.json', logs.environment())


def _given_teacher(config: Config) -> str:
  """The teacher that the config names instead of training one, or ''."""
  return config.teacher.factory or config.teacher.checkpoint


def _with_scored_teacher(
  stage: Stage,
  log: logs.StageLog,
  scores: Mapping[str, Any] | None,
  *,
  resumed: bool,
) -> Stage:
  """Adds the teacher's mIoU on val; raises InputError if it is too low."""
  teacher: Any = stage.teacher
  score = getattr(teacher, 'miou', None)
  remarks = '; '.join(['', *getattr(teacher, 'remarks', ())])
  method = stage.config.distill.method
  log.line(f'teacher {teacher.name}, method {method}{remarks}')
  if resumed:
    score = log.last('teacher', 'miou', default=score)
  elif scores or _given_teacher(stage.config) or score is None:
    # A teacher of this run was evaluated on the same images and protocol.
    scores = scores or _score(stage)
    log.metrics('teacher', 0, scores)
    score = scores['miou']
  log.line(f'teacher val mIoU {logs.percent(score)}')
  if not resumed:
    _require_score(stage.config, score)
  return dataclasses.replace(stage, teacher_miou=score)
