# SPDX-License-Identifier: Apache-2.0
"""Which maps of two networks a method compares."""


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


def logits(student, teacher):
  """Logits of both sides at one size: coarse ones where both have them.

  With a sixteenth of the pixels they tell nearly as much.
  """
  sides = student, teacher
  if all('coarse_logits' in side for side in sides):
    ours, theirs = (side['coarse_logits'] for side in sides)
    if ours.shape == theirs.shape:
      return ours, theirs
  return student['logits'], teacher['logits']
