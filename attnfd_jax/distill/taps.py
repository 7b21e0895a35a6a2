# SPDX-License-Identifier: Apache-2.0
"""Selects the feature maps and logits of two networks to compare."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill.method import Terms
from attnfd_jax.errors import check_choice, InputError
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.network import FeatureMaps, Outputs
from attnfd_jax.types import AnyArray

MATCH_SIZES = ('none', 'to_teacher', 'to_student')

# Of student and teacher.
MapPair: TypeAlias = tuple[
  Float[AnyArray, 'b h w c'], Float[AnyArray, 'b h w d']
]


def check(taps: Sequence[str], match_size: str) -> None:
  """Raises InputError if an option that several methods have is invalid."""
  if isinstance(taps, str) or not taps:
    raise InputError(f"taps={taps!r} must be names of maps, such as ('aspp',).")
  check_choice('match_size', match_size, MATCH_SIZES)


def shared(
  student: Outputs, teacher: Outputs, taps: Iterable[str]
) -> list[FeatureMaps]:
  """Selects the feature maps at the taps that both networks have.

  Args:
    student: its outputs.
    teacher: its outputs.
    taps: names of feature maps.

  Returns:
    Maps of the student and of the teacher by tap.

  Raises:
    ValueError: if the networks share none of the taps.
  """
  sides = student['features'], teacher['features']
  common = [tap for tap in taps if all(tap in maps for maps in sides)]
  if not common:
    have = [', '.join(maps) or 'none' for maps in sides]
    raise ValueError(
      f'No tap of {", ".join(taps)} is in both networks: the student has '
      f'{have[0]}, the teacher {have[1]}. Set the option taps to names that '
      'both have, name maps of a PyTorch module by config.teacher.taps, or use '
      'a method that compares logits.'
    )
  return [{tap: maps[tap] for tap in common} for maps in sides]


def pairs(
  student: Outputs,
  teacher: Outputs,
  taps: Iterable[str],
  *,
  match_size: str = 'none',
) -> dict[str, MapPair]:
  """Pairs the feature maps at shared taps, resized to the same size.

  Args:
    student: its outputs.
    teacher: its outputs.
    taps: names of feature maps.
    match_size: 'to_teacher' or 'to_student' is whose size both maps get, by an
      align-corners resize.

  Returns:
    By tap the maps of student and teacher, at least float32. The teacher's gets
    no gradient.

  Raises:
    ValueError: if sizes differ and match_size is 'none', or if the networks
      share none of the taps.
  """
  map_pairs = {}
  sides = shared(student, teacher, taps)
  for tap in sides[0]:
    student_map, teacher_map = in_float32(*(maps[tap] for maps in sides))
    sizes = student_map.shape[1:3], teacher_map.shape[1:3]
    if sizes[0] != sizes[1] and match_size == 'none':
      raise ValueError(
        f'Maps differ in size at {tap!r}: student {sizes[0]}, teacher '
        f"{sizes[1]}; set the option match_size to 'to_teacher' or "
        "'to_student'."
      )
    if match_size == 'to_teacher':
      student_map = resizing.resize(student_map, *sizes[1])
    elif match_size == 'to_student':
      teacher_map = resizing.resize(teacher_map, *sizes[0])
    map_pairs[tap] = student_map, teacher_map
  return map_pairs


def logits(
  student: Outputs, teacher: Outputs, *, full_size: bool = False
) -> tuple[AnyArray, AnyArray]:
  """Selects the logits of both: coarse ones if both have them at one size.

  Coarse logits have a sixteenth of the pixels and carry nearly the same
  information. `full_size` selects those at the size of the image, as some code
  bases do.
  """
  coarse = student.get('coarse_logits'), teacher.get('coarse_logits')
  if not (full_size or coarse[0] is None or coarse[1] is None):
    if coarse[0].shape == coarse[1].shape:
      return coarse[0], coarse[1]
  return student['logits'], teacher['logits']


def check_logits(student: AnyArray, teacher: AnyArray) -> None:
  """Raises ValueError if the shapes of the logits differ."""
  if student.shape != teacher.shape:
    raise ValueError(
      f'Logits differ in shape: student {student.shape}, teacher '
      f'{teacher.shape}; both networks need the same classes and output size.'
    )


def in_float32(
  student: Float[AnyArray, '...'], teacher: Float[AnyArray, '...']
) -> list[Float[AnyArray, '...']]:
  """Casts both to at least float32; the teacher's gets no gradient."""
  teacher = jax.lax.stop_gradient(teacher)
  return [
    x.astype(layers.at_least_float32(x.dtype)) for x in (student, teacher)
  ]


def total(values: Iterable[Float[Array, '*shape']]) -> Float[Array, '*shape']:
  """Adds up one or more arrays."""
  return sum(values)  # pyright: ignore[reportReturnType]  # 0 of none.


def mean_over_images(
  distances: Mapping[str, Float[Array, ' b']],
) -> tuple[Mean, Terms]:
  """Averages over images the sum of the distances by tap.

  Returns:
    The mean, and the mean of each tap, unless there is only one: that is the
    loss itself.
  """
  loss = Mean.of(total(distances.values()))
  terms = {tap: jnp.mean(values) for tap, values in distances.items()}
  return loss, (terms if len(terms) > 1 else {})
