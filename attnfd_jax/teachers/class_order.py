# SPDX-License-Identifier: Apache-2.0
"""Reorders the logits of a teacher to the classes of the data set."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.models.network import Outputs
from attnfd_jax.teachers.teacher import with_taps
from attnfd_jax.types import AnyArray, PyTree, StrPath


def in_order(
  source: StrPath,
  teacher: Any,
  class_names: Sequence[str],
  class_map: Sequence[Any],
) -> Any:
  """A Teacher whose logits are in the order of the data set's classes.

  Args:
    source: where the teacher comes from, for messages.
    teacher: a Teacher.
    class_names: of the data set.
    class_map: the teacher's index of each class of the data set; () if the
      teacher must have the same classes.

  Raises:
    InputError: if the classes differ, or the map is invalid.
  """
  teacher_names, names = list(teacher.class_names), list(class_names)
  if class_map:
    check_class_map(class_map, len(names), len(teacher_names))
    return Reordered(teacher, class_map, class_names)
  if teacher_names == names:
    return teacher
  text = (
    f'{source}: the teacher has {len(teacher_names)} classes {teacher_names}, '
    f'the data set {names}.'
  )
  if {*names} <= {*teacher_names}:
    indices = tuple(map(teacher_names.index, names))
    text += f' Its names fit with --config.teacher.class_map="{indices}".'
  else:
    text += (
      " Set --config.teacher.class_map to its index of each of the data set's "
      'classes.'
    )
  raise InputError(text)


def check_class_map(class_map: Sequence[Any], count: int, limit: int) -> None:
  """Raises InputError unless `class_map` is valid.

  Args:
    class_map: the value of config.teacher.class_map.
    count: number of classes of the data set.
    limit: number of classes of the teacher, or 0 if it is not known.
  """
  option = f'config.teacher.class_map={class_map}'
  if len(class_map) != count:
    expected = f"must have an index for each of the data set's {count} classes"
    raise InputError(f'{option} {expected}, not {len(class_map)}.')
  indices = all(isinstance(x, int) and x >= 0 for x in class_map)
  if not indices or (limit and max(class_map) >= limit):
    last = f' to {limit - 1}' if limit else ''
    raise InputError(f"{option} must be the teacher's indices, from 0{last}.")


class Reordered:
  """A teacher with its logits in the order of the data set's classes.

  `class_map[i]` is the teacher's index of class i of `class_names`. All other
  attributes are the teacher's, except `network` and `miou`, which are of its
  own order.
  """

  def __init__(
    self,
    teacher: Any,
    class_map: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
  ):
    self._teacher, self._class_map = teacher, np.array(class_map)
    self.class_names = tuple(class_names)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name in ('network', 'miou'):
      raise AttributeError(name)
    return getattr(self._teacher, name)

  def with_taps(self, taps: Sequence[str]) -> 'Reordered':
    """See with_taps of teachers/teacher.py."""
    teacher = with_taps(self._teacher, taps)
    return Reordered(teacher, self._class_map, self.class_names)

  def apply(
    self,
    variables: PyTree,
    image: Float[AnyArray, 'b H W 3'],
    *,
    rng: jax.Array | None = None,
  ) -> Outputs:
    """See Teacher."""
    outputs: Any = dict(self._teacher.apply(variables, image, rng=rng))
    for key in outputs.keys() & {'logits', 'coarse_logits'}:
      x, last = outputs[key], int(self._class_map.max())
      if last >= x.shape[-1]:
        raise InputError(
          f'config.teacher.class_map has {last}, but {self.name} has only '
          f'{x.shape[-1]} classes, 0 to {x.shape[-1] - 1}.'
        )
      outputs[key] = jnp.take(x, self._class_map, axis=-1)
    return outputs
