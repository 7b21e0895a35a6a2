# SPDX-License-Identifier: Apache-2.0
"""Exports networks as StableHLO programs, also with smaller weights."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from attnfd_jax.models.deeplab import normalize
from attnfd_jax.types import PyTree, Variables

WEIGHTS = ('float32', 'bfloat16', 'int8')
PLATFORMS = ('cpu', 'cuda', 'tpu')
# With smaller images the last feature maps have a single pixel.
SMALLEST = 32


@dataclasses.dataclass
class Small:
  """A kernel in bfloat16 or int8: `values` times `scale`, of the same rank."""

  values: np.ndarray
  scale: np.ndarray


def shrink(variables: Variables, weights: str) -> PyTree:
  """The variables with kernels as `Small`; int8 has a scale per channel.

  `weights` is one of WEIGHTS; float32 changes nothing.
  """

  def store(x):
    if x.ndim != 4:
      return x
    if weights == 'bfloat16':
      return Small(x.astype(ml_dtypes.bfloat16), np.ones((1,) * 4, np.float32))
    largest = np.max(np.abs(x), (0, 1, 2), keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Small(np.rint(x / scale).astype(np.int8), scale)

  return variables if weights == 'float32' else jax.tree.map(store, variables)


def grow(stored: PyTree) -> PyTree:
  """float32 variables from the result of `shrink`."""

  def load(x):
    if not isinstance(x, Small):
      return x
    # Converted inside the program, which would otherwise contain float32.
    return jnp.asarray(x.values).astype(jnp.float32) * x.scale

  return jax.tree.map(load, stored)


@functools.lru_cache
def make_forward(
  network: Any, *, uint8: bool, argmax: bool
) -> jax.stages.Wrapped:
  """Jitted (variables, image [b, h, w, 3]) -> the output of an exported file.

  Args:
    network: see evaluation.evaluate.
    uint8: images are RGB bytes, not normalized float32.
    argmax: return class ids, uint8 [b, h, w], not float32 logits [b, h, w, k].
  """

  @jax.jit
  def forward(variables, image):
    image = normalize(image) if uint8 else image
    logits = network.apply(variables, image, train=False)['logits']
    return jnp.argmax(logits, -1).astype(jnp.uint8) if argmax else logits

  return forward


def make_program(
  forward: Callable[..., Any], stored: PyTree, *, uint8: bool
) -> bytearray:
  """A program for any [b, h, w] from 32 x 32, for jax.export.deserialize.

  Args:
    forward: of make_forward, with the same `uint8`.
    stored: of `shrink`; becomes part of the program.
    uint8: images are RGB bytes.
  """
  limits = [f'{n} >= {SMALLEST}' for n in 'hw']
  sizes = export.symbolic_shape('b, h, w', constraints=limits)
  dtype = jnp.uint8 if uint8 else jnp.float32
  image = jax.ShapeDtypeStruct((*sizes, 3), dtype)
  program = jax.jit(lambda image: forward(grow(stored), image))
  return export.export(program, platforms=PLATFORMS)(image).serialize()
