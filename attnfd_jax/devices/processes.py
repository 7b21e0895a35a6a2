# SPDX-License-Identifier: Apache-2.0
"""Connects the processes of a job and exchanges values between them.

All run the same program on the same global arrays. Each reads its share of the
images; the first one writes logs, results and reports.
"""

import json
import os
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from attnfd_jax.errors import check_range, first_line, InputError

_SLURM = 'SLURM_STEP_NODELIST'
# Set in processes that a launcher started as one job.
_LAUNCHED = (_SLURM, 'OMPI_MCA_orte_hnp_uri', 'JOB_COMPLETION_INDEX')
_ALL_THREE = '--coordinator, --num_processes and --process_id'


def initialize(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Connects the processes of a job; call it before any other function of JAX.

  Without arguments JAX detects Slurm, Open MPI, Kubernetes and Cloud TPU. If
  there is none of them, this process runs alone.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: in the job. Given alone, 1 skips the detection.
    process_id: of this process, from 0.

  Raises:
    InputError: if some of the three are missing or wrong, or the connection
      fails.
  """
  flags = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if num_processes == 1 and len(missing) == 2:
    return
  if 0 < len(missing) < 3:
    raise InputError(
      f'{", ".join(missing)} missing: for several processes, give {_ALL_THREE}.'
    )
  if not missing:
    assert coordinator is not None and num_processes is not None
    if not re.fullmatch(r'.+:\d+', coordinator):
      raise InputError(f'--coordinator={coordinator} must be HOST:PORT.')
    check_range('--process_id', process_id, 0, num_processes - 1)
  # An interactive shell of a cluster: joining would hide all devices but one.
  elif _SLURM in os.environ and os.environ.get('SLURM_NTASKS', '1') == '1':
    return
  detection = None if missing else 'deactivate'
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method=detection,
    )
  except Exception as error:  # Sockets, clusters and missing packages raise.
    if missing and not any(marker in os.environ for marker in _LAUNCHED):
      return  # No cluster: a ValueError, or no metadata server.
    raise InputError(
      f'The processes of this job cannot connect: {first_line(error)} Give '
      f'{_ALL_THREE}, or --num_processes=1 to run alone.'
    ) from error


def is_first() -> bool:
  """True in the one process that writes; does not start a backend."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until all processes have made the same call."""
  multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
  """Whether `flag` is true in any process; all processes must call it."""
  return bool(multihost_utils.process_allgather(flag).any())


def from_first(value: Any) -> Any:
  """Broadcasts a JSON value from the first process; all must call it."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  # The content matters only in the first process.
  data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
  return json.loads(np.asarray(data).astype(np.uint8).tobytes())
