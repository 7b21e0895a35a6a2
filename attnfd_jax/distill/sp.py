# SPDX-License-Identifier: Apache-2.0
"""Compares how similar the images of a batch are.

Tung and Mori, arXiv 1907.09682.

With the feature maps of b images as the rows of F [b, h w c], for each network:

  G = rows of F F' scaled to length 1,
  loss = || G_student - G_teacher ||_F^2 / b^2
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill import vectors
from attnfd_jax.distill.method import LossAndTerms, Scalar, Step
from attnfd_jax.losses import Labels
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray


def similarities(x: Float[AnyArray, 'b h w c']) -> Float[Array, 'b b']:
  """G of a feature map."""
  x = vectors.scaled(x.reshape(x.shape[0], -1), (0, 1))
  return vectors.unit(jnp.matmul(x, x.T, precision='highest'), (1,))


def similarity_distance(
  student: Float[AnyArray, 'b _h1 _w1 _c1'],
  teacher: Float[AnyArray, 'b _h2 _w2 _c2'],
) -> Scalar:
  """The loss for feature maps of the same images; 0 for a single image.

  It spans the whole batch, on any number of devices.

  >>> student, teacher = jnp.ones((2, 1, 1, 1)), jnp.array([1.0, -1.0])
  >>> float(similarity_distance(student, teacher.reshape(2, 1, 1, 1)).round(3))
  1.0

  Args:
    student: of any height, width and number of channels.
    teacher: likewise; gets no gradient.

  Raises:
    ValueError: if the numbers of images differ.
  """
  if student.shape[0] != teacher.shape[0]:
    raise ValueError(f'Batches differ: {student.shape} and {teacher.shape}.')
  student, teacher = matching.in_float32(student, teacher)
  return jnp.mean(jnp.square(similarities(student) - similarities(teacher)))


class SimilarityPreserving(nn.Module):
  """Sum over the taps of the distance of similarities.

  With gradient accumulation, each part of the batch is compared separately.

  Example:
    `--config.distill.method=sp --config.distill.sp.taps="('aspp','decoder')"`

  Attributes:
    taps: names of feature maps; those that both networks have are compared.
      Sizes and channels may differ.
  """

  taps: Sequence[str] = ('aspp',)

  def __post_init__(self):
    matching.check(self.taps, 'none')
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
    """See distill/method.py; one term for each tap if there are several."""
    del labels, train, step
    student_maps, teacher_maps = matching.shared(student, teacher, self.taps)
    terms = {
      tap: similarity_distance(student_maps[tap], teacher_maps[tap])
      for tap in student_maps
    }
    return matching.total(terms.values()), (terms if len(terms) > 1 else {})
