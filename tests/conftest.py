# SPDX-License-Identifier: Apache-2.0
"""Four CPU devices and no implicit promotion, set before jax starts."""

import contextlib
import os
import tempfile

import type_checks
import xla_flags

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Else the commands under test would use, and fill, the user's own cache; by
# the environment, so that processes of tests have it too.
_CACHE = tempfile.TemporaryDirectory(prefix='attnfd_jax_tests_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
os.environ['XDG_CACHE_HOME'] = _CACHE.name
# Of two equal flags XLA takes the last.
os.environ['XLA_FLAGS'] = (
  f'{xla_flags.quick(4)} {os.environ.get("XLA_FLAGS", "")}'
)

type_checks.install()

# The lines above must run first.
from absl import flags  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import small_run  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# grain reads a flag, and no test runs under absl.app.
flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
  # Nothing long may be left for the end, when one process waits for the other.
  items.sort(key=lambda item: 'training' not in item.path.parts)


@pytest.fixture(scope='module')
def kept_programs(tmp_path_factory):
  """Later runs of a file reuse the programs of earlier ones."""
  with small_run.kept_programs(tmp_path_factory.mktemp('programs')):
    yield


@pytest.fixture
def no_type_checks():
  """Calls as users make them: our own errors, not those of the annotations."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', before)


@pytest.fixture
def key():
  """A jax key; split it, or fold_in, for more than one use."""
  return jax.random.key(0)


@pytest.fixture
def fill():
  """(shapes or arrays, seed) -> the tree with NumPy values, never 0 or 1.

  Norms and biases of a fresh network are neutral, so that a test could not see
  them; and this compiles nothing.
  """

  def fill(tree, seed=0):
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
      if leaf.ndim > 1:
        fan_in = np.prod(leaf.shape[:-1])
        values = generator.normal(size=leaf.shape) * (2 / fan_in) ** 0.5
      elif path[-1].key in ('scale', 'var'):
        values = generator.uniform(0.5, 1.5, leaf.shape)
      else:
        values = generator.uniform(-0.5, 0.5, leaf.shape)
      return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)

  return fill


@pytest.fixture
def standard_promotion():
  """For code of others that mixes types: optax.adam raises float ** int32."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture
def x64():
  """A context in which arrays are float64: derivatives without rounding."""

  @contextlib.contextmanager
  def context():
    jax.config.update('jax_enable_x64', True)
    try:
      yield
    finally:
      jax.config.update('jax_enable_x64', False)

  return context
