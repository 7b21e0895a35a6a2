# SPDX-License-Identifier: Apache-2.0
"""Correlation of the classes, as ICKD in the code of AICSD's authors.

With the logits of an image as the rows of F [k, h w], of either side:

  G = rows of F F' scaled to length 1,
  loss = mean over images and rows of || G_student - G_teacher ||^2

The paper of that name (Liu et al., ICCV 2021) compares feature maps; here they
are logits, as in github.com/AmirMansurian/AICSD, which on its main branch
computes this loss and never adds it.
"""

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.distill import taps, vectors


def class_correlations(logits):
  """G of each image, [b, k, k], of logits [b, h, w, k]."""
  x = vectors.scaled(logits, (1, 2, 3))
  gram = jnp.einsum('bhwk,bhwl->bkl', x, x, precision='highest')
  return vectors.unit(gram, (2,))


def correlation_distance(student, teacher):
  """The loss of each image, [b], of logits [b, h, w, k]; from 0 to 4.

  0 if student = c * teacher with any c but 0 in each image.
  """
  taps.check_logits(student, teacher)
  student, teacher = taps.in_float32(student, teacher)
  difference = class_correlations(student) - class_correlations(teacher)
  return jnp.mean(jnp.sum(jnp.square(difference), 2), 1)


class ClassCorrelation(nn.Module):
  """ICKD of the logits before the last resize, where both networks have them.

  Attributes:
    full_size: compare logits of the size of the image, as AICSD does.
  """

  full_size: bool = False

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
    del labels, train, step
    pair = taps.logits(student, teacher, full_size=self.full_size)
    return taps.mean_over_images({'logits': correlation_distance(*pair)})
