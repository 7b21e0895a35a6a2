# SPDX-License-Identifier: Apache-2.0
"""Runs a comparison: teacher, baseline, then every row with every seed.

  <workdir>/
    config.json  compare.json  compare.md  compare.html
    teacher/              a run with the stage `teacher`, if none is given
    student/seed0/        the baseline
    steps/attnfd/seed0/   a row's run; seconds/ with --equal=seconds
    tuning/steps/...      candidates of --tune, and the choice among them

Each of them is a run folder as `main` writes it; a row.json next to it has the
cost of the row. Finished runs are skipped, so that a comparison can resume, can
be extended by methods and seeds, and can be shared by several commands.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import time
import traceback
from typing import Any

from etils import epath
import jax

from attnfd_jax import paths, user_code
from attnfd_jax.comparison import cost, rows, sharing, table
from attnfd_jax.comparison.rows import BASELINE, Row, Settings
from attnfd_jax.config import resolve
from attnfd_jax.data.sources import Dataset, load_dataset
from attnfd_jax.devices import processes, sharding
from attnfd_jax.errors import check_choice, check_range, first_line, InputError
from attnfd_jax.runs import lock, logs
from attnfd_jax.training import experiment
from attnfd_jax.training.stage import make_stage, plan, Stage
from attnfd_jax.training.stopping import Stop
from attnfd_jax.types import Config, StrPath

# Keys in which a run may differ from its start: the folder may have moved, with
# the teacher in it, and the method is that of the row.
_MAY_CHANGE = (*experiment.MAY_CHANGE, 'distill.method', 'teacher.checkpoint')


def compare(
  config: Config,
  workdir: StrPath,
  *,
  methods: Sequence[str],
  seeds: Sequence[int],
  equal: str = 'steps',
  seconds_factor: float = 1.0,
  tune: Sequence[str] = (),
  vary: Sequence[str] = (),
  tune_seed: int = 1000,
  command: Sequence[str] = (),
  stop: Stop | None = None,
) -> dict[str, Any]:
  """Trains the runs that are missing, and writes the table.

  Args:
    config: as from config.default_config; its seed is the teacher's.
    workdir: folder of the comparison.
    methods: names in distill.METHODS, sums such as 'attnfd+kd', or
      'file.py:Class'.
    seeds: seeds of the students.
    equal: 'steps' gives every row the same number of steps. 'seconds' gives
      each method as many steps as fit into the baseline's training time.
    seconds_factor: multiplies that time.
    tune: 'KEY:value,value' each. The row is the combination with the best mIoU
      on val with `tune_seed`.
    vary: 'KEY:value,value' each. Every combination is a row.
    tune_seed: seed of the tuning runs, none of `seeds`.
    command: command line of `main` with this config, for compare.json.
    stop: handler of the signals that end the command early.

  Returns:
    The content of compare.json.

  Raises:
    InputError: for errors that the user can fix, and if the baseline fails. If
      a method fails, its row contains the error instead.
    Stopped: after a signal.
  """
  check_choice('--equal', equal, table.KINDS)
  check_range('--seconds_factor', seconds_factor, 1e-3, 1e3)
  config, workdir = resolve(config), paths.as_path(workdir)
  settings = {
    'tune': rows.parse_settings('tune', tune, config),
    'vary': rows.parse_settings('vary', vary, config),
  }
  rows.check(config, methods, settings)
  _check_seeds(seeds, tune_seed, tuned=bool(tune))
  runner = _Runner(config, workdir, equal, seconds_factor, command, stop)
  return runner.run(methods, seeds, settings, tune_seed)


def _check_seeds(seeds: Sequence[int], tune_seed: int, *, tuned: bool) -> None:
  if not seeds or len({*seeds}) < len(seeds):
    raise InputError(f'--seeds={seeds}: give different numbers, such as 0,1,2.')
  for seed in seeds:
    check_range('--seeds', seed, 0, 2**31 - 1)
  check_range('--tune_seed', tune_seed, 0, 2**31 - 1)
  if tuned and tune_seed in seeds:
    raise InputError(
      f'--tune_seed={tune_seed} is one of --seeds, so that tuned rows would be '
      'scored with the seed that chose them; give another.'
    )


@dataclasses.dataclass(frozen=True)
class _Job:
  """The run of a row with one seed."""

  row: Row
  seed: int
  folder: epath.Path  # Of the row, with a subfolder per seed.
  changes: tuple[tuple[str, Any], ...] = ()  # Keys of the config and values.

  @property
  def directory(self) -> epath.Path:
    """The run's folder."""
    return self.folder / f'seed{self.seed}'

  @property
  def result(self) -> epath.Path:
    """The file that exists once the run has finished."""
    return self.directory / self.row.stage / 'result.json'

  def __str__(self) -> str:
    return f'{self.row.title}, seed {self.seed}'


class _Runner:
  """Runs the jobs of a comparison in its folder."""

  def __init__(
    self,
    config: Config,
    workdir: epath.Path,
    equal: str,
    factor: float,
    command: Sequence[str],
    stop: Stop | None,
  ):
    self.config, self.workdir, self.equal = config, workdir, equal
    self.factor, self.command, self.stop = factor, command, stop or Stop()
    self.given = config.teacher.checkpoint or config.teacher.factory
    # Facts of the rows and runs that failed, by folder; not retried until the
    # command is started again.
    self.failed: dict[epath.Path, dict[str, Any]] = {}
    self.pace = 1.0  # Duration of a whole run over the sum of its step times.

  def run(
    self,
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Settings],
    tune_seed: int,
  ) -> dict[str, Any]:
    """See `compare`."""
    groups = [g for m in methods for g in self._groups(m, settings)]
    self._begin([row for group in groups for row in group])
    folder = self.workdir / 'student'
    baselines = [_Job(Row(BASELINE), seed, folder) for seed in seeds]
    candidates = [
      self._job(row, tune_seed, tuning=True)
      for group in groups
      for row in (group if len(group) > 1 else ())
    ]
    count = len(baselines) + len(candidates) + len(groups) * len(seeds)
    first = 'the teacher, then ' if not self.given else ''
    sharing.say(
      f'{first}{count} runs: baseline and {len(groups)} rows, seeds '
      f'{", ".join(map(str, seeds))}'
    )
    self._train_teacher()
    self._measure([*baselines[:1], *candidates])
    # For the estimate of the time left: which row of a group will be trained is
    # only known after tuning.
    planned = [self._job(g[0], seed) for seed in seeds for g in groups]
    if candidates:
      self._work([*baselines, *candidates], planned)
    chosen = [self._best(group, tune_seed) for group in groups]
    # All rows with one seed before the next seed, to have a table early.
    final = [self._job(row, seed) for seed in seeds for row in chosen if row]
    self._measure(final)
    self._work([*baselines, *final])
    comparison = self._write()
    if not any(job.result.exists() for job in final):
      raise InputError(f'No method finished; see {self.workdir}/compare.md.')
    return comparison

  def _groups(
    self, method: str, settings: Mapping[str, Settings]
  ) -> Iterator[list[Row]]:
    """Yields, for each combination of --vary, the candidates of --tune."""
    for row in rows.make_rows(method, settings['vary']):
      tuned = rows.make_rows(method, settings['tune'])
      yield [Row(method, row.settings + other.settings) for other in tuned]

  def _job(self, row: Row, seed: int, *, tuning: bool = False) -> _Job:
    parent = self.workdir / 'tuning' if tuning else self.workdir
    # Tuning must not evaluate on test.
    changes = (('eval.test_split', ''),) if tuning else ()
    return _Job(row, seed, parent / self.equal / row.folder, changes)

  def _begin(self, every_row: Sequence[Row]) -> None:
    """Claims the folder; refuses one that was started with other options."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    with sharing.holding(self.workdir, wait=True):
      may_change = (*experiment.MAY_CHANGE, 'distill.method')
      path = self.workdir / 'config.json'
      experiment.save_config(path, self.config, may_change=may_change)
      for path in self.workdir.glob('seconds/*/row.json'):
        factor = logs.read_json(path).get('seconds_factor')
        if factor and self.equal == 'seconds' and factor != self.factor:
          raise InputError(
            f'{path.parent} was started with --seconds_factor={factor:g}; use '
            'that value or another --workdir.'
          )
      # All rows of a table must use the same version of the user's files.
      path = self.workdir / 'code.json'
      digests = sharing.read_json(path)
      for row in every_row:
        code = row.configured(self.config)
        if user_code.specs(code) and processes.is_first():
          digests |= user_code.store(self.workdir, code, digests)
          logs.write_json(path, digests)

  def _best(self, group: Sequence[Row], seed: int) -> Row | None:
    """Returns the row with the highest mIoU on val; None if all runs failed.

    The choice is written to a file, and later commands keep to it.
    """
    if len(group) == 1:
      return group[0]
    jobs = [self._job(row, seed, tuning=True) for row in group]
    path = jobs[0].folder.with_name(f'{group[0].folder}-seed{seed}.json')
    names = [row.name for row in group]
    with sharing.holding(self.workdir, wait=True):
      choice = sharing.read_json(path)
      if choice.get('candidates') != names:
        scores: dict[str, float] = {
          job.row.name: logs.read_json(job.result)['miou'] or 0.0
          for job in jobs
          if job.result.exists()
        }
        best = max(scores, key=lambda name: scores[name], default=None)
        choice = {'candidates': names, 'scores': scores, 'chosen': best}
        if best:
          logs.write_json(path, choice)
      choice = processes.from_first(choice)
    if not choice['chosen']:
      sharing.say(f'no candidate of {group[0].title} finished')
      return None
    best = group[names.index(choice['chosen'])]
    sharing.say(f'chosen on val with seed {seed}: {best.title}')
    return best

  @property
  def _teacher_folder(self) -> str:
    """The teacher that the comparison trains; '' if the config gives one."""
    return '' if self.given else str(self.workdir / 'teacher' / 'teacher')

  def _train_teacher(self) -> None:
    if self.given:
      return
    config = self.config.copy_and_resolve_references()
    config.stages = ('teacher',)

    def attempt():
      with sharing.holding(self.workdir / 'teacher', name='.compare'):
        experiment.train(
          config,
          self.workdir / 'teacher',
          stop=self.stop,
          may_change=_MAY_CHANGE,
        )

    sharing.until_done([attempt], 'another command is training the teacher')

  def _measure(self, jobs: Sequence[_Job]) -> None:
    """Writes the row.json of each row, before any run starts."""
    unique = {job.folder: job for job in jobs}.values()
    sharing.until_done(
      [functools.partial(self._facts, job) for job in unique],
      'another command is measuring the rows',
    )

  def _work(self, jobs: Sequence[_Job], later: Sequence[_Job] = ()) -> None:
    """Runs all jobs, except those that another command does.

    The jobs that come `later` only count for the estimate of the time left.
    """
    every = [*jobs, *later]
    sharing.until_done(
      [functools.partial(self._do, job, every) for job in jobs],
      'another command is training the rest',
    )

  def _done(self, job: _Job) -> bool:
    failed = job.folder in self.failed or job.directory in self.failed
    return failed or processes.from_first(job.result.exists())

  def _do(self, job: _Job, every: Sequence[_Job]) -> None:
    """Trains a job; raises InUse if another command is doing so."""
    if self._done(job):
      return
    with sharing.holding(job.folder, name=f'.seed{job.seed}'):
      if self._done(job):
        return
      facts = self._facts(job)
      if 'failed' in facts:
        return
      left = [x for x in every if not self._done(x)]
      sharing.say(
        f'run {len(every) - len(left) + 1} of {len(every)}: {job}; about '
        f'{logs.duration(self._seconds(left))} left'
      )
      fresh, start = not job.directory.exists(), time.monotonic()
      self._train(job, facts)
      if fresh and job.result.exists():
        steps = facts['num_steps'] * facts['step_seconds']
        self.pace = (time.monotonic() - start) / steps
    self._write()

  def _train(self, job: _Job, facts: Mapping[str, Any]) -> None:
    changes = {'seed': job.seed, **facts['changes'], **dict(job.changes)}
    config = self._configured(job.row, changes)
    scores = self._teacher_scores() if job.row.method else None
    path = job.directory / 'failed.json'
    try:
      experiment.train(
        config,
        job.directory,
        stop=self.stop,
        teacher_scores=scores,
        may_change=_MAY_CHANGE,
      )
      path.unlink(missing_ok=True)
    except Exception as error:
      in_use = isinstance(error, lock.InUse)  # By a `main` in this folder.
      if in_use or not job.row.method or not sharing.is_of_one_row(error):
        raise
      self.failed[job.directory] = self._note_failure(path, job, error)

  def _note_failure(
    self,
    path: epath.Path,
    name: object,
    error: Exception,
    facts: dict[str, Any] | None = None,
  ) -> dict[str, Any]:
    """Adds the failure of a row or a run to its facts, and writes them."""
    # The last good checkpoint depends on the timing of saves.
    text = first_line(error).split(' Last good checkpoint')[0]
    sharing.say(f'{name} failed: {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    failure = {'failed': text, 'traceback': traceback.format_exc()}
    facts = (facts or {}) | failure
    logs.write_json(path, facts)
    return facts

  def _facts(self, job: _Job) -> dict[str, Any]:
    """Returns the content of a row's row.json, measuring the row if needed.

    Raises InUse if another command is measuring it.
    """
    if job.folder in self.failed:
      return self.failed[job.folder]
    path = job.folder / 'row.json'
    if not _is_measured(facts := sharing.read_json(path)):
      with sharing.holding(job.folder):
        # Another command may have measured it just before.
        if not _is_measured(facts := sharing.read_json(path)):
          facts = self._measure_row(job, path)
    return facts

  def _measure_row(self, job: _Job, path: epath.Path) -> dict[str, Any]:
    """Measures a row and plans its runs; writes and returns its facts."""
    row = job.row
    facts: dict[str, Any] = {
      'name': row.name,
      'method': row.method,
      'title': row.title,
      'settings': dict(row.settings),
      'equal': self.equal,
    }
    sharing.say(f'measuring the step time of {row.title} ...')
    try:
      stage = self._make_stage(row) if row.method else self._baseline
      facts |= cost.measure(stage, self._baseline, self._data_seconds)
    except Exception as error:
      if not row.method or not sharing.is_of_one_row(error):
        raise
      facts = self._note_failure(path, row.title, error, facts)
      self.failed[job.folder] = facts
      return facts
    changes = {}
    if row.method and self.equal == 'seconds':
      ratio = facts['baseline_step_seconds'] / facts['step_seconds']
      facts['seconds_factor'] = self.factor
      # As many evaluations to choose from, and the same fraction of warm-up.
      for key in ('eval.every_epochs', 'optim.warmup_epochs'):
        group, name = key.split('.')
        changes[key] = _scaled(self.config[group][name], self.factor * ratio)
      epochs = self.config.student.num_epochs
      changes['student.num_epochs'] = _scaled(epochs, self.factor * ratio)
    config = self._configured(row, changes)
    planned = plan(row.stage, config, self._dataset, self._mesh)
    facts |= {
      'changes': changes,
      'num_epochs': planned.options.num_epochs,
      'num_steps': planned.num_steps,
      'flags': row.flags(changes),
    }
    logs.write_json(path, facts)
    return facts

  def _configured(
    self, row: Row, changes: Mapping[str, Any] | None = None
  ) -> Config:
    return row.configured(
      self.config, teacher=self._teacher_folder, changes=changes
    )

  def _make_stage(self, row: Row) -> Stage:
    config = self._configured(row)
    config.data.update(self._dataset.detected)
    return make_stage(
      row.stage, config, self._dataset, self._mesh, self.workdir
    )

  @functools.cached_property
  def _baseline(self) -> Stage:
    return self._make_stage(Row(BASELINE))

  @functools.cached_property
  def _data_seconds(self) -> float:
    return cost.data_seconds(self._baseline)

  @functools.cached_property
  def _dataset(self) -> Dataset:
    return load_dataset(self.config.data)

  @functools.cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return sharding.make_mesh(self.config.mesh.data, self.config.mesh.spatial)

  def _teacher_scores(self) -> dict[str, Any] | None:
    """Returns the teacher's scores on val; None if not evaluated yet."""
    if not self.given:
      path = self.workdir / 'teacher' / 'teacher' / 'result.json'
      return table.scores_of(logs.read_json(path))
    return processes.from_first(table.teacher_record(self.workdir))

  def _seconds(self, jobs: Sequence[_Job]) -> float:
    """Estimates the duration of jobs; unmeasured rows count as the average."""
    measured = {}
    for job in jobs:
      facts = logs.read_json(job.folder / 'row.json')
      if _is_measured(facts):
        measured[job.folder] = facts['num_steps'] * facts['step_seconds']
    average = sum(measured.values()) / max(len(measured), 1)
    return self.pace * sum(measured.get(job.folder, average) for job in jobs)

  def _write(self) -> dict[str, Any]:
    """Writes and returns the table of the runs that have finished so far."""
    with sharing.holding(self.workdir, wait=True):
      teacher = self._teacher_folder
      command = [*self.command]
      if teacher:
        command += [f'--config.teacher.checkpoint={teacher}']
        if user_code.is_code(self.config.teacher.network):
          command += ['--config.teacher.allow_code']
      comparison = table.collect(self.workdir, command=command)
      if processes.is_first():
        table.write(comparison, self.workdir)
      return comparison


def _is_measured(facts: Mapping[str, Any]) -> bool:
  return 'num_steps' in facts


def _scaled(value: float, factor: float) -> float:
  """Returns the product with four digits, to keep flags short."""
  return float(f'{value * factor:.4g}')
