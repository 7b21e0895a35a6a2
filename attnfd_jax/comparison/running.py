# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: teacher, baseline, then every row and seed.

  <workdir>/
    config.json  compare.json  compare.md  compare.html
    teacher/              a run with the stage `teacher`, if none is given
    student/seed0/        the baseline
    steps/attnfd/seed0/   a row's run; seconds/ with --equal=seconds
    tuning/steps/...      candidates of --tune

Each is a run's folder as of `main`, beside a row.json with the row's cost. What
is finished is skipped, so that a comparison resumes, grows by methods and
seeds, and is shared by several commands.
"""

import dataclasses
import functools
import json
import time
import traceback

from attnfd_jax import paths
from attnfd_jax.comparison import cost, rows, table
from attnfd_jax.comparison.rows import BASELINE, Row
from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import processes, sharding
from attnfd_jax.errors import first_line, InputError, one_of, within
from attnfd_jax.runs import lock, logs
from attnfd_jax.training import experiment
from attnfd_jax.training.stage import make_stage
from attnfd_jax.training.stopping import Stop

_POLL_SECONDS = 5


def compare(
  config,
  workdir,
  *,
  methods,
  seeds,
  equal='steps',
  seconds_factor=1.0,
  tune=(),
  vary=(),
  tune_seed=1000,
  command=(),
  stop=None,
):
  """Trains what is missing and writes the table; returns compare.json.

  Args:
    config: as of config.default_config; its seed is the teacher's.
    workdir: folder of the comparison.
    methods: of distill.METHODS, sums such as 'attnfd+kd', 'file.py:Class'.
    seeds: of the students.
    equal: 'steps', or 'seconds': each method has as many steps as fit into the
      baseline's seconds of training times `seconds_factor`.
    tune: 'KEY:value,value' each: the best on val with `tune_seed` is the row.
    vary: the same form: a row for each value.
    command: of `main` with this config, to be written down.
    stop: stopping.Stop of a command that listens to signals.

  Raises:
    InputError: whenever the user can fix it, and where the baseline fails. A
      method that fails is a row that says so.
    Stopped: after a signal.
  """
  one_of('--equal', equal, table.KINDS)
  within('--seconds_factor', seconds_factor, 1e-3, 1e3)
  config, workdir = resolve(config), paths.as_path(workdir)
  settings = {
    'tune': rows.parse_settings('tune', tune),
    'vary': rows.parse_settings('vary', vary),
  }
  rows.check(config, methods, settings)
  _check_seeds(seeds, tune_seed, tuned=bool(tune))
  runner = _Runner(config, workdir, equal, seconds_factor, command, stop)
  return runner.run(methods, seeds, settings, tune_seed)


def _check_seeds(seeds, tune_seed, *, tuned):
  if not seeds or len({*seeds}) < len(seeds):
    raise InputError(f'--seeds={seeds}: give different numbers, as 0,1,2.')
  for seed in (*seeds, tune_seed):
    within('--seeds', seed, 0, 2**31 - 1)
  if tuned and tune_seed in seeds:
    raise InputError(
      f'--tune_seed={tune_seed} is one of --seeds, and would score what it '
      'chose; give another.'
    )


@dataclasses.dataclass(frozen=True)
class _Job:
  """A row's run with one seed."""

  row: Row
  seed: int
  folder: object  # Of the row.
  changes: tuple = ()  # Of the config, ((key, value), ...).

  @property
  def directory(self):
    return self.folder / f'seed{self.seed}'

  @property
  def result(self):
    return self.directory / self.row.stage / 'result.json'

  def __str__(self):
    return f'{self.row.title}, seed {self.seed}'


class _Runner:
  """Does the jobs of one comparison in a folder."""

  def __init__(self, config, workdir, equal, factor, command, stop):
    self.config, self.workdir, self.equal = config, workdir, equal
    self.factor, self.command, self.stop = factor, command, stop or Stop()
    self.given = config.teacher.checkpoint or config.teacher.factory
    self.jobs, self.pace = [], 1.0
    self.failed = {}  # Folders of rows to their facts; a restart tries again.

  def run(self, methods, seeds, settings, tune_seed):
    self.workdir.mkdir(parents=True, exist_ok=True)
    harmless = (*experiment.HARMLESS, 'distill.method')
    experiment.claim(
      self.workdir / 'config.json', self.config, harmless=harmless
    )
    self._train_teacher()
    folder = self.workdir / 'student'
    baselines = [_Job(Row(BASELINE), seed, folder) for seed in seeds]
    candidates = [
      self._job(row, tune_seed, tuning=True)
      for method in methods
      for group in self._groups(method, settings)
      for row in (group if len(group) > 1 else ())
    ]
    groups = [g for m in methods for g in self._groups(m, settings)]
    count = len(baselines) + len(candidates) + len(groups) * len(seeds)
    self._say(
      f'{len(methods)} methods, {len(groups)} rows, seeds '
      f'{", ".join(map(str, seeds))}: {count} runs beside the teacher'
    )
    # As far as it is known: the rows after tuning are as long as others.
    self.jobs = [*baselines, *candidates]
    self.jobs += [self._job(g[0], s) for s in seeds for g in groups]
    self._work(baselines)
    self._work(candidates)
    chosen = [self._best(group, tune_seed) for group in groups]
    # A seed of all rows before the next seed: a table is there early.
    final = [self._job(row, seed) for seed in seeds for row in chosen]
    self.jobs = [*baselines, *candidates, *final]
    self._work(final)
    found = self._write()
    if not any(job.result.exists() for job in final):
      raise InputError(f'No method finished; see {self.workdir}/compare.md.')
    return found

  def _groups(self, method, settings):
    """Lists of the rows among which --tune chooses, one for each --vary."""
    for row in rows.make_rows(method, settings['vary']):
      tuned = rows.make_rows(method, settings['tune'])
      yield [Row(method, row.settings + other.settings) for other in tuned]

  def _job(self, row, seed, *, tuning=False):
    place = self.workdir / 'tuning' if tuning else self.workdir
    # What chooses does not look at test.
    changes = (('eval.test_split', ''),) if tuning else ()
    return _Job(row, seed, place / self.equal / row.folder, changes)

  def _best(self, group, seed):
    """The row of a group with the highest mIoU on val, the first of equals."""
    if len(group) == 1:
      return group[0]
    scores = {}
    for row in group:
      result = self._job(row, seed, tuning=True).result
      if result.exists():
        scores[row] = json.loads(result.read_text())['miou'] or 0.0
    best = max(scores, key=scores.get, default=group[0])
    self._say(f'chosen on val with seed {seed}: {best.title}')
    return best

  def _say(self, text):
    if processes.is_first():
      print(f'[compare] {text}', flush=True)

  @property
  def _teacher_folder(self):
    return '' if self.given else str(self.workdir / 'teacher' / 'teacher')

  def _train_teacher(self):
    if self.given:
      return
    config = self.config.copy_and_resolve_references()
    config.stages = ('teacher',)
    waiting = False
    while True:
      try:
        experiment.train(config, self.workdir / 'teacher', stop=self.stop)
        return
      except lock.InUse as error:
        waiting = self._wait(error, waiting)

  def _wait(self, reason, waiting):
    if not waiting:
      self._say(f'waiting: {reason}')
    time.sleep(_POLL_SECONDS)
    return True

  def _work(self, jobs):
    """Returns when all jobs are done, here or by another command."""
    waiting = False
    while jobs:
      busy = [job for job in jobs if not self._attempt(job)]
      if len(busy) == len(jobs):
        what = ', '.join(map(str, busy))
        waiting = self._wait(f'another command trains {what}', waiting)
      jobs = busy

  def _attempt(self, job):
    """Whether a job is done, also if it failed; not so if it is another's."""
    if processes.from_first(job.result.exists()):
      return True
    try:
      facts = self._facts(job)
      if 'failed' in facts:
        return True
      unfinished = sum(not x.result.exists() for x in self.jobs)
      number = len(self.jobs) - unfinished + 1
      left = f'about {logs.duration(self._seconds_left())} left'
      self._say(f'run {number} of {len(self.jobs)}: {job}; {left}')
      start = time.monotonic()
      self._train(job, facts)
      passed = time.monotonic() - start
      self.pace = passed / (facts['num_steps'] * facts['step_seconds'])
    except lock.InUse:
      return False
    self._write()
    return True

  def _train(self, job, facts):
    config = self._configured(job.row, seed=job.seed)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(job.changes))
    config.student.num_epochs = facts['num_epochs']
    scores = self._teacher_scores() if job.row.method else None
    failed = job.directory / 'failed.json'
    try:
      experiment.train(
        config, job.directory, stop=self.stop, teacher_scores=scores
      )
      failed.unlink(missing_ok=True)
    except lock.InUse:
      raise
    except Exception as error:
      if not job.row.method:
        raise
      self._note_failure(failed, job, error)

  def _note_failure(self, path, what, error):
    """Writes down that a row, or one of its runs, failed; returns that."""
    text = first_line(error)
    self._say(f'{what} failed: {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {'failed': text, 'traceback': traceback.format_exc()}
    logs.write_json(path, facts)
    return facts

  def _configured(self, row, **others):
    return row.configured(self.config, teacher=self._teacher_folder, **others)

  def _facts(self, job):
    """What row.json says of a row; what it costs is measured once."""
    path = job.folder / 'row.json'
    if job.folder in self.failed:
      return self.failed[job.folder]
    found = json.loads(path.read_text()) if path.exists() else {}
    found = processes.from_first(found)
    if 'step_seconds' in found:
      return found
    job.folder.mkdir(parents=True, exist_ok=True)
    row = job.row
    facts = {
      'method': row.method,
      'title': row.title,
      'settings': dict(row.settings),
      'equal': self.equal,
    }
    if processes.is_first():
      with lock.locked(job.folder):
        return self._measured(job, facts, path)
    return self._measured(job, facts, path)

  def _measured(self, job, facts, path):
    row = job.row
    self._say(f'measuring the step of {row.title} ...')
    try:
      stage = self._stage(row)
      baseline = self._stage(Row(BASELINE)) if row.method else stage
      facts |= cost.measure(stage, baseline)
    except Exception as error:
      if not row.method:
        raise
      failure = self._note_failure(path, row.title, error)
      logs.write_json(path, facts | failure)
      self.failed[job.folder] = failure
      return failure
    epochs = self.config.student.num_epochs
    if row.method and self.equal == 'seconds':
      ratio = facts['baseline_step_seconds'] / facts['step_seconds']
      facts['seconds_factor'] = self.factor
      epochs = float(f'{epochs * self.factor * ratio:.4g}')
    per_epoch = len(self._dataset.splits['train']) / self.config.batch_size
    facts |= {
      'num_epochs': epochs,
      'num_steps': max(round(epochs * per_epoch), 1),
      'flags': row.flags(**{'student.num_epochs': epochs}),
    }
    logs.write_json(path, facts)
    return facts

  def _stage(self, row):
    config = self._configured(row)
    config.data.update(self._dataset.settled)
    return make_stage(
      row.stage, config, self._dataset, self._mesh, self.workdir
    )

  @functools.cached_property
  def _dataset(self):
    return load_dataset(self.config.data)

  @functools.cached_property
  def _mesh(self):
    return sharding.make_mesh(self.config.mesh.data, self.config.mesh.spatial)

  def _teacher_scores(self):
    """On val, from wherever the teacher was scored first; or None."""
    if not self.given:
      path = self.workdir / 'teacher' / 'teacher' / 'result.json'
      return table.scores_of(json.loads(path.read_text()))
    return processes.from_first(table.teacher_record(self.workdir))

  def _seconds_left(self):
    costs = {}
    for job in self.jobs:
      path = job.folder / 'row.json'
      if path.exists() and 'step_seconds' in (
        facts := json.loads(path.read_text())
      ):
        costs[job.folder] = facts['num_steps'] * facts['step_seconds']
    usual = sum(costs.values()) / max(len(costs), 1)
    left = [x for x in self.jobs if not x.result.exists()]
    return self.pace * sum(costs.get(x.folder, usual) for x in left)

  def _write(self):
    """The table as far as it is known."""
    found = table.collect(self.workdir, command=self.command)
    if processes.is_first():
      table.write(found, self.workdir)
    return found
