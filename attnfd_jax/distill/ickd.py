# SPDX-License-Identifier: Apache-2.0
"""Compares how the classes correlate (ICKD in the code of AICSD's authors).

With the logits of an image as the rows of F [k, h w], for each network:

  G = rows of F F' scaled to length 1,
  loss = mean over images and rows of || G_student - G_teacher ||^2

The paper of that name (Liu et al., ICCV 2021) compares feature maps; these are
logits, as in github.com/AmirMansurian/AICSD, whose main branch computes this
loss and never adds it.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps, vectors
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.losses import Labels, Logits
from attnfd_jax.models.network import Outputs


def class_correlations(logits: Logits) -> Float[Array, 'b k k']:
  """G of each image."""
  x = vectors.scaled(logits, (1, 2, 3))
  gram = jnp.einsum('bhwk,bhwl->bkl', x, x, precision='highest')
  return vectors.unit(gram, (2,))


def correlation_distance(
  student: Logits, teacher: Logits
) -> Float[Array, ' b']:
  """The loss of each image, from 0 to 4.

  0 if student = c * teacher with any c but 0 in each image.

  >>> student, teacher = jnp.ones((1, 1, 1, 2)), jnp.array([[[[1.0, -1.0]]]])
  >>> correlation_distance(student, teacher).round(3).tolist()
  [2.0]

  Args:
    student: logits.
    teacher: logits of the same shape; they get no gradient.

  Raises:
    ValueError: if the shapes differ.
  """
  taps.check_logits(student, teacher)
  student, teacher = taps.in_float32(student, teacher)
  difference = class_correlations(student) - class_correlations(teacher)
  return jnp.mean(jnp.sum(jnp.square(difference), 2), 1)


class ClassCorrelation(nn.Module):
  """ICKD, from coarse logits if both networks have them.

  Example:
    `--config.distill.method=ickd --config.distill.ickd.full_size`

  Attributes:
    full_size: compare logits at the size of the image, as AICSD does.
  """

  full_size: bool = False

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
    return taps.mean_over_images({'logits': correlation_distance(*pair)})
