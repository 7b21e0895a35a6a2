# SPDX-License-Identifier: Apache-2.0
"""Channel-wise distillation (Shu et al., arXiv 2011.13256).

With the softmax p of each channel over its pixels, at temperature T:

  loss = T^2 * mean over images and channels of KL(p_teacher || p_student)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.fitnet import Regressor
from attnfd_jax.errors import InputError, within


def channel_distance(student, teacher, *, temperature):
  """The loss of each image, [b], of maps or logits [b, h, w, c].

  0 iff they differ by a constant in each channel of each image.
  """
  student, teacher = matching.in_float32(student, teacher)
  target = jax.nn.log_softmax(teacher / temperature, (1, 2))
  log_p = jax.nn.log_softmax(student / temperature, (1, 2))
  divergence = jnp.sum(jnp.exp(target) * (target - log_p), (1, 2))
  return temperature**2 * jnp.mean(divergence, -1)


class ChannelWise(nn.Module):
  """feature_weight * sum over the taps + logits_weight * that of the logits.

  A weight of 0 leaves its part out. Where channels differ the student's map
  first goes through a 1x1 convolution without bias, which is trained. Values
  are CIRKD's; its SegFormer has weights 5 and 0.3, and MMRazor weights 0 and 5
  with temperature 1. CIRKD adds `kd` and an adversarial pair.

  Attributes:
    feature_weight, logits_weight: of the two parts.
    temperature: T.
    taps: names of maps; those that both sides have are compared.
    match_size: 'to_teacher' or 'to_student' where heights or widths of maps
      differ.
    full_size: compare logits of the size of the image.
  """

  feature_weight: float = 50.0
  logits_weight: float = 3.0
  temperature: float = 4.0
  taps: tuple[str, ...] = ('aspp',)
  match_size: str = 'none'
  full_size: bool = False

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    within('feature_weight', self.feature_weight, 0, 1e30)
    within('logits_weight', self.logits_weight, 0, 1e30)
    within('temperature', self.temperature, 1e-3, 1e6)
    if not self.feature_weight + self.logits_weight:
      raise InputError('feature_weight and logits_weight are both 0.')
    super().__post_init__()

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; the parts before their weights are terms."""
    del labels, train, step
    distances, weights, maps = {}, {}, {}
    if self.feature_weight:
      maps = matching.pairs(
        student, teacher, self.taps, match_size=self.match_size
      )
    for tap, (ours, theirs) in maps.items():
      if ours.shape[-1] != theirs.shape[-1]:
        ours = Regressor(theirs.shape[-1], name=f'regressor_{tap}')(ours)
      distances[tap] = self._distance(ours, theirs)
      weights[tap] = self.feature_weight
    if self.logits_weight:
      pair = matching.logits(student, teacher, full_size=self.full_size)
      matching.check_logits(*pair)
      distances['logits'] = self._distance(*pair)
      weights['logits'] = self.logits_weight
    weighted = {name: weights[name] * x for name, x in distances.items()}
    loss, _ = matching.mean_over_images(weighted)
    return loss, {name: jnp.mean(x) for name, x in distances.items()}

  def _distance(self, ours, theirs):
    return channel_distance(ours, theirs, temperature=self.temperature)
