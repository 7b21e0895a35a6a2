# SPDX-License-Identifier: Apache-2.0
"""Which maps of two networks a method compares."""

import jax
import jax.numpy as jnp

from attnfd_jax.errors import InputError, one_of
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers, resizing

MATCH_SIZES = ('none', 'to_teacher', 'to_student')


def check(taps, match_size):
  """Raises InputError unless these options of a method can be used."""
  if isinstance(taps, str) or not taps:
    raise InputError(f"taps={taps!r} must be names of maps, such as ('aspp',).")
  one_of('match_size', match_size, MATCH_SIZES)


def shared(student, teacher, taps):
  """The maps of `taps` that both sides have, two dicts {tap: [b, h, w, c]}."""
  sides = student['features'], teacher['features']
  both = [tap for tap in taps if all(tap in maps for maps in sides)]
  if not both:
    have = [', '.join(maps) or 'none' for maps in sides]
    raise ValueError(
      f'No tap of {", ".join(taps)} is in both networks: the student has '
      f'{have[0]}, the teacher {have[1]}. Name shared ones by the option taps, '
      'those of a PyTorch module by config.teacher.taps, or use a method that '
      'compares logits.'
    )
  return [{tap: maps[tap] for tap in both} for maps in sides]


def pairs(student, teacher, taps, *, match_size='none'):
  """{tap: (student's map, teacher's map)} of `shared`, of one height and width.

  [b, h, w, c] and [b, h, w, c'], at least float32, the teacher's a constant.
  `match_size` says which of two sizes both get, by an align-corners resize.

  Raises:
    ValueError: if sizes differ and match_size is 'none'.
  """
  found = {}
  both = shared(student, teacher, taps)
  for tap in both[0]:
    ours, theirs = in_float32(*(maps[tap] for maps in both))
    sizes = ours.shape[1:3], theirs.shape[1:3]
    if sizes[0] != sizes[1] and match_size == 'none':
      raise ValueError(
        f'Maps differ in size at {tap!r}: student {sizes[0]}, teacher '
        f"{sizes[1]}; set the option match_size to 'to_teacher' or "
        "'to_student'."
      )
    if match_size == 'to_teacher':
      ours = resizing.resize(ours, *sizes[1])
    elif match_size == 'to_student':
      theirs = resizing.resize(theirs, *sizes[0])
    found[tap] = ours, theirs
  return found


def logits(student, teacher, *, full_size=False):
  """Logits of both sides at one size: coarse ones where both have them.

  With a sixteenth of the pixels they tell nearly as much. `full_size` takes
  those of the size of the image, as some code bases do.
  """
  sides = student, teacher
  if not full_size and all('coarse_logits' in side for side in sides):
    ours, theirs = (side['coarse_logits'] for side in sides)
    if ours.shape == theirs.shape:
      return ours, theirs
  return student['logits'], teacher['logits']


def check_logits(student, teacher):
  """Raises ValueError unless both logits have one shape."""
  if student.shape != teacher.shape:
    raise ValueError(
      f'Logits differ: student {student.shape}, teacher {teacher.shape}; both '
      'networks need the same classes and output size.'
    )


def in_float32(student, teacher):
  """Two arrays, at least float32; the teacher's is a constant."""
  teacher = jax.lax.stop_gradient(teacher)
  return [
    x.astype(layers.at_least_float32(x.dtype)) for x in (student, teacher)
  ]


def mean_over_images(distances):
  """The Mean over images of the sum of {tap: [b]}, and a term for each tap.

  One tap needs no term: it is the loss.
  """
  loss = Mean.of(sum(distances.values()))
  terms = {tap: jnp.mean(values) for tap, values in distances.items()}
  return loss, (terms if len(terms) > 1 else {})
