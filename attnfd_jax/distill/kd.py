# SPDX-License-Identifier: Apache-2.0
"""Distills logits at each pixel (Hinton et al., arXiv 1503.02531)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps, vectors
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.errors import check_range
from attnfd_jax.losses import Labels, Logits, Mean
from attnfd_jax.models.network import Outputs


def logit_distance(
  student: Logits,
  teacher: Logits,
  *,
  temperature: float,
  standardize: bool = False,
) -> Mean:
  """T^2 times the mean over pixels of KL(teacher || student).

  0 iff the logits differ by a constant at each pixel; with `standardize`, iff
  they differ by a constant and a positive factor.

  >>> student, teacher = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[2.0, 0.0]]]])
  >>> float(logit_distance(student, teacher, temperature=1.0).value)
  0.3278...

  Args:
    student: of each pixel and class.
    teacher: of the same shape; gets no gradient.
    temperature: T, which divides the logits before the softmax.
    standardize: use (z - mean) / deviation over the classes (Sun et al., arXiv
      2403.01427, algorithm 1). Their code divides by k - 1 in the deviation:
      our temperature is theirs times sqrt(k / (k - 1)).

  Raises:
    ValueError: if the shapes differ.
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
  """KL divergence of class probabilities, from coarse logits if both have them.

  Weights of others, converted to ours: 10 b in SKD, whose sum is not divided by
  the b images; 10 / k in IFVD and AICSD, whose mean includes the k classes.

  Example:
    `--config.distill.method=kd --config.distill.kd.temperature=4`

  Attributes:
    temperature: T; 1 in CIRKD.
    standardize: compare standardized logits; the authors use T = 2 with a
      weight of 9 on CIFAR-100.
    full_size: compare logits at the size of the image, as AICSD does.
  """

  temperature: float = 1.0
  standardize: bool = False
  full_size: bool = False

  def __post_init__(self):
    check_range('temperature', self.temperature, 1e-3, 1e6)
    super().__post_init__()

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    loss = logit_distance(
      *pair, temperature=self.temperature, standardize=self.standardize
    )
    return loss, {}
