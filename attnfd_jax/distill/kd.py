# SPDX-License-Identifier: Apache-2.0
"""Logit distillation per pixel (Hinton et al., arXiv 1503.02531)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.models import layers


def logit_distance(student, teacher, *, temperature):
  """T^2 times the mean over pixels of KL(teacher || student) at temperature T.

  Args:
    student: logits [b, h, w, k].
    teacher: logits of the same shape; treated as a constant.
    temperature: T; softens both distributions.

  Returns:
    float32 scalar, 0 iff the logits differ by a constant at each pixel.

  Raises:
    ValueError: if the shapes differ.
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
  return temperature**2 * jnp.mean(divergence)


class LogitKD(nn.Module):
  """Distils the scores before the last resize, 16 times fewer than pixels."""

  temperature: float = 1.0

  def from_outputs(self, student, teacher, labels, *, train):
    del labels, train
    loss = logit_distance(
      student['coarse_logits'],
      teacher['coarse_logits'],
      temperature=self.temperature,
    )
    return loss, {}
