# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: teacher, baseline, then every row and seed.

  <workdir>/
    config.json  compare.json  compare.md  compare.html
    teacher/              a run with the stage `teacher`, if none is given
    student/seed0/        the baseline
    steps/attnfd/seed0/   a row's run; seconds/ with --equal=seconds
    tuning/steps/...      candidates of --tune, and what was chosen

Each is a run's folder as of `main`, beside a row.json with the row's cost. What
is finished is skipped, so that a comparison resumes, grows by methods and
seeds, and is shared by several commands.
"""

import dataclasses
import functools
import time
import traceback

from attnfd_jax import paths, user_code
from attnfd_jax.comparison import cost, rows, sharing, table
from attnfd_jax.comparison.rows import BASELINE, Row
from attnfd_jax.config import resolve
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import processes, sharding
from attnfd_jax.errors import first_line, InputError, one_of, within
from attnfd_jax.runs import lock, logs
from attnfd_jax.training import experiment
from attnfd_jax.training.stage import make_stage, plan
from attnfd_jax.training.stopping import Stop

# Of a single run: the folder may have moved, with its teacher; the method is
# that of the row, whatever the config says.
_HARMLESS = (*experiment.HARMLESS, 'distill.method', 'teacher.checkpoint')


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
    'tune': rows.parse_settings('tune', tune, config),
    'vary': rows.parse_settings('vary', vary, config),
  }
  rows.check(config, methods, settings)
  _check_seeds(seeds, tune_seed, tuned=bool(tune))
  runner = _Runner(config, workdir, equal, seconds_factor, command, stop)
  return runner.run(methods, seeds, settings, tune_seed)


def _check_seeds(seeds, tune_seed, *, tuned):
  if not seeds or len({*seeds}) < len(seeds):
    raise InputError(f'--seeds={seeds}: give different numbers, as 0,1,2.')
  for seed in seeds:
    within('--seeds', seed, 0, 2**31 - 1)
  within('--tune_seed', tune_seed, 0, 2**31 - 1)
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
    self.failed = {}  # Rows' folders and runs to facts; a restart tries again.
    self.pace = 1.0  # Of whole runs, over that of their steps.

  def run(self, methods, seeds, settings, tune_seed):
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
    # As far as it is known: the rows after tuning are as long as others.
    planned = [self._job(g[0], seed) for seed in seeds for g in groups]
    if candidates:
      self._work([*baselines, *candidates], planned)
    chosen = [self._best(group, tune_seed) for group in groups]
    # A seed of all rows before the next seed: a table is there early.
    final = [self._job(row, seed) for seed in seeds for row in chosen if row]
    self._measure(final)
    self._work([*baselines, *final])
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

  def _begin(self, every_row):
    """Claims the folder; refuses one that was begun with something else."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    with sharing.holding(self.workdir, wait=True):
      harmless = (*experiment.HARMLESS, 'distill.method')
      path = self.workdir / 'config.json'
      experiment.claim(path, self.config, harmless=harmless)
      for path in self.workdir.glob('seconds/*/row.json'):
        factor = logs.read_json(path).get('seconds_factor')
        if factor and self.equal == 'seconds' and factor != self.factor:
          raise InputError(
            f'{path.parent} was begun with --seconds_factor={factor:g}; use '
            'that, or another --workdir.'
          )
      # Rows of one table use the same files of the user's.
      path = self.workdir / 'code.json'
      known = sharing.read_json(path)
      for row in every_row:
        code = row.configured(self.config)
        if user_code.specs(code) and processes.is_first():
          known |= user_code.store(self.workdir, code, known)
          logs.write_json(path, known)

  def _best(self, group, seed):
    """The row of a group with the highest mIoU on val, the first of equals; or
    None if none has one. It is chosen once, and written down.
    """
    if len(group) == 1:
      return group[0]
    jobs = [self._job(row, seed, tuning=True) for row in group]
    path = jobs[0].folder.with_name(f'{group[0].folder}-seed{seed}.json')
    names = [row.name for row in group]
    with sharing.holding(self.workdir, wait=True):
      found = sharing.read_json(path)
      if found.get('candidates') != names:
        scores = {
          job.row.name: logs.read_json(job.result)['miou'] or 0.0
          for job in jobs
          if job.result.exists()
        }
        best = max(scores, key=scores.get, default=None)
        found = {'candidates': names, 'scores': scores, 'chosen': best}
        if best:
          logs.write_json(path, found)
      found = processes.from_first(found)
    if not found['chosen']:
      sharing.say(f'no candidate of {group[0].title} finished')
      return None
    best = group[names.index(found['chosen'])]
    sharing.say(f'chosen on val with seed {seed}: {best.title}')
    return best

  @property
  def _teacher_folder(self):
    return '' if self.given else str(self.workdir / 'teacher' / 'teacher')

  def _train_teacher(self):
    if self.given:
      return
    config = self.config.copy_and_resolve_references()
    config.stages = ('teacher',)

    def attempt():
      with sharing.holding(self.workdir / 'teacher', name='.compare'):
        experiment.train(
          config, self.workdir / 'teacher', stop=self.stop, harmless=_HARMLESS
        )

    sharing.until_done([attempt], 'another command trains the teacher')

  def _measure(self, jobs):
    """Writes the row.json of each row: the plan is known before the runs."""
    unique = {job.folder: job for job in jobs}.values()
    sharing.until_done(
      [functools.partial(self._facts, job) for job in unique],
      'another command measures the rows',
    )

  def _work(self, jobs, later=()):
    """Returns when all jobs are done, here or by another command."""
    every = [*jobs, *later]
    sharing.until_done(
      [functools.partial(self._do, job, every) for job in jobs],
      'another command trains the rest',
    )

  def _done(self, job):
    failed = job.folder in self.failed or job.directory in self.failed
    return failed or processes.from_first(job.result.exists())

  def _do(self, job, every):
    """Trains a job; InUse if another command does."""
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

  def _train(self, job, facts):
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
        harmless=_HARMLESS,
      )
      path.unlink(missing_ok=True)
    except Exception as error:
      in_use = isinstance(error, lock.InUse)  # By a `main` that was typed.
      if in_use or not job.row.method or not sharing.is_of_one_row(error):
        raise
      self.failed[job.directory] = self._note_failure(path, job, error)

  def _note_failure(self, path, what, error, facts=None):
    """Writes down that a row, or one of its runs, failed, beside other facts of
    it; returns all.
    """
    # What was saved by then depends on the clock.
    text = first_line(error).split(' Last good checkpoint')[0]
    sharing.say(f'{what} failed: {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    failure = {'failed': text, 'traceback': traceback.format_exc()}
    facts = (facts or {}) | failure
    logs.write_json(path, facts)
    return facts

  def _facts(self, job):
    """What row.json says of a row; what it costs is measured once. InUse if
    another command is at it.
    """
    if job.folder in self.failed:
      return self.failed[job.folder]
    path = job.folder / 'row.json'
    if not _is_measured(found := sharing.read_json(path)):
      with sharing.holding(job.folder):
        # Another command may have been faster.
        if not _is_measured(found := sharing.read_json(path)):
          found = self._measure_row(job, path)
    return found

  def _measure_row(self, job, path):
    row = job.row
    facts = {
      'name': row.name,
      'method': row.method,
      'title': row.title,
      'settings': dict(row.settings),
      'equal': self.equal,
    }
    sharing.say(f'measuring the step of {row.title} ...')
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
      # As many evaluations to choose from, and the same share of warm-up.
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

  def _configured(self, row, changes=None):
    return row.configured(
      self.config, teacher=self._teacher_folder, changes=changes
    )

  def _make_stage(self, row):
    config = self._configured(row)
    config.data.update(self._dataset.settled)
    return make_stage(
      row.stage, config, self._dataset, self._mesh, self.workdir
    )

  @functools.cached_property
  def _baseline(self):
    return self._make_stage(Row(BASELINE))

  @functools.cached_property
  def _data_seconds(self):
    return cost.data_seconds(self._baseline)

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
      return table.scores_of(logs.read_json(path))
    return processes.from_first(table.teacher_record(self.workdir))

  def _seconds(self, jobs):
    """How long jobs will take, where their rows were measured."""
    known = {}
    for job in jobs:
      facts = logs.read_json(job.folder / 'row.json')
      if _is_measured(facts):
        known[job.folder] = facts['num_steps'] * facts['step_seconds']
    usual = sum(known.values()) / max(len(known), 1)
    return self.pace * sum(known.get(job.folder, usual) for job in jobs)

  def _write(self):
    """The table as far as it is known."""
    with sharing.holding(self.workdir, wait=True):
      teacher = self._teacher_folder
      command = [*self.command]
      if teacher:
        command += [f'--config.teacher.checkpoint={teacher}']
        if user_code.is_code(self.config.teacher.network):
          command += ['--config.teacher.allow_code']
      found = table.collect(self.workdir, command=command)
      if processes.is_first():
        table.write(found, self.workdir)
      return found


def _is_measured(facts):
  return 'num_steps' in facts


def _scaled(value, factor):
  return float(f'{value * factor:.4g}')
