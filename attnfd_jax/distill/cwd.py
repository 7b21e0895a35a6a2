# SPDX-License-Identifier: Apache-2.0
"""Distills channel by channel (CWD, Shu et al., arXiv 2011.13256).

With the softmax p of each channel over its pixels, at temperature T:

  loss = T^2 * mean over images and channels of KL(p_teacher || p_student)
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.fitnet import Regressor
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_range, InputError
from attnfd_jax.losses import Labels
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray


def channel_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w c'],
  *,
  temperature: float,
) -> Float[Array, ' b']:
  """T^2 times the mean over channels of KL(teacher || student), per image.

  0 iff both differ by a constant in each channel of each image.

  >>> student, teacher = jnp.zeros((1, 1, 2, 1)), jnp.array([[[[2.0], [0.0]]]])
  >>> channel_distance(student, teacher, temperature=1.0).tolist()
  [0.3278...]

  Args:
    student: feature maps or logits.
    teacher: of the same shape; gets no gradient.
    temperature: T.
  """
  student, teacher = matching.in_float32(student, teacher)
  target = jax.nn.log_softmax(teacher / temperature, (1, 2))
  log_p = jax.nn.log_softmax(student / temperature, (1, 2))
  divergence = jnp.sum(jnp.exp(target) * (target - log_p), (1, 2))
  return temperature**2 * jnp.mean(divergence, -1)


class ChannelWise(nn.Module):
  """Weighted sum of the channel distances of feature maps and of logits.

  If the channel counts differ, the student's map first goes through a trained
  1x1 convolution without bias. The defaults are CIRKD's; its SegFormer uses
  weights of 5 and 0.3, and MMRazor 0 and 5 with temperature 1. CIRKD adds `kd`
  and an adversarial pair.

  Example:
    `--config.distill.method=kd+cwd --config.distill.cwd.logits_weight=0`

  Attributes:
    feature_weight: weight of the sum over the taps; 0 omits it.
    logits_weight: weight of the logits; 0 omits them.
    temperature: T.
    taps: names of feature maps; those that both networks have are compared.
    match_size: 'to_teacher' or 'to_student' if heights or widths of the maps
      differ.
    full_size: compare logits at the size of the image.
  """

  feature_weight: float = 50.0
  logits_weight: float = 3.0
  temperature: float = 4.0
  taps: Sequence[str] = ('aspp',)
  match_size: str = 'none'
  full_size: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    check_range('feature_weight', self.feature_weight, 0, 1e30)
    check_range('logits_weight', self.logits_weight, 0, 1e30)
    check_range('temperature', self.temperature, 1e-3, 1e6)
    if not self.feature_weight + self.logits_weight:
      raise InputError('feature_weight and logits_weight are both 0.')
    super().__post_init__()

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
    """See distill/method.py; the terms are the distances before weighting."""
    del labels, train, step
    distances, weights, maps = {}, {}, {}
    if self.feature_weight:
      maps = matching.pairs(
        student, teacher, self.taps, match_size=self.match_size
      )
    for tap, (student_map, teacher_map) in maps.items():
      channels = teacher_map.shape[-1]
      if student_map.shape[-1] != channels:
        regressor = Regressor(channels, name=f'regressor_{tap}')
        student_map = regressor(student_map)
      distances[tap] = self._distance(student_map, teacher_map)
      weights[tap] = self.feature_weight
    if self.logits_weight:
      pair = matching.logits(student, teacher, full_size=self.full_size)
      matching.check_logits(*pair)
      distances['logits'] = self._distance(*pair)
      weights['logits'] = self.logits_weight
    weighted = {name: weights[name] * x for name, x in distances.items()}
    loss, _ = matching.mean_over_images(weighted)
    return loss, {name: jnp.mean(x) for name, x in distances.items()}

  def _distance(self, student, teacher):
    return channel_distance(student, teacher, temperature=self.temperature)
