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
from attnfd_jax.distill.attnfd import unit
from attnfd_jax.losses import IGNORE_LABEL, Mean
from attnfd_jax.models import layers


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
  """Mean over pixels of the squared difference of likenesses.

  Pixels of the label 255 add nothing and are counted, as published.

  Args:
    student, teacher: [b, h, w, c], channels may differ; the teacher's map is a
      constant.
    labels: integers [b, H, W], resized to the maps.
  """
  b, h, w, _ = student.shape
  labels = label_maps.nearest(labels, h, w).reshape(b, h * w)
  labels = labels.astype(jnp.int32)
  # 255 may be a class, of a network with more than 255 of them.
  labels = jnp.where(labels == IGNORE_LABEL, -1, labels)
  dtype = layers.at_least_float32(student.dtype)
  members = jax.nn.one_hot(labels, num_classes, dtype=dtype)
  ours, theirs = (
    class_likeness(x.reshape(b, h * w, -1).astype(dtype), members)
    for x in (student, jax.lax.stop_gradient(teacher))
  )
  square = jnp.square(ours - theirs)
  return Mean(jnp.sum(square), jnp.asarray(square.size, dtype))


class IFV(nn.Module):
  """IFV of one or more maps; needs labels.

  The authors add 10 times KD and 1e-3 times the adversarial term of SKD, with
  this weight of 200; CIRKD's comparison has 20.

  Attributes:
    taps: names of maps; those that both networks have are compared, and their
      terms added.
  """

  taps: tuple[str, ...] = ('aspp',)

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; one term for each tap."""
    del train, step
    students, teachers = matching.shared(student, teacher, self.taps)
    matching.same_sizes(students, teachers)
    num_classes = student['logits'].shape[-1]
    terms = {
      tap: variation_distance(
        students[tap], teachers[tap], labels, num_classes=num_classes
      ).value
      for tap in students
    }
    loss = sum(terms.values())
    # Images have equally many pixels: parts of a batch weigh by their images.
    images = jnp.asarray(labels.shape[0], loss.dtype)
    return Mean(images * loss, images), terms
