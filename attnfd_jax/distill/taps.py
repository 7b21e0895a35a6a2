# SPDX-License-Identifier: Apache-2.0
"""Which maps of two networks a method compares."""


def shared(student, teacher, taps):
  """The maps of `taps` that both sides have, two dicts {tap: [b, h, w, c]}.

  Args:
    student, teacher: Outputs.
    taps: names.

  Raises:
    ValueError: if there is none, with what each side has.
  """
  both = [
    tap
    for tap in taps
    if tap in student['features'] and tap in teacher['features']
  ]
  if not both:
    have = [', '.join(x['features']) or 'none' for x in (student, teacher)]
    raise ValueError(
      f'No tap of {", ".join(taps)} is in both networks: the student has '
      f'{have[0]}, the teacher {have[1]}. Name shared ones by the option taps, '
      'or use a method that compares logits.'
    )
  return [
    {tap: outputs['features'][tap] for tap in both}
    for outputs in (student, teacher)
  ]


def logits(student, teacher):
  """Logits of both sides at one size: coarse ones where both have them.

  With a sixteenth of the pixels they tell nearly as much.
  """
  key = 'coarse_logits'
  if (
    key in student
    and key in teacher
    and student[key].shape == teacher[key].shape
  ):
    return student[key], teacher[key]
  return student['logits'], teacher['logits']
