# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a network, counted on its trace.

Convolutions only, as the tables of networks do; the same number on every
platform, which XLA's own cost analysis does not give.
"""

import math

import jax
from jax.extend import core


def count_flops(function, *args):
  """Operations of the convolutions of one call; multiply and add are two."""
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr):
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
  name, params = equation.primitive.name, equation.params
  result = equation.outvars[0].aval
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    features = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2 * result.size * math.prod(kernel) // features
  if name == 'cond':
    # lax.platform_dependent: forms of one convolution, the last the plain one.
    return _count(params['branches'][-1].jaxpr)
  nested = [p for p in params.values() if isinstance(p, core.ClosedJaxpr)]
  return sum(_count(inner.jaxpr) for inner in nested)
