# SPDX-License-Identifier: Apache-2.0
"""Logit distillation per pixel (Hinton et al., arXiv 1503.02531)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps
from attnfd_jax.errors import within
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers


def logit_distance(student, teacher, *, temperature):
  """T^2 times the Mean over pixels of KL(teacher || student) at temperature T.

  Of two logits [b, h, w, k], the teacher's being constants; 0 iff they differ
  by a constant at each pixel.
  """
  if student.shape != teacher.shape:
    raise ValueError(
      f'Logits differ: student {student.shape}, teacher {teacher.shape}; both '
      'networks need the same classes and output size.'
    )
  dtype = layers.at_least_float32(student.dtype)
  teacher = jax.lax.stop_gradient(teacher).astype(dtype) / temperature
  target = jax.nn.log_softmax(teacher)
  log_p = jax.nn.log_softmax(student.astype(dtype) / temperature)
  divergence = jnp.sum(jnp.exp(target) * (target - log_p), -1)
  total = temperature**2 * jnp.sum(divergence)
  return Mean(total, jnp.asarray(divergence.size, dtype))


class LogitKD(nn.Module):
  """KD of the logits before the last resize, where both networks have them."""

  temperature: float = 1.0

  def __post_init__(self):
    within('temperature', self.temperature, 1e-3, 1e6)
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher)
    return logit_distance(*pair, temperature=self.temperature), {}
