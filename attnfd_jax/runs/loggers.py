# SPDX-License-Identifier: Apache-2.0
"""Where numbers go besides metrics.jsonl: TensorBoard, Weights & Biases.

Their packages are imported for config.loggers alone. A logger gets every record
of metrics.jsonl, those of before a restart again: it keeps no state that could
disagree with a checkpoint. One that fails is left out.
"""

import contextlib
import importlib
import os
import uuid

from flax import traverse_util

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs.logs import reason


def check(names):
  """Raises InputError, before any work, for a missing package or account."""
  given = f'config.loggers={tuple(names)}'
  for name in names:
    package, _ = _SINKS[name]
    try:
      module = importlib.import_module(package)
      if name == 'wandb' and processes.is_first():
        module.login()  # Asks on a terminal; without one it raises.
    except ImportError as error:
      raise InputError(
        f"{given} needs {package} ({error}): pip install -e '.[{name}]', or "
        f'leave {name} out.'
      ) from error
    except Exception as error:
      raise InputError(
        f'{given}: {reason(error).rstrip(".")}; run wandb login, or set '
        'WANDB_MODE=offline to keep the numbers here.'
      ) from error


@contextlib.contextmanager
def attached(names, log, facts):
  """Loggers get the records of a StageLog: now the past, then the rest.

  There are none but in process 0. `facts` is what a page shows of the config.
  """
  names = sorted({*names}) if processes.is_first() else ()
  sinks = {name: _SINKS[name][1](log.local, facts) for name in names}

  def each(call):
    for name, sink in sinks.items():
      try:
        call(sink)
      except StopIteration:
        pass  # It has failed before.
      except Exception as error:  # Whatever the packages of others raise.
        text = f'{name} fails ({reason(error)}) and is left out'
        log.line(f'{text}; all numbers are in metrics.jsonl')

  def write(record):
    each(lambda sink: sink.send((record['step'], _scalars(record))))

  each(next)
  for record in log.records():
    write(record)
  log.on_record = write
  try:
    yield
  finally:
    each(lambda sink: sink.close())


def _scalars(record):
  """{'kind/name': number}; of a table 'kind/name/entry'."""
  values = {k: x for k, x in record.items() if k not in ('kind', 'step')}
  flat = traverse_util.flatten_dict({record['kind']: values}, sep='/')
  # A class that does not occur has None.
  return {name: x for name, x in flat.items() if x is not None}


def _tensorboard(directory, facts):
  del facts
  import tensorboardX

  # What earlier processes wrote is told again: TensorBoard then hides it.
  writer = tensorboardX.SummaryWriter(str(directory), purge_step=0)
  with contextlib.closing(writer):
    while True:
      step, values = yield
      for name, value in values.items():
        writer.add_scalar(name, value, step)


def _wandb(directory, facts):
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
  try:
    while True:
      step, values = yield
      # A page never goes back: what it has of a killed process stays, and is
      # what this one would write.
      if step >= run.step:
        run.log(values, step=step)
  finally:
    run.finish()


# Packages, and generators that are sent (step, {name: number}) until closed.
_SINKS = {
  'tensorboard': ('tensorboardX', _tensorboard),
  'wandb': ('wandb', _wandb),
}
