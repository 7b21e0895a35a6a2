# SPDX-License-Identifier: Apache-2.0
"""The report of one run or of several; its text is in the HTML files here."""

import json
import pathlib
import statistics

from flax.traverse_util import flatten_dict
import jinja2

from attnfd_jax import paths
from attnfd_jax.pytorch import weights
from attnfd_jax.reporting import figures
from attnfd_jax.reporting.run_folder import Run
from attnfd_jax.runs import logs

_SCENES = 4  # Pictures are most of the bytes: fewer of each run of several.


def write_report(workdirs, output):
  """Writes one HTML page about run folders.

  An older page stays until it is whole. A run folder without a results.json is
  an InputError.
  """
  runs = [Run(workdir) for workdir in workdirs]
  _set_differences(runs)
  tested = any(r.get('test') for run in runs for r in run.results.values())
  render(
    'page.html',
    output,
    runs=runs,
    groups=_groups(runs),
    mean_results=_mean_results(runs),
    splits=['val', 'test'] if tested else ['val'],
    num_scenes=max(1, _SCENES // len(runs)),
    to_json=json.dumps,
  )


def render(template, output, **values):
  """Writes an HTML file of this folder's template, in a folder that is made if
  needed.
  """
  loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
  options = dict.fromkeys(('autoescape', 'trim_blocks', 'lstrip_blocks'), True)
  strict = jinja2.StrictUndefined
  environment = jinja2.Environment(loader=loader, undefined=strict, **options)
  filters = (miou, gain, number, percent, pretrained)
  filters += (share_right, signed, spread)
  environment.filters |= {f.__name__: f for f in (*filters, logs.duration)}
  text = environment.get_template(template).render(
    figures=figures, signed=signed, **values
  )
  output = paths.as_path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  with paths.replacing(output) as file:
    file.write(text.encode())


def _set_differences(runs):
  """Gives each run the settings in which not all runs agree, as text."""
  # A seed or a folder does not make another experiment.
  same = {'seed': None, 'workdir': None}
  settings = [flatten_dict(run.config | same, sep='.') for run in runs]
  keys = sorted(set().union(*settings))
  keys = [k for k in keys if len({str(s.get(k)) for s in settings}) > 1]
  for run, values in zip(runs, settings, strict=True):
    run.difference = ', '.join(f'{k}={values.get(k)}' for k in keys)


def _groups(runs):
  """Lists of the runs that differ in nothing but their seed."""
  groups = {}
  for run in runs:
    groups.setdefault(run.difference, []).append(run)
  return [
    group
    for group in groups.values()
    if len({run.config.get('seed') for run in group}) == len(group) > 1
  ]


def _mean_results(runs):
  """Results of the first run with the mean mIoU; None where one has none."""

  def mean(stage, split):
    values = [miou(run.results, stage, split) for run in runs]
    return None if None in values else statistics.mean(values)

  return {
    stage: result
    | {'miou': mean(stage, 'val'), 'test': {'miou': mean(stage, 'test')}}
    for stage, result in runs[0].results.items()
  }


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


def pretrained(source):
  """Where the first weights are from: a path, or a name with its source."""
  return weights.in_words(source) if isinstance(source, dict) else source


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
  return plus_minus(statistics.mean(values), statistics.stdev(values), show)


def plus_minus(mean, std, show=number):
  """'43.51 ± 0.42'; without a deviation the mean alone."""
  return show(mean) if std is None else f'{show(mean)} ± {std:.2f}'
