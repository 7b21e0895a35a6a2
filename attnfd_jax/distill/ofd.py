# SPDX-License-Identifier: Apache-2.0
"""OFD, the comprehensive overhaul of feature distillation (arXiv 1904.01866).

Of maps before their ReLU, six in DeepLabV3+; x the teacher's, s the student's
after a 1x1 convolution and batch normalization, m the margin of each channel:

  y = max(x, m)
  loss = sum over maps of the sum of (s - y)^2 where s > y or y > 0, / d / b

What the teacher's ReLU would remove asks of the student only to be below it.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill.attnfd import Connector
from attnfd_jax.distill.method import CONNECTOR_SCHEDULES
from attnfd_jax.errors import InputError, one_of, within
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers
from attnfd_jax.models.deeplab import RAW_TAPS

# Share of values below 0 under which the expectation is not computed.
FEW = 1e-3


def margin(scale, bias):
  """E[x | x < 0] of x ~ N(bias, scale^2), -3 |scale| where that is rare.

  By the last batch normalization before the ReLU; where the map is its sum with
  a shortcut, that is an approximation, and the published one.
  """
  scale, bias = (
    x.astype(layers.at_least_float32(x.dtype)) for x in (scale, bias)
  )
  scale = jnp.abs(scale)
  # A channel that a scale of 0 has fixed at its bias.
  ratio = bias / jnp.maximum(scale, 1e-12)
  share = jax.scipy.special.ndtr(-ratio)
  density = jnp.exp(-jnp.square(ratio) / 2) / math.sqrt(2 * math.pi)
  mean = bias - scale * density / jnp.maximum(share, FEW)
  return jnp.where(share > FEW, mean, -3 * scale)


def partial_distance(student, target):
  """Sum of squared differences where student > target or target > 0."""
  target = jax.lax.stop_gradient(target)
  counted = (student > target) | (target > 0)
  # The difference is chosen, not its square: no gradient where nothing counts.
  return jnp.sum(jnp.square(jnp.where(counted, student - target, 0)))


class OFD(nn.Module):
  """Of maps that DeepLabV3Plus gives when they are asked for.

  The loss is a sum over pixels and channels: with other sizes of images, try
  weights around the published 1e-5.

  Attributes:
    taps: names of maps before a ReLU, see RAW_TAPS.
    divisors: d of each.
    connector_schedule: see training/optim.py; 'warmup' is the authors'.
  """

  taps: tuple[str, ...] = RAW_TAPS
  divisors: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 1.0, 16.0)
  connector_schedule: str = 'warmup'

  def __post_init__(self):
    one_of('connector_schedule', self.connector_schedule, CONNECTOR_SCHEDULES)
    if len(self.taps) != len(self.divisors):
      raise InputError(
        f'divisors={tuple(self.divisors)} must be one for each of '
        f'taps={tuple(self.taps)}.'
      )
    for divisor in self.divisors:
      within('divisors', divisor, 1e-30, 1e30)
    super().__post_init__()

  @property
  def extra_taps(self):
    """What it asks the networks for."""
    return tuple(self.taps)

  def parameter_groups(self):
    """All it has are connectors."""
    return ((r'connectors_\w+/.*', 'connectors'),)

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; one term for each tap."""
    del labels, step
    terms, b = {}, student['logits'].shape[0]
    for tap, divisor in zip(self.taps, self.divisors, strict=True):
      ours, theirs, norm = _maps(student, teacher, tap)
      theirs = jax.lax.stop_gradient(theirs)
      theirs = theirs.astype(layers.at_least_float32(theirs.dtype))
      least = margin(norm['scale'], norm['bias'])
      target = jnp.maximum(theirs, layers.per_channel(least, theirs))
      connector = Connector(target.shape[-1], name=f'connectors_{tap}')
      ours = connector(ours, train=train).astype(target.dtype)
      terms[tap] = partial_distance(ours, target) / (divisor * b)
    total = b * sum(terms.values())
    return Mean(total, jnp.asarray(b, total.dtype)), terms


def _maps(student, teacher, tap):
  """The two maps of a tap, and the teacher's normalization before its ReLU."""
  for role, side in (('student', student), ('teacher', teacher)):
    if tap not in side['features']:
      raise ValueError(
        f'The {role} has no map {tap!r}, only '
        f'{", ".join(side["features"]) or "none"}. OFD compares maps before a '
        'ReLU: use network=deeplabv3plus, or another method.'
      )
  if tap not in teacher.get('norms', {}):
    raise ValueError(
      f'The teacher gives no norms[{tap!r}], the scale and bias of its last '
      'batch normalization, which OFD computes margins from: use a teacher of '
      'this package, or another method.'
    )
  ours, theirs = (side['features'][tap] for side in (student, teacher))
  if ours.shape[1:3] != theirs.shape[1:3]:
    raise ValueError(
      f'Sizes differ at {tap!r}: student {ours.shape}, teacher {theirs.shape}. '
      'OFD compares pixel by pixel: use networks of one output_stride.'
    )
  return ours, theirs, teacher['norms'][tap]
