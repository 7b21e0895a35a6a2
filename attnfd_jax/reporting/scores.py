# SPDX-License-Identifier: Apache-2.0
"""Scores of a run as numbers and as text: filters of the templates."""

import statistics


def miou(results, stage, split='val'):
  """The fraction, None where a stage or a split has no score."""
  result = results.get(stage, {})
  return ((result.get('test') or {}) if split == 'test' else result).get('miou')


def gain(results, split='val', *, stage='distill'):
  """Points of mIoU over the student, a difference of the numbers as printed.

  None where one is absent, or where the two were evaluated differently.
  """
  after, before = (miou(results, s, split) for s in (stage, 'student'))
  if after is None or before is None:
    return None
  keys = ('dataset', 'split', 'protocol')
  if any(results[stage].get(k) != results['student'].get(k) for k in keys):
    return None
  return round(100 * after, 2) - round(100 * before, 2)


def number(value, scale=1, form='.2f'):
  """The scaled number as text, '–' for None."""
  return '–' if value is None else format(scale * value, form)


def percent(fraction, digits=2):
  """'43.55 %', its space unbreakable, '–' for None."""
  text = number(fraction, 100, f'.{digits}f')
  return text if fraction is None else f'{text}\u00a0%'


def share_right(prediction, label):
  """'83.5 % right' of the labeled pixels, '' where there are none."""
  right = (prediction == label)[label != 255]
  return f'{percent(right.mean(), 1)} right' if right.size else ''


def signed(value, digits=2):
  """A number with its sign, a true minus, and no '−0.0'; '–' for None."""
  text = number(value, form=f'+.{digits}f')
  if value is not None and not float(text):
    text = '±' + text[1:]
  return text.replace('-', '−')


def spread(values, scale=1, show=number):
  """'43.51 ± 0.42', the sample standard deviation; one number as it is."""
  values = [scale * value for value in values if value is not None]
  if len(values) < 2:
    return show(values[0] if values else None)
  return f'{show(statistics.mean(values))} ± {statistics.stdev(values):.2f}'
