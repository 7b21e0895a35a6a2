# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity: found at the step where they begin, and never saved."""

import math

import jax
import jax.numpy as jnp

from attnfd_jax.errors import InputError

_SHOWN = 16  # Names of a batch.


class NonFiniteLoss(InputError):
  """The loss became NaN or infinite; what is saved stays."""


def check(step, metrics, *, names, manager, state=None):
  """Waits for a step's metrics, and stops the run if they are not finite.

  Or a `state` that is to be saved: its loss is that of the weights before.
  `names` maps a step to the names of the images of the batch after it.

  Raises:
    NonFiniteLoss: names the step, its images and the last good checkpoint.
  """
  loss, gradient = jax.device_get((metrics['loss'], metrics['grad_norm']))
  if not math.isfinite(loss):
    what = 'Loss'
  elif not math.isfinite(gradient):
    what = 'Gradient'
  elif state and not _all_finite((state.params, state.collections)):
    what = 'Update of the weights'
  else:
    return
  terms = ', '.join(
    f'{name} {float(value):.4g}'
    for name, value in sorted(jax.device_get(metrics).items())
  )
  images = names(step - 1)
  more = f' and {len(images) - _SHOWN} more' if len(images) > _SHOWN else ''
  saved = manager.latest_step()
  kept = 'There is no checkpoint yet'
  if saved is not None:
    kept = f'Last good checkpoint: step {saved}'
  raise NonFiniteLoss(
    f'{what} is not finite at step {step}: {terms}. Images: '
    f'{", ".join(images[:_SHOWN])}{more}. {kept}. Lower --config.optim.lr or '
    'set --config.optim.clip_norm=1.'
  )


@jax.jit
def _all_finite(tree):
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(finite))
