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
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = [x for x in params.values() if isinstance(x, core.ClosedJaxpr)]
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      features = kernel[params['dimension_numbers'].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // features
    elif name == 'cond':
      # lax.platform_dependent: forms of one convolution, last the plain one.
      inner = params['branches'][-1:]
    total += sum(_count(x.jaxpr) for x in inner)
  return total
