# SPDX-License-Identifier: Apache-2.0
"""Type aliases shared by several packages."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any, TypeAlias

from etils import epath
import jax
import numpy as np

# Arguments of public functions, which also take NumPy arrays.
AnyArray: TypeAlias = jax.Array | np.ndarray
# Any nesting of dicts, tuples and dataclasses with arrays as leaves.
PyTree: TypeAlias = Any
# Collections of a Flax module: {'params': ..., 'batch_stats': ...}.
Variables: TypeAlias = Mapping[str, PyTree]
# Anything that NumPy and JAX accept as a dtype: 'float32', jnp.bfloat16, ...
DType: TypeAlias = jax.typing.DTypeLike
StrPath: TypeAlias = str | os.PathLike[str]
# Of this machine or, by epath alone, of gs://.
AnyPath: TypeAlias = epath.Path | pathlib.Path
# An ml_collections.ConfigDict, or a group of one. Type checkers would infer
# that each of its attributes may be None, a number or a string. Functions that
# also take a dict with the keys of the group `data`: data.records.DataConfig.
Config: TypeAlias = Any
