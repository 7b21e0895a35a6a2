# SPDX-License-Identifier: Apache-2.0
"""Intra-class feature variation (IFV; Wang et al., ECCV 2020).

How like each pixel is to the mean of its class in its image, by the cosine of
their features: the student's likeness is to be the teacher's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import labels as label_maps
from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.vectors import unit
from attnfd_jax.losses import IGNORE_LABEL


def class_likeness(features, members):
  """Cosine of each pixel and the center of its class, [b, n]; else 0.

  Args:
    features: [b, n, c]; the gradient is also that of the centers.
    members: [b, n, k], 1 where a pixel is of a class, a row of zeros where it
      is of none.
  """
  # Sums over one-hot rows in place of k masked copies of the map.
  sums = jnp.einsum('bnk,bnc->bkc', members, features)
  counts = jnp.sum(members, 1)[..., None]
  centers = unit(sums / (counts + 1e-6), (2,))
  cosines = jnp.einsum('bnc,bkc->bnk', unit(features, (2,)), centers)
  return jnp.sum(members * cosines, -1)


def variation_distance(student, teacher, labels, *, num_classes):
  """Of each image, the mean squared difference of likenesses, [b].

  Pixels of the label 255 add nothing and are counted, as published.

  Args:
    student, teacher: [b, h, w, c], channels may differ; the teacher's map is a
      constant.
    labels: integers [b, H, W], resized to the maps.
  """
  b, h, w, _ = student.shape
  student, teacher = matching.in_float32(student, teacher)
  labels = label_maps.nearest(labels, h, w).reshape(b, h * w)
  # 255 may be a class, of a network with more than 255 of them.
  labels = jnp.where(labels == IGNORE_LABEL, -1, labels.astype(jnp.int32))
  members = jax.nn.one_hot(labels, num_classes, dtype=student.dtype)
  ours, theirs = (
    class_likeness(x.reshape(b, h * w, -1), members) for x in (student, teacher)
  )
  return jnp.mean(jnp.square(ours - theirs), 1)


class IFV(nn.Module):
  """IFV of one or more maps; needs labels.

  The authors add 10 times KD and 1e-3 times the adversarial term of SKD, with
  this weight of 200; CIRKD's comparison has 20.

  Attributes:
    taps: names of maps; those that both networks have are compared, and their
      terms added.
    match_size: 'to_teacher' or 'to_student' where heights or widths differ.
  """

  taps: tuple[str, ...] = ('aspp',)
  match_size: str = 'none'

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    super().__post_init__()

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py."""
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
