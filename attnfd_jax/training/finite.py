# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity: found at the step where they begin, and never saved."""

import math

import grain
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import pipeline
from attnfd_jax.errors import InputError

_SHOWN = 16  # Names of a batch.


class NonFiniteLoss(InputError):
  """The loss became NaN or infinite; what is saved stays."""


def check_metrics(step, metrics, *, names, manager):
  """Waits for a step's numbers and stops the run if they are not finite.

  Args:
    step: updates applied, this one included.
    metrics: of that step, with 'loss'.
    names: step -> names of the images that it was given.
    manager: with latest_step().

  Raises:
    NonFiniteLoss: if loss or gradient are NaN or infinite.
  """
  wanted = ('loss', 'grad_norm')
  values = jax.device_get({k: metrics[k] for k in wanted if k in metrics})
  bad = [k for k in wanted if k in values and not math.isfinite(values[k])]
  if bad:
    what = 'Loss' if bad[0] == 'loss' else 'Gradient'
    raise _error(what, step, metrics, names, manager)


def check_state(step, state, metrics, *, names, manager):
  """Stops before weights or statistics that are not finite are saved.

  Raises:
    NonFiniteLoss: if there are such.
  """
  if not _all_finite((state.params, state.collections)):
    raise _error('Update of the weights', step, metrics, names, manager)


@jax.jit
def _all_finite(tree):
  return jnp.all(
    jnp.stack(
      [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact)
      ]
    )
  )


def _error(what, step, metrics, names, manager):
  terms = ', '.join(
    f'{name} {float(value):.4g}'
    for name, value in sorted(jax.device_get(metrics).items())
  )
  # Step n takes the batch after n - 1 others.
  images = names(step - 1)
  more = f' and {len(images) - _SHOWN} more' if len(images) > _SHOWN else ''
  saved = manager.latest_step()
  kept = 'There is no checkpoint yet'
  if saved is not None:
    kept = f'Last good checkpoint: step {saved}'
  return NonFiniteLoss(
    f'{what} is not finite at step {step}: {terms}. Images: '
    f'{", ".join(images[:_SHOWN])}{more}. {kept}. Lower --config.optim.lr or '
    'set --config.optim.clip_norm=1.'
  )


class _Indices:
  """In place of a source: records that know only where they are from."""

  def __init__(self, length):
    self._length = length

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return {'index': index}


class _Unchanged(grain.transforms.RandomMap):
  def random_map(self, element, rng):
    del rng
    return element


def batch_names(source, *, batch_size, seed, step, balance=None):
  """Names of the images that this process reads after `step` batches.

  The order is a function of seed and step: nothing needs to be kept.

  Args:
    source: see data/sources.py.
    batch_size, seed, balance: see pipeline.train_batches.
    step: batches before this one.
  """
  batches = pipeline.train_batches(
    _Indices(len(source)),
    _Unchanged(),
    batch_size=batch_size,
    seed=seed,
    step=step,
    balance=balance,
    threads=1,
  )
  indices = np.asarray(next(iter(batches))['index']).tolist()
  return [source.name(index) for index in indices]


def configured_names(config, dataset, step):
  """`batch_names` of the split train, as a resolved config wants them."""
  return batch_names(
    dataset.splits['train'],
    batch_size=config.batch_size,
    seed=config.seed,
    step=step,
    balance=pipeline.make_balance(config, dataset),
  )
