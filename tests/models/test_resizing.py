# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing against matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from plain import interpolation, normal
import pytest

from attnfd_jax.models import resizing

# Sums of at most some hundred products, in another order than NumPy's.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


@pytest.mark.parametrize(
  ('before', 'after'),
  [
    ((5, 4), (5, 4)),
    ((5, 9), (17, 5)),
    ((3, 7), (6, 20)),
    ((33, 17), (129, 16)),
    ((1, 1), (4, 5)),
    ((5, 4), (1, 1)),
    ((1, 5), (3, 1)),
    ((7, 1), (3, 3)),
    ((5, 5), (1, 7)),
    ((1, 4), (1, 7)),
  ],
  ids=lambda size: 'x'.join(map(str, size)),
)
def test_resize_aligns_corners(before, after):
  x, weight = normal(0, 2, *before, 3), normal(1, 2, *after, 3)
  rows, columns = map(interpolation, after, before)

  @jax.jit
  def run(x, weight):
    y, pull_back = jax.vjp(lambda x: resizing.resize(x, *after), x)
    return y, pull_back(weight)[0]

  y, dx = run(x, weight)
  formula = 'ip,jq,bpqc->bijc'
  expected = np.einsum(formula, rows, columns, x)
  np.testing.assert_allclose(y, expected, **CLOSE)
  expected = np.einsum(formula, rows.T, columns.T, weight)
  # Positions are float32: up to 129 of them round to about 1e-5.
  np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=2e-4)
  corners = np.ix_(range(2), (0, -1), (0, -1))
  if min(*before, *after) > 1:
    np.testing.assert_allclose(y[corners], x[corners], **CLOSE)


def test_resize_keeps_the_type():
  x = jnp.ones((1, 3, 3, 2), jnp.bfloat16)
  assert resizing.resize(x, 5, 5).dtype == jnp.bfloat16
