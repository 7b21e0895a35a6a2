# SPDX-License-Identifier: Apache-2.0
"""Overhaul of feature distillation (OFD, arXiv 1904.01866).

Compares feature maps before their ReLU, six in DeepLabV3+. With x of the
teacher, s of the student after a 1x1 convolution and batch normalization, and m
the margin of each channel:

  y = max(x, m)
  loss = sum over maps of the sum of (s - y)^2 where s > y or y > 0, / d / b

Where the teacher's ReLU would give 0, the student only has to be below y.
"""

from collections.abc import Mapping, Sequence
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.attnfd import Connector
from attnfd_jax.distill.method import (
  CONNECTOR_SCHEDULES,
  LossAndTerms,
  Scalar,
  Step,
)
from attnfd_jax.errors import check_choice, check_range, InputError
from attnfd_jax.losses import Labels, Mean
from attnfd_jax.models import layers
from attnfd_jax.models.deeplab import RAW_TAPS
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

# With a smaller fraction of negative values the expectation is not computed.
FEW = 1e-3


def margin(
  scale: Float[AnyArray, '*shape'], bias: Float[AnyArray, '*shape']
) -> Float[Array, '*shape']:
  """E[x | x < 0] of x ~ N(bias, scale^2); -3 |scale| if x < 0 is rare.

  If the map is the sum of a batch normalization and a shortcut, this is an
  approximation, as published.

  >>> margin(jnp.ones(2), jnp.array([0.0, 9.0])).round(4).tolist()
  [-0.7978..., -3.0]

  Args:
    scale: of the last batch normalization before the ReLU.
    bias: likewise.
  """
  scale, bias = (
    x.astype(layers.at_least_float32(x.dtype)) for x in (scale, bias)
  )
  scale = jnp.abs(scale)
  # A channel with scale 0 is constant, its bias.
  ratio = bias / jnp.maximum(scale, 1e-12)
  share = jax.scipy.special.ndtr(-ratio)
  density = jnp.exp(-jnp.square(ratio) / 2) / math.sqrt(2 * math.pi)
  mean = bias - scale * density / jnp.maximum(share, FEW)
  return jnp.where(share > FEW, mean, -3 * scale)


def partial_distance(
  student: Float[AnyArray, '*shape'], target: Float[AnyArray, '*shape']
) -> Scalar:
  """Sum of squared differences where student > target or target > 0.

  >>> target = jnp.array([-1.0, -1.0, 3.0])
  >>> student = jnp.array([-5.0, 2.0, 1.0])
  >>> float(partial_distance(student, target))  # 3^2 + 2^2
  13.0
  """
  target = jax.lax.stop_gradient(target)
  counted = (student > target) | (target > 0)
  # Select the difference, not its square: no gradient where it is not counted.
  return jnp.sum(jnp.square(jnp.where(counted, student - target, 0)))


class OFD(nn.Module):
  """OFD of maps that DeepLabV3Plus returns on request.

  The loss is a sum over pixels and channels: for other image sizes, try weights
  around the published 1e-5.

  Example:
    `--config.distill.method=ofd --config.distill.ofd.weight=3e-5`

  Attributes:
    taps: names of feature maps before a ReLU, see RAW_TAPS.
    divisors: d of each map.
    connector_schedule: see training/optim.py; the authors use 'warmup'.
  """

  taps: Sequence[str] = RAW_TAPS
  divisors: Sequence[float] = (8.0, 4.0, 2.0, 1.0, 1.0, 16.0)
  connector_schedule: str = 'warmup'

  def __post_init__(self):
    check_choice(
      'connector_schedule', self.connector_schedule, CONNECTOR_SCHEDULES
    )
    if len(self.taps) != len(self.divisors):
      raise InputError(
        f'divisors={tuple(self.divisors)} must be one for each of '
        f'taps={tuple(self.taps)}.'
      )
    for divisor in self.divisors:
      check_range('divisors', divisor, 1e-30, 1e30)
    super().__post_init__()

  @property
  def extra_taps(self) -> tuple[str, ...]:
    """The feature maps to request from the networks."""
    return tuple(self.taps)

  def parameter_groups(self) -> tuple[tuple[str, str], ...]:
    """Puts all parameters, which are connectors, into their group."""
    return ((r'connectors_\w+/.*', 'connectors'),)

  @nn.compact
  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; one term for each tap."""
    del labels, step
    terms, b = {}, student['logits'].shape[0]
    for tap, divisor in zip(self.taps, self.divisors, strict=True):
      student_map, teacher_map, norm = _maps(student, teacher, tap)
      teacher_map = jax.lax.stop_gradient(teacher_map)
      dtype = layers.at_least_float32(teacher_map.dtype)
      teacher_map = teacher_map.astype(dtype)
      least = margin(norm['scale'], norm['bias'])
      target = jnp.maximum(teacher_map, layers.per_channel(least, teacher_map))
      connector = Connector(target.shape[-1], name=f'connectors_{tap}')
      connected = connector(student_map, train=train).astype(target.dtype)
      terms[tap] = partial_distance(connected, target) / (divisor * b)
    total = b * matching.total(terms.values())
    return Mean(total, jnp.asarray(b, total.dtype)), terms


def _maps(
  student: Outputs, teacher: Outputs, tap: str
) -> tuple[
  Float[AnyArray, 'b h w c'],
  Float[AnyArray, 'b h w d'],
  Mapping[str, Float[AnyArray, ' d']],
]:
  """Both maps at a tap, and the teacher's normalization before its ReLU."""
  for role, side in (('student', student), ('teacher', teacher)):
    if tap not in side['features']:
      raise ValueError(
        f'The {role} has no map {tap!r}, only '
        f'{", ".join(side["features"]) or "none"}. OFD compares maps before a '
        'ReLU: use network=deeplabv3plus, or another method.'
      )
  norms = teacher.get('norms', {})
  if tap not in norms:
    raise ValueError(
      f'The teacher gives no norms[{tap!r}], the scale and bias of its last '
      'batch normalization, from which OFD computes margins: use a teacher of '
      'this package, or another method.'
    )
  student_map, teacher_map = (
    side['features'][tap] for side in (student, teacher)
  )
  if student_map.shape[1:3] != teacher_map.shape[1:3]:
    raise ValueError(
      f'Sizes differ at {tap!r}: student {student_map.shape}, teacher '
      f'{teacher_map.shape}. OFD compares pixel by pixel: use networks with '
      'the same output_stride.'
    )
  return student_map, teacher_map, norms[tap]
