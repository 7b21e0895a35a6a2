# SPDX-License-Identifier: Apache-2.0
"""Writes the report on one or several runs; its text is in the HTML files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import pathlib
import statistics
from typing import Any, TypeAlias

from flax.traverse_util import flatten_dict
import jinja2
import numpy as np

from attnfd_jax import paths
from attnfd_jax.pytorch import weights
from attnfd_jax.reporting import figures
from attnfd_jax.reporting.run_folder import Run
from attnfd_jax.runs import logs
from attnfd_jax.types import StrPath

# Images with predictions on a page, which are most of its size; several runs
# share them.
_SCENES = 4

# Stage -> result, as in results.json.
Results: TypeAlias = Mapping[str, Mapping[str, Any]]


def write_report(workdirs: Sequence[StrPath], output: StrPath) -> None:
  """Writes one HTML page about runs.

  An existing page is replaced once the new one is complete.

  Args:
    workdirs: folders of the runs.
    output: the HTML file.

  Raises:
    InputError: if a folder has no results.json.
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


def render(template: str, output: StrPath, **values: Any) -> None:
  """Writes an HTML file, and creates its folder if needed.

  Args:
    template: name of a template in the folder of this module.
    output: the HTML file.
    **values: variables of the template.
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


def _set_differences(runs: Sequence[Run]) -> None:
  """Sets `difference` of each run: the settings in which not all agree."""
  # Runs that differ in seed or folder only are the same experiment.
  same = {'seed': None, 'workdir': None}
  settings = [flatten_dict(run.config | same, sep='.') for run in runs]
  keys = sorted(set().union(*settings))
  keys = [k for k in keys if len({str(s.get(k)) for s in settings}) > 1]
  for run, values in zip(runs, settings, strict=True):
    run.difference = ', '.join(f'{k}={values.get(k)}' for k in keys)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
  """Groups the runs that differ only in their seed."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(run.difference, []).append(run)
  return [
    group
    for group in groups.values()
    if len({run.config.get('seed') for run in group}) == len(group) > 1
  ]


def _mean_results(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
  """Returns the first run's results with the mean mIoU of all runs.

  The mean is None if a run has no mIoU.
  """

  def mean(stage, split):
    scores = [miou(run.results, stage, split) for run in runs]
    values = [score for score in scores if score is not None]
    return statistics.mean(values) if len(values) == len(scores) else None

  return {
    stage: result
    | {'miou': mean(stage, 'val'), 'test': {'miou': mean(stage, 'test')}}
    for stage, result in runs[0].results.items()
  }


def miou(results: Results, stage: str, split: str = 'val') -> float | None:
  """Returns the mIoU as a fraction; None if there is no score."""
  result = results.get(stage, {})
  return ((result.get('test') or {}) if split == 'test' else result).get('miou')


def gain(
  results: Results, split: str = 'val', *, stage: str = 'distill'
) -> float | None:
  """Returns a stage's gain over the student in points of mIoU.

  It is the difference of the rounded numbers in the tables. None if a score is
  missing, or if the two were evaluated differently.
  """
  after, before = (miou(results, s, split) for s in (stage, 'student'))
  if after is None or before is None:
    return None
  keys = ('dataset', 'split', 'protocol')
  if any(results[stage].get(k) != results['student'].get(k) for k in keys):
    return None
  return round(100 * after, 2) - round(100 * before, 2)


def number(value: float | None, scale: float = 1, form: str = '.2f') -> str:
  """Formats a scaled number; '–' for None."""
  return '–' if value is None else format(scale * value, form)


def percent(fraction: float | None, digits: int = 2) -> str:
  """Formats a fraction as '43.55 %' with a no-break space; '–' for None."""
  text = number(fraction, 100, f'.{digits}f')
  return text if fraction is None else f'{text}\u00a0%'


def pretrained(source: str | dict[str, Any] | None) -> str | None:
  """Describes the source of pretrained weights, a path or published ones."""
  return weights.describe(source) if isinstance(source, dict) else source


def share_right(prediction: np.ndarray, label: np.ndarray) -> str:
  """Formats the pixel accuracy as '83.5 % correct'; '' without labels."""
  correct = (prediction == label)[label != 255]
  return f'{percent(correct.mean(), 1)} correct' if correct.size else ''


def signed(value: float | None, digits: int = 2) -> str:
  """Formats a number with its sign, as +1.50, −0.25 or ±0.00; '–' for None."""
  text = number(value, form=f'+.{digits}f')
  if value is not None and not float(text):
    text = '±' + text[1:]
  return text.replace('-', '−')


def spread(
  values: Iterable[float | None],
  scale: float = 1,
  show: Callable[[float | None], str] = number,
) -> str:
  """Formats mean and sample standard deviation of the values that are not None.

  Args:
    values: numbers, such as the scores of several seeds.
    scale: factor of all values.
    show: formats the mean.
  """
  scaled = [scale * value for value in values if value is not None]
  if len(scaled) < 2:
    return show(scaled[0] if scaled else None)
  return plus_minus(statistics.mean(scaled), statistics.stdev(scaled), show)


def plus_minus(
  mean: float,
  std: float | None,
  show: Callable[[float | None], str] = number,
) -> str:
  """Formats '43.51 ± 0.42', or the mean alone if `std` is None."""
  return show(mean) if std is None else f'{show(mean)} ± {std:.2f}'
