# SPDX-License-Identifier: Apache-2.0
"""Several processes in one job: joining them, and who writes.

All of them run the same program on the same global arrays; each reads its
share of the images, and the first one writes what people read.
"""

import json
import os
import re

import jax
from jax.experimental import multihost_utils
import numpy as np

from attnfd_jax.errors import first_line, InputError, within

_SLURM = 'SLURM_STEP_NODELIST'
# Of processes that a launcher started to work together.
_LAUNCHED = (_SLURM, 'OMPI_MCA_orte_hnp_uri', 'JOB_COMPLETION_INDEX')
_ALL_THREE = '--coordinator, --num_processes and --process_id'


def initialise(*, coordinator=None, num_processes=None, process_id=None):
  """Joins the processes of a job; before any other call of jax.

  Without arguments JAX looks for Slurm, Open MPI, Kubernetes and Cloud TPU;
  where it finds none of them this process is alone, and so it is, without
  looking, with num_processes=1. `coordinator` is HOST:PORT of process 0.
  InputError if one of the three is missing or wrong, or processes cannot meet.
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
      f'{", ".join(missing)} missing: several processes need {_ALL_THREE}.'
    )
  if not missing:
    if not re.fullmatch(r'.+:\d+', coordinator):
      raise InputError(f'--coordinator={coordinator} must be HOST:PORT.')
    within('--process_id', process_id, 0, num_processes - 1)
  # An interactive shell of a cluster: it would lose all devices but one.
  elif _SLURM in os.environ and os.environ.get('SLURM_NTASKS', '1') == '1':
    return
  options = {'cluster_detection_method': None if missing else 'deactivate'}
  try:
    jax.distributed.initialize(*flags.values(), **options)
  except Exception as error:  # Of sockets, of clusters, of missing packages.
    if missing and not any(marker in os.environ for marker in _LAUNCHED):
      return  # No cluster: a ValueError, or no metadata server.
    raise InputError(
      f'The processes of this job cannot meet: {first_line(error)} Give '
      f'{_ALL_THREE}, or --num_processes=1 to run alone.'
    ) from error


def is_first():
  """True in the one process that writes; starts no backend."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(name):
  """Returns when all processes have come here, with what they wrote."""
  multihost_utils.sync_global_devices(name)


def any_of(flag):
  """True in all processes if `flag` is in one of them; all must ask."""
  return bool(multihost_utils.process_allgather(flag).any())


def from_first(value):
  """What the first process passes, as JSON can hold it, in all processes."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  # Only that of the first one counts.
  data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
  return json.loads(np.asarray(data).astype(np.uint8).tobytes())
