# SPDX-License-Identifier: Apache-2.0
"""What training changes: arrays only, so that it saves and shards as it is."""

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """State of one stage.

  Attributes:
    step: int32 scalar, updates applied so far.
    params: {'student': ..., 'distiller': ...}; the network in training is
      called student in every stage. Without a teacher there is no distiller.
    collections: same keys, everything that is not trained: running statistics,
      memories, the teacher's frozen gates.
    opt_state: of the optimizer.
    ema: averaged params, of the same keys, or {}. Statistics are averages
      already, and are not averaged again.
  """

  step: jax.Array
  params: dict
  collections: dict
  opt_state: optax.OptState
  ema: dict

  def variables(self, name):
    """Of 'student' or 'distiller' as they are evaluated: averaged if kept."""
    params = (self.ema or self.params)[name]
    return {'params': params, **self.collections[name]}


def make_state(variables, tx, *, ema):
  """TrainState of {'student': variables, ...}; `ema` keeps an average."""
  collections = {name: dict(parts) for name, parts in variables.items()}
  params = {name: x.pop('params', {}) for name, x in collections.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections=collections,
    opt_state=tx.init(params),
    # Copies: a donated state must not hold one buffer twice.
    ema=jax.tree.map(jnp.copy, params) if ema else {},
  )
