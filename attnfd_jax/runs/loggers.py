# SPDX-License-Identifier: Apache-2.0
"""Where numbers go besides metrics.jsonl: TensorBoard, Weights & Biases.

Their packages are optional and imported for config.loggers alone. A logger
gets every record of metrics.jsonl, those of before a restart again: it keeps no
state that could disagree with a checkpoint. One that fails is left out, for a
page in a browser is not worth a training run.
"""

import contextlib
import importlib
import os
import uuid

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError

_PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}


def check(names):
  """What would only fail when a stage begins fails before any work.

  Args:
    names: of config.loggers.

  Raises:
    InputError: for a package or an account that is missing.
  """
  for name in names:
    package = _PACKAGES[name]
    try:
      module = importlib.import_module(package)
    except ImportError as error:
      raise InputError(
        f'config.loggers={tuple(names)} needs {package} ({error}): pip install '
        f"-e '.[{name}]', or leave {name} out."
      ) from error
    if name == 'wandb' and processes.is_first():
      try:
        module.login()  # Asks on a terminal; without one it raises.
      except Exception as error:
        raise InputError(
          f'config.loggers={tuple(names)}: {_first_line(error).rstrip(".")}; '
          'run wandb login, or set WANDB_MODE=offline to keep the numbers here.'
        ) from error


@contextlib.contextmanager
def opened(names, directory, *, facts, say):
  """Loggers of a stage, to be called with records; none but in process 0.

  Args:
    names: of config.loggers.
    directory: of the stage.
    facts: what a page should show of the config.
    say: called with a line about a logger that fails.
  """
  names = sorted({*names}) if processes.is_first() else ()
  loggers = [_Logger(name, directory, facts, say) for name in names]
  try:
    yield loggers
  finally:
    for logger in loggers:
      logger.close()


class _Logger:
  """Writes records until it fails once."""

  def __init__(self, name, directory, facts, say):
    self._name, self._say, self._works = name, say, True
    open_it = {'tensorboard': _open_tensorboard, 'wandb': _open_wandb}[name]
    pair = self._attempt(open_it, directory, facts)
    self._write, self._finish = pair or (None, None)

  def __call__(self, record):
    self._attempt(self._write, record['step'], dict(_scalars(record)))

  def close(self):
    self._attempt(self._finish)

  def _attempt(self, call, *args):
    if not self._works:
      return None
    try:
      return call(*args)
    except Exception as error:  # Whatever the packages of others raise.
      self._works = False
      self._say(
        f'{self._name} fails ({_first_line(error)}) and is left out; all '
        'numbers are in metrics.jsonl'
      )
      return None


def _first_line(error):
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def _scalars(record):
  """Pairs 'kind/name', number; of a table 'kind/name/entry'."""
  kind = record['kind']
  for name, value in record.items():
    if isinstance(value, dict):
      for entry, number in value.items():
        if number is not None:  # A class that does not occur.
          yield f'{kind}/{name}/{entry}', number
    elif name not in ('kind', 'step'):
      yield f'{kind}/{name}', value


def _open_tensorboard(directory, facts):
  del facts
  import tensorboardX

  # What earlier processes wrote is told again: TensorBoard then hides it.
  writer = tensorboardX.SummaryWriter(str(directory), purge_step=0)

  def write(step, values):
    for name, value in values.items():
      writer.add_scalar(name, value, step)

  return write, writer.close


def _open_wandb(directory, facts):
  import wandb

  identity = directory / 'wandb_id.txt'  # One page for all parts of a stage.
  if not identity.exists():
    with paths.replacing(identity) as file:
      file.write(uuid.uuid4().hex[:16].encode())
  run = wandb.init(
    id=identity.read_text(),
    resume='allow',
    project=os.environ.get('WANDB_PROJECT', 'attnfd_jax'),
    group=directory.parent.name,
    name=f'{directory.parent.name}/{directory.name}',
    dir=str(directory),
    config=facts,
  )

  def write(step, values):
    # A page never goes back: what it has of a killed process stays, and is
    # what this one would write.
    if step >= run.step:
      run.log(values, step=step)

  return write, run.finish
