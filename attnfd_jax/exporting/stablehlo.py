# SPDX-License-Identifier: Apache-2.0
"""A network as one StableHLO program, its weights in fewer bits if asked."""

import dataclasses
import functools

import jax
from jax import export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from attnfd_jax.models.deeplab import normalise

WEIGHTS = ('float32', 'bfloat16', 'int8')
PLATFORMS = ('cpu', 'cuda', 'tpu')
# Smaller images have maps of single pixels.
SMALLEST = 32


@dataclasses.dataclass
class Small:
  """A kernel in fewer bits: `values` times `scale`, of the same rank."""

  values: np.ndarray
  scale: np.ndarray


def shrink(variables, weights):
  """The variables with kernels as `Small`, in int8 with a scale by channel."""

  def store(x):
    if x.ndim != 4:
      return x
    if weights == 'bfloat16':
      return Small(x.astype(ml_dtypes.bfloat16), np.ones((1,) * 4, np.float32))
    largest = np.max(np.abs(x), (0, 1, 2), keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Small(np.rint(x / scale).astype(np.int8), scale)

  return variables if weights == 'float32' else jax.tree.map(store, variables)


def grow(stored):
  """float32 variables of what `shrink` returns."""

  def load(x):
    if not isinstance(x, Small):
      return x
    # In the program: as NumPy arrays they would be in it in float32.
    return jnp.asarray(x.values).astype(jnp.float32) * x.scale

  return jax.tree.map(load, stored)


@functools.lru_cache
def make_forward(network, *, uint8, argmax):
  """Jitted (variables, image [b, h, w, 3]) -> what a file finds: of RGB bytes
  or normalized float32, class ids [b, h, w], uint8, or float32 logits.
  """

  @jax.jit
  def forward(variables, image):
    image = normalise(image) if uint8 else image
    logits = network.apply(variables, image, train=False)['logits']
    return jnp.argmax(logits, -1).astype(jnp.uint8) if argmax else logits

  return forward


def make_program(forward, stored, *, uint8):
  """`forward`, made with the same `uint8`, and what `shrink` stored, as bytes
  that jax.export.deserialize reads, for any [b, h, w] from 32 x 32.
  """
  limits = [f'{n} >= {SMALLEST}' for n in 'hw']
  sizes = export.symbolic_shape('b, h, w', constraints=limits)
  dtype = jnp.uint8 if uint8 else jnp.float32
  image = jax.ShapeDtypeStruct((*sizes, 3), dtype)
  program = jax.jit(lambda image: forward(grow(stored), image))
  return export.export(program, platforms=PLATFORMS)(image).serialize()
