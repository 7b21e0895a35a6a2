# SPDX-License-Identifier: Apache-2.0
"""Teachers whose classes are those of the data set in another order."""

import jax.numpy as jnp
import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.teachers.teacher import with_taps


def in_order(source, teacher, class_names, class_map):
  """`teacher` with the classes of the data set; InputError if it has others."""
  theirs, ours = list(teacher.class_names), list(class_names)
  if class_map:
    check_class_map(class_map, len(ours), len(theirs))
    return Reordered(teacher, class_map, class_names)
  if theirs == ours:
    return teacher
  text = f'{source}: the teacher knows {len(theirs)} classes {theirs}'
  text = f'{text}, the data set {ours}.'
  if {*ours} <= {*theirs}:
    indices = tuple(map(theirs.index, ours))
    text += f' As --config.teacher.class_map="{indices}" its names fit.'
  else:
    text += ' Name its index of each of ours by --config.teacher.class_map.'
  raise InputError(text)


def check_class_map(class_map, count, limit):
  """`limit` is the number of the teacher's classes, 0 where nobody knows."""
  option = f'config.teacher.class_map={class_map}'
  if len(class_map) != count:
    what = f"must have an index for each of the data set's {count} classes"
    raise InputError(f'{option} {what}, not {len(class_map)}.')
  whole = all(isinstance(x, int) and x >= 0 for x in class_map)
  if not whole or (limit and max(class_map) >= limit):
    last = f' to {limit - 1}' if limit else ''
    raise InputError(f"{option} must be the teacher's indices, from 0{last}.")


class Reordered:
  """A teacher whose logits are those of the data set's classes, in its order.

  `class_map[i]` is the teacher's index of class i of `class_names`. What else
  it has is the teacher's, but for its module and score, which know nothing of
  this order.
  """

  def __init__(self, teacher, class_map, class_names):
    self._teacher, self._class_map = teacher, np.array(class_map)
    self.class_names = tuple(class_names)

  def __getattr__(self, name):
    if name.startswith('__') or name in ('network', 'miou'):
      raise AttributeError(name)
    return getattr(self._teacher, name)

  def with_taps(self, taps):
    """The same of its teacher."""
    teacher = with_taps(self._teacher, taps)
    return Reordered(teacher, self._class_map, self.class_names)

  def apply(self, variables, image, *, rng=None):
    """See Teacher."""
    outputs = dict(self._teacher.apply(variables, image, rng=rng))
    for key in outputs.keys() & {'logits', 'coarse_logits'}:
      x, last = outputs[key], int(self._class_map.max())
      if last >= x.shape[-1]:
        raise InputError(
          f'config.teacher.class_map has {last}, and {self.name} has '
          f'{x.shape[-1]} classes, 0 to {x.shape[-1] - 1}.'
        )
      outputs[key] = jnp.take(x, self._class_map, axis=-1)
    return outputs
