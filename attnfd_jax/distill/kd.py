# SPDX-License-Identifier: Apache-2.0
"""Logit distillation per pixel (Hinton et al., arXiv 1503.02531)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps, vectors
from attnfd_jax.errors import within
from attnfd_jax.losses import Mean


def logit_distance(student, teacher, *, temperature, standardize=False):
  """T^2 times the Mean over pixels of KL(teacher || student) at temperature T.

  Of two logits [b, h, w, k], the teacher's being constants; 0 iff they differ
  by a constant at each pixel. With `standardize` both are (z - mean) /
  deviation over the classes first (Sun et al., arXiv 2403.01427, algorithm 1):
  0 iff they differ by a constant and a positive factor. Their code divides by
  k - 1 in the deviation: our temperature is theirs times sqrt(k / (k - 1)).
  """
  taps.check_logits(student, teacher)
  student, teacher = taps.in_float32(student, teacher)
  if standardize:
    student, teacher = (
      vectors.standardized(x, (-1,)) for x in (student, teacher)
    )
  target = jax.nn.log_softmax(teacher / temperature)
  log_p = jax.nn.log_softmax(student / temperature)
  divergence = jnp.sum(jnp.exp(target) * (target - log_p), -1)
  loss = Mean.of(divergence)
  return loss._replace(total=temperature**2 * loss.total)


class LogitKD(nn.Module):
  """KD of the logits before the last resize, where both networks have them.

  Others' weights, in ours: 10 b in SKD, whose sum is not divided by the b
  images; 10 / k in IFVD and AICSD, whose mean is over the k classes as well.

  Attributes:
    temperature: T, 1 as in CIRKD.
    standardize: compare standardized logits; their authors take T = 2 with a
      weight of 9 on CIFAR-100.
    full_size: compare logits of the size of the image, as AICSD does.
  """

  temperature: float = 1.0
  standardize: bool = False
  full_size: bool = False

  def __post_init__(self):
    within('temperature', self.temperature, 1e-3, 1e6)
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    loss = logit_distance(
      *pair, temperature=self.temperature, standardize=self.standardize
    )
    return loss, {}
