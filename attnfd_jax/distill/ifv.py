# SPDX-License-Identifier: Apache-2.0
"""Transfers intra-class feature variation (IFV; Wang et al., ECCV 2020).

Compares, between student and teacher, the cosine similarity of each pixel's
feature vector to the mean of its class in the same image.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from attnfd_jax.distill import labels as label_maps
from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.method import LossAndTerms, Step
from attnfd_jax.distill.vectors import unit
from attnfd_jax.losses import IGNORE_LABEL, Labels
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray


def class_likeness(
  features: Float[AnyArray, 'b n c'], members: Float[AnyArray, 'b n k']
) -> Float[Array, 'b n']:
  """Cosine similarity of each pixel to the center of its class.

  Args:
    features: a vector per pixel. The gradient also flows through the centers.
    members: one-hot classes. A row of zeros is a pixel without a class, whose
      similarity is 0.
  """
  # Sums over one-hot rows instead of k masked copies of the map.
  sums = jnp.einsum('bnk,bnc->bkc', members, features)
  counts = jnp.sum(members, 1)[..., None]
  centers = unit(sums / (counts + 1e-6), (2,))
  cosines = jnp.einsum('bnc,bkc->bnk', unit(features, (2,)), centers)
  return jnp.sum(members * cosines, -1)


def variation_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w d'],
  labels: Integer[AnyArray, 'b height width'],
  *,
  num_classes: int,
) -> Float[Array, ' b']:
  """Mean squared difference of the similarities to class centers, per image.

  Pixels with the label 255 add nothing but are counted, as published.

  >>> student = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
  >>> teacher, labels = jnp.ones((1, 1, 2, 2)), jnp.zeros((1, 1, 2), jnp.uint8)
  >>> variation_distance(student, teacher, labels, num_classes=1).tolist()
  [0.0857...]

  Args:
    student: the student's feature map.
    teacher: the teacher's feature map, which gets no gradient.
    labels: class indices, of any size; they are resized to the maps.
    num_classes: number of classes.
  """
  b, h, w, _ = student.shape
  student, teacher = matching.in_float32(student, teacher)
  labels = label_maps.nearest(labels, h, w).reshape(b, h * w)
  # 255 may be a valid index for a network with more than 255 classes.
  labels = jnp.where(labels == IGNORE_LABEL, -1, labels.astype(jnp.int32))
  members = jax.nn.one_hot(labels, num_classes, dtype=student.dtype)
  student_likeness, teacher_likeness = (
    class_likeness(x.reshape(b, h * w, -1), members) for x in (student, teacher)
  )
  return jnp.mean(jnp.square(student_likeness - teacher_likeness), 1)


class IFV(nn.Module):
  """IFV of one or more feature maps; needs labels.

  The default weight of 200 is the authors', who add 10 times KD and 1e-3 times
  the adversarial term of SKD; CIRKD's comparison uses 20.

  Example:
    `--config.distill.method=kd+ifv --config.distill.kd.weight=10`

  Attributes:
    taps: names of feature maps; the terms of those that both networks have are
      added up.
    match_size: 'to_teacher' or 'to_student' if heights or widths differ.
  """

  taps: Sequence[str] = ('aspp',)
  match_size: str = 'none'

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
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
    del train, step
    num_classes = student['logits'].shape[-1]
    maps = matching.pairs(
      student, teacher, self.taps, match_size=self.match_size
    )
    return matching.mean_over_images(
      {
        tap: variation_distance(*pair, labels, num_classes=num_classes)
        for tap, pair in maps.items()
      }
    )
