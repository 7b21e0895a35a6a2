# SPDX-License-Identifier: Apache-2.0
"""Sends the records of metrics.jsonl to TensorBoard or Weights & Biases.

Their packages are imported only if config.loggers names them. A logger gets
every record, and after a restart the earlier ones again: it has no state that
could disagree with a checkpoint. A logger that fails is turned off.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
import contextlib
import importlib
import os
from typing import Any, TypeAlias
import uuid

from flax import traverse_util

from attnfd_jax import paths
from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs.logs import reason, StageLog
from attnfd_jax.types import AnyPath

# Is sent (step, {name: number}) until it is closed.
_Sink: TypeAlias = Generator[None, tuple[int, dict[str, float]], None]


def check(names: Collection[str]) -> None:
  """Raises InputError if a logger's package or account is missing."""
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
def attached(
  names: Collection[str], log: StageLog, facts: Mapping[str, Any]
) -> Iterator[None]:
  """Sends loggers the records of a StageLog: the earlier ones, then new ones.

  Only in process 0.

  Args:
    names: keys of config.loggers.
    log: of the stage.
    facts: config of the stage, which Weights & Biases shows.
  """
  names = sorted({*names}) if processes.is_first() else ()
  sinks = {name: _SINKS[name][1](log.local, facts) for name in names}

  def call_all(function: Callable[[_Sink], Any]) -> None:
    for name, sink in sinks.items():
      try:
        function(sink)
      except StopIteration:
        pass  # It failed before.
      except Exception as error:  # Anything that these packages raise.
        text = f'{name} failed ({reason(error)}) and is turned off'
        log.line(f'{text}; all numbers are in metrics.jsonl')

  def write(record: dict[str, Any]) -> None:
    call_all(lambda sink: sink.send((record['step'], _scalars(record))))

  call_all(next)
  for record in log.records():
    write(record)
  log.on_record = write
  try:
    yield
  finally:
    call_all(lambda sink: sink.close())


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """Numbers of a record by 'kind/name', or 'kind/name/entry' of a table."""
  values = {k: x for k, x in record.items() if k not in ('kind', 'step')}
  flat: Any = traverse_util.flatten_dict({record['kind']: values}, sep='/')
  # None is the score of a class that does not occur.
  return {name: x for name, x in flat.items() if x is not None}


def _tensorboard(directory: AnyPath, facts: Mapping[str, Any]) -> _Sink:
  del facts
  import tensorboardX

  # The records of earlier processes are sent again: TensorBoard hides the old.
  writer = tensorboardX.SummaryWriter(str(directory), purge_step=0)
  with contextlib.closing(writer):
    while True:
      step, values = yield
      for name, value in values.items():
        writer.add_scalar(name, value, step)


def _wandb(directory: AnyPath, facts: Mapping[str, Any]) -> _Sink:
  import wandb  # pyright: ignore[reportMissingImports]  # Optional.

  identity = directory / 'wandb_id.txt'  # One page, also after restarts.
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
      # Steps of a page only increase. Records of a killed process stay there,
      # and equal those that this process would write.
      if step >= run.step:
        run.log(values, step=step)
  finally:
    run.finish()


# Package and sink of each logger.
_SINKS: dict[str, tuple[str, Callable[..., _Sink]]] = {
  'tensorboard': ('tensorboardX', _tensorboard),
  'wandb': ('wandb', _wandb),
}
