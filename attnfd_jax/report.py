# SPDX-License-Identifier: Apache-2.0
r"""One page that compares finished runs and opens offline.

  python -m attnfd_jax.report runs/a [runs/b ...] --output=report.html

Reads the files of the run folders and nothing else. Runs that differ only in
their seed are also summarised as mean and standard deviation.
"""

import dataclasses
import html
import json
import math
import os
import pathlib
import statistics
import zipfile

import numpy as np
from absl import flags

from attnfd_jax import report_figures as figures
from attnfd_jax.errors import InputError

STAGES = ('teacher', 'student', 'distill')
# Every other number of a train line is the loss or one of its terms.
_NOT_LOSS = set(
  'step learning_rate grad_norm step_seconds images_per_second data_wait '
  'memory'.split()
)
_PRETTY = {
  'attnfd': 'AttnFD',
  'at': 'AT',
  'kd': 'KD',
  'camvid': 'CamVid',
  'cityscapes': 'Cityscapes',
  'coco': 'COCO',
  'pascal_voc': 'Pascal VOC',
  'mobilenet_v2': 'MobileNetV2',
}


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of one run folder say; whatever is missing is empty."""

  name: str
  path: str
  config: dict
  results: dict  # stage -> result with a number under 'miou'
  curves: dict  # stage -> kind -> name -> (steps, values)
  pictures: dict  # stage -> name -> array
  command: str
  missing: list  # Sentences for the reader.

  @property
  def seed(self):
    seeds = [r.get('seed') for r in self.results.values() if 'seed' in r]
    return self.config.get('seed', seeds[0] if seeds else None)


# Reading.


def read_run(workdir):
  """Reads a run folder; only results.json has to be there.

  Raises:
    InputError: if the folder or its results.json is missing or unreadable.
  """
  folder = pathlib.Path(workdir)
  again = 'give the --workdir of a run that finished a stage'
  if not folder.is_dir():
    raise InputError(f'{workdir}: no such folder; {again}.')
  if not (folder / 'results.json').is_file():
    raise InputError(f'{workdir}: has no results.json; {again}.')
  missing = []
  found = _read_json(folder / 'results.json')
  config = {}
  if (folder / 'config.json').is_file():
    config = _read_json(folder / 'config.json')
  else:
    missing.append('config.json is missing: settings are unknown.')
  results = {s: found[s] for s in STAGES if _miou(found.get(s)) is not None}

  given = _at(config, 'teacher', 'checkpoint')
  teacher_miou = _number(results.get('distill', {}).get('teacher_miou'))
  if 'teacher' not in results and teacher_miou is not None:
    # A teacher from a file has no stage of its own; it was still measured.
    same = ('dataset', 'split', 'protocol')
    distill = results['distill']
    teacher = {k: distill[k] for k in same if k in distill}
    teacher |= {'miou': teacher_miou}
    results = {'teacher': teacher, **results}

  wanted = config.get('stages') or STAGES
  curves, pictures = {}, {}
  for stage in STAGES:
    known = stage in results
    planned = stage in wanted and not (stage == 'teacher' and (given or known))
    if not known and planned:
      missing.append(f'The stage {stage} has no result yet.')
    curves[stage] = _read_curves(folder / stage / 'metrics.jsonl')
    if planned and not curves[stage]:
      missing.append(f'{stage}/metrics.jsonl is missing: no curves.')
    path = folder / stage / 'pictures.npz'
    pictures[stage] = {}
    try:
      with np.load(path, allow_pickle=False) as arrays:
        pictures[stage] = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
      if planned:
        missing.append(f'{stage}/pictures.npz is missing: no pictures.')
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      missing.append(f'{stage}/pictures.npz is damaged: no pictures.')
  return Run(
    name=folder.resolve().name,
    path=str(workdir),
    config=config,
    results=results,
    curves=curves,
    pictures=pictures,
    command=_command(folder),
    missing=missing,
  )


def _read_json(path):
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise InputError(f'{path}: not JSON ({error}); restore the file.') from None
  if not isinstance(content, dict):
    raise InputError(f'{path}: not a JSON object; restore the file.')
  return content


def _command(folder):
  """The command line, where a stage's environment.json has one."""
  for stage in STAGES:
    path = folder / stage / 'environment.json'
    if path.is_file():
      content = _read_json(path)
      command = content.get('command') or content.get('argv')
      if command:
        return command if isinstance(command, str) else ' '.join(command)
  return ''


def _read_curves(path):
  """kind -> name -> (steps, values); a later line replaces its step."""
  if not path.is_file():
    return {}
  points = {}
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      record = json.loads(line)
      kind, step = record['kind'], int(record['step'])
    except (ValueError, KeyError, TypeError):
      continue  # The line that was being written when the run was killed.
    for name, value in record.items():
      if name not in _NOT_LOSS and _number(value) is not None:
        points.setdefault(kind, {}).setdefault(name, {})[step] = value
  return {
    kind: {
      name: tuple(map(np.array, zip(*sorted(series.items()), strict=True)))
      for name, series in names.items()
    }
    for kind, names in points.items()
  }


def _number(value):
  """The value if it is a finite number, else None."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number and math.isfinite(value) else None


def _miou(result):
  return _number(result.get('miou')) if isinstance(result, dict) else None


def _at(config, *keys):
  for key in keys:
    config = config.get(key) if isinstance(config, dict) else None
  return config


# Words.


def _pretty(name):
  """'attnfd+kd' -> 'AttnFD + KD', 'resnet18 x0.25' -> 'ResNet-18 ×0.25'."""
  words = []
  for word in str(name or '').replace('+', ' + ').split():
    if word.startswith('resnet') and word[6:].isdigit():
      word = f'ResNet-{word[6:]}'
    elif word[0] == 'x' and word[1:2].isdigit():
      word = f'×{word[1:]}'
    words.append(_PRETTY.get(word, word))
  return ' '.join(words)


def _method(run):
  result = run.results.get('distill', {})
  return _pretty(
    result.get('method') or _at(run.config, 'distill', 'method') or 'attnfd'
  )


def _network(run, stage):
  group = 'teacher' if stage == 'teacher' else 'student'
  name = run.results.get(stage, {}).get('network')
  return _pretty(name or _at(run.config, group, 'backbone')) or group


def _role(run, stage):
  if stage == 'distill':
    return f'Student with {_method(run)}'
  given = stage == 'teacher' and set(run.results[stage]) <= {
    *('dataset', 'split', 'protocol', 'miou')
  }
  return 'Teacher (from a file)' if given else stage.capitalize()


def _percent(fraction, digits=1):
  return f'{100 * fraction:.{digits}f}\u00a0%'


def _cell(fraction):
  value = _number(fraction)
  return '–' if value is None else f'{100 * value:.2f}'


def _difference(result, baseline):
  """Points of mIoU with sign, where the two were evaluated alike."""
  if not baseline or not _alike(result, baseline):
    return '–'
  points = round(100 * (result['miou'] - baseline['miou']), 2)
  return f'{points:+.2f}'.replace('-', '−') if points else '±0.00'


def _duration(seconds):
  seconds = _number(seconds)
  if seconds is None:
    return '–'
  if seconds < 120:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 120:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60:02d} min'


def _alike(first, second):
  keys = ('dataset', 'split', 'protocol')
  return all(first.get(key) == second.get(key) for key in keys)


def _where(result):
  protocol = result.get('protocol')
  parts = [result.get('split'), protocol and f'protocol {protocol}']
  return ', '.join(part for part in parts if part) or 'split not recorded'


def outcome(results, *, method, network):
  """One sentence that says what distillation brought, good or bad.

  Args:
    results: stage -> result, each with 'miou'; stages may be missing.
    method: name of the distillation method.
    network: name of the student.

  Returns:
    Text without markup.
  """
  student, distill = results.get('student'), results.get('distill')
  teacher = results.get('teacher')
  if not distill:
    done = [f'{s} {_percent(r["miou"])} mIoU' for s, r in results.items()]
    return (
      f'There is no distilled student yet; finished: {", ".join(done)}.'
      if done
      else 'No stage is finished yet.'
    )
  where, after = _where(distill), distill['miou']
  if not student:
    return (
      f'{method} trains the {network} student to {_percent(after)} mIoU '
      f'({where}); no student without distillation to compare it with.'
    )
  before = student['miou']
  if not _alike(student, distill):
    return (
      f'The student ({_percent(before)}; {_where(student)}) and the distilled '
      f'student ({_percent(after)}; {where}) were evaluated differently: '
      f'these numbers cannot be compared.'
    )
  gain = 100 * (after - before)
  if abs(gain) < 0.05:
    sentence = (
      f'{method} makes no difference to the {network} student: '
      f'{_percent(after)} mIoU with it, {_percent(before)} without ({where})'
    )
  elif gain > 0:
    sentence = (
      f'{method} lifts the {network} student by +{gain:.1f} points of mIoU, '
      f'from {_percent(before)} to {_percent(after)} ({where})'
    )
  else:
    sentence = (
      f'{method} does not help here: the {network} student drops by '
      f'−{-gain:.1f} points of mIoU, from {_percent(before)} without '
      f'distillation to {_percent(after)} with it ({where})'
    )
  if not teacher or not _alike(teacher, distill):
    return sentence + '.'
  top = teacher['miou']
  gap = 100 * (top - before)
  if gap <= 0:
    ending = f'the teacher ({_percent(top)}) is no better than the student'
  elif after >= top:
    ending = f'it reaches or passes the teacher ({_percent(top)})'
  elif gap < 0.5 or abs(gain) < 0.05:
    ending = f'the teacher has {_percent(top)}'
  elif gain > 0:
    ending = (
      f'that closes {gain / gap:.0%} of the gap to the teacher '
      f'({_percent(top)})'
    ).replace('%', '\u00a0%', 1)
  else:
    ending = (
      f'the gap to the teacher ({_percent(top)}) grows from {gap:.1f} to '
      f'{gap - gain:.1f} points'
    )
  return f'{sentence}; {ending}.'


def _spread(values):
  """'43.51 ± 0.42' from fractions; the sample standard deviation."""
  values = [100 * value for value in values]
  if len(values) < 2:
    return f'{values[0]:.2f}' if values else '–'
  return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'


# Several runs.


def _flat(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _settings(run):
  """Config entries that make a run another experiment: not seed or folder."""
  return {
    key: json.dumps(value, sort_keys=True)
    for key, value in _flat(run.config)
    if key not in ('seed', 'workdir')
  }


def _distinguish(runs):
  """For every run the settings in which the runs differ, as text."""
  settings = [_settings(run) for run in runs]
  keys = sorted(set().union(*settings))
  keys = [k for k in keys if len({s.get(k) for s in settings}) > 1]
  return [
    ', '.join(f'{k}={s.get(k, "–")}'.replace('"', '') for k in keys)
    for s in settings
  ]


def seed_groups(runs):
  """Lists of runs that differ in their seed and in nothing else."""
  groups = {}
  for run in runs:
    if run.config and run.results:
      groups.setdefault(tuple(sorted(_settings(run).items())), []).append(run)
  groups = groups.values()
  return [g for g in groups if len({run.seed for run in g}) == len(g) > 1]


def _comparison(runs, labels):
  """The part of the page that sets several runs side by side."""
  differences = _distinguish(runs)
  parts = ['<section><h2>Comparison</h2>']
  groups = seed_groups(runs)
  rows = []
  for group in groups:
    paired = [r for r in group if {'student', 'distill'} <= set(r.results)]
    paired = [
      r.results['distill']['miou'] - r.results['student']['miou']
      for r in paired
      if _alike(r.results['student'], r.results['distill'])
    ]
    columns = [
      _spread([r.results[s]['miou'] for r in group if s in r.results])
      for s in STAGES
    ]
    seeds = ', '.join(str(r.seed) for r in group)
    setting = differences[runs.index(group[0])] or 'all runs'
    rows.append([setting, seeds, *columns, _spread(paired)])
  if rows:
    parts.append(
      _table(
        ['Setting', 'Seeds', 'Teacher', 'Student', 'Distilled', 'Gain'],
        rows,
        text_columns=2,
      )
    )
    parts.append(
      '<p class="note">mIoU in percent, mean ± standard deviation over the '
      'seeds (n − 1); the gain is paired by seed.</p>'
    )
  rows = []
  for i, run in enumerate(runs):
    link = _Html(f'<a href="#run-{i + 1}">{_e(labels[i])}</a>')
    for stage, result in run.results.items():
      rows.append(
        [
          link,
          differences[i] or 'same',
          '–' if run.seed is None else run.seed,
          _swatch(stage, _role(run, stage)),
          _cell(result['miou']),
          _cell(_test(result).get('miou')),
          _difference(result, run.results.get('student'))
          if stage == 'distill'
          else '',
        ]
      )
      link = _Html('')
  head = ['Run', 'Differs in', 'Seed', 'Network', 'mIoU', 'Test mIoU', 'Gain']
  parts.append(_table(head, rows, text_columns=4, drop='–'))
  return '\n'.join([*parts, '</section>'])


# Parts of the page.


class _Html(str):
  """Text that is already markup."""


def _e(text):
  return text if isinstance(text, _Html) else _Html(html.escape(str(text)))


def _swatch(stage, text):
  return _Html(f'<i class="dot {stage}"></i>{_e(text)}')


def _table(head, rows, *, text_columns, strong=None, drop=None):
  """A table; columns after the first are right-aligned numbers.

  Args:
    head: names of the columns.
    rows: lists of cells, escaped here unless they are _Html.
    text_columns: how many columns hold words.
    strong: index of the row to emphasise.
    drop: leave out columns in which every cell is this or empty.

  Returns:
    HTML.
  """
  columns = [
    i
    for i in range(len(head))
    if drop is None or any(row[i] not in (drop, '') for row in rows)
  ]

  def line(cells, tag, style=''):
    cells = ''.join(
      f'<{tag}{"" if i < text_columns else " class=n"}>{_e(cells[i])}</{tag}>'
      for i in columns
    )
    return f'<tr{style}>{cells}</tr>'

  body = ''.join(
    line(row, 'td', ' class="best"' if i == strong else '')
    for i, row in enumerate(rows)
  )
  return (
    f'<div class="scroll"><table><thead>{line(head, "th")}</thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _test(result):
  test = result.get('test')
  return test if isinstance(test, dict) else {}


def _stage_table(run):
  results = run.results
  sizes = {str(r['image_size']) for r in results.values() if r.get('image_size')}
  at = ''
  if len(sizes) == 1:
    at = ' at ' + ' × '.join(map(str, json.loads(sizes.pop())))
  students = [s for s in ('student', 'distill') if s in results]
  best = max(students, key=lambda s: results[s]['miou'], default=None)
  rows = []
  for stage, result in results.items():
    params = _number(result.get('params'))
    gflops = _number(result.get('gflops'))
    gain = _difference(result, results.get('student'))
    rows.append(
      [
        _swatch(stage, _role(run, stage)),
        _network(run, stage),
        '–' if params is None else f'{params / 1e6:.2f}',
        '–' if gflops is None else f'{gflops:.3g}',
        _cell(result['miou']),
        'baseline' if stage == 'student' else gain,
        _cell(_test(result).get('miou')),
        _cell(result.get('class_accuracy')),
        _cell(result.get('pixel_accuracy')),
        _duration(result.get('train_seconds')),
      ]
    )
  splits = {r.get('split') for r in results.values()} - {None}
  split = f' {splits.pop()}' if len(splits) == 1 else ''
  head = ['Role', 'Network', 'Params, M', f'GFLOPs{at}', f'mIoU{split}']
  head += ['Δ student', 'mIoU test', 'Class acc.', 'Pixel acc.', 'Training']
  strong = list(results).index(best) if best else None
  note = 'mIoU and accuracies in percent, Δ in points of mIoU.'
  if best and len(students) == 2:
    note += ' The better student is set in bold.'
  table = _table(head, rows, text_columns=2, strong=strong, drop='–')
  return f'{table}<p class="note">{note}</p>'


def _key(entries):
  """Names beside the lines they stand for: (name, colour, dashes)."""
  return '<p class="key">{}</p>'.format(
    ' '.join(
      '<span><svg viewBox="0 0 26 8" class="line"><path d="M0 4H26" '
      f'stroke="{color}" stroke-width="{1.8 if dashes else 3}" '
      f'stroke-dasharray="{dashes}"/></svg>{_e(name)}</span>'
      for name, color, dashes in entries
    )
  )


def _curves(run):
  """Small multiples: mIoU of all stages, then the losses of each."""
  panels = []
  evals = {
    stage: run.curves[stage]['eval']['miou']
    for stage in STAGES
    if 'miou' in run.curves[stage].get('eval', {})
  }
  if evals:
    entries = [
      (
        f'{stage}, best {_percent(max(values))}',
        figures.ROLE_COLORS[stage],
        '',
      )
      for stage, (_, values) in evals.items()
    ]
    drawing = figures.miou_curves(evals)
    panels.append(('mIoU during training', drawing, entries))
  for stage in STAGES:
    series = dict(run.curves[stage].get('train', {}))
    series.pop('miou', None)
    validation = run.curves[stage].get('eval', {}).get('loss')
    if validation is not None:
      series['loss on validation'] = validation
    if series:
      drawing, entries = figures.loss_curves(series, role=stage)
      entries = [(_total(name), *rest) for name, *rest in entries]
      panels.append((f'Losses: {stage}', drawing, entries))
  if not panels:
    return ''
  body = ''.join(
    f'<figure><figcaption>{_e(title)}</figcaption>{drawing}{_key(entries)}'
    '</figure>'
    for title, drawing, entries in panels
  )
  return f'<h3>Training</h3><div class="grid two">{body}</div>'


def _total(name):
  return 'total' if name == 'loss' else name


def _classes(run):
  tables = {
    stage: result['iou_per_class']
    for stage, result in run.results.items()
    if isinstance(result.get('iou_per_class'), dict)
  }
  if not tables:
    return ''
  names = list(dict.fromkeys(name for table in tables.values() for name in table))
  values = {
    stage: [
      np.nan if _number(table.get(name)) is None else table[name]
      for name in names
    ]
    for stage, table in tables.items()
  }
  drawings = figures.class_dots(names, values)
  key = ' '.join(f'<span>{_swatch(s, _role(run, s))}</span>' for s in tables)
  order = ''
  if {'student', 'distill'} <= set(tables):
    order = 'Sorted by the gain of the distilled student, in points. '
  empty = [n for n, *v in zip(names, *values.values(), strict=True) if _nan(v)]
  absent = f'Not in this split: {", ".join(empty)}.' if empty else ''
  grid = 'grid two' if len(drawings) > 1 else 'grid'
  return (
    f'<h3>IoU per class</h3><p class="key">{key}</p><div class="{grid}">'
    + ''.join(f'<figure>{drawing}</figure>' for drawing in drawings)
    + f'</div><p class="note">{_e(order + absent)}</p>'
  )


def _nan(values):
  return bool(np.all(np.isnan(values)))


def _usable(run):
  """Pictures by stage, of the same scenes, and the arrays they share."""
  needed = ('image', 'label', 'prediction')
  sets = {
    stage: arrays
    for stage, arrays in run.pictures.items()
    if all(name in arrays and len(arrays[name]) for name in needed)
  }
  if not sets:
    return {}, {}
  shared = list(sets.values())[-1]
  same = {
    stage: arrays
    for stage, arrays in sets.items()
    if np.array_equal(arrays['label'], shared['label'])
  }
  return same, shared


def _image(uri, alt):
  return f'<img src="{uri}" alt="{_e(alt)}" loading="lazy">'


def _pictures(run, most):
  """A row per scene: image, label, predictions, and where they are wrong."""
  sets, shared = _usable(run)
  if not sets:
    return ''
  palette = shared.get('palette')
  if palette is None:  # Any colours are better than no picture.
    palette = np.random.default_rng(0).integers(40, 230, (254, 3), np.uint8)
  rows, seen = [], set()
  for i, (image, label) in enumerate(
    zip(shared['image'][:most], shared['label'], strict=False)
  ):
    predictions = {stage: arrays['prediction'][i] for stage, arrays in sets.items()}
    change = ''
    if {'student', 'distill'} <= set(predictions):
      before, after = predictions['student'], predictions['distill']
      uri = figures.change_map(label, before, after)
      change = _image(uri, 'change by distillation')
      change += '<small>what distillation changes</small>'
    truth = figures.class_map(label, palette)
    rows.append(
      f'<figure><figcaption>image</figcaption>'
      f'{_image(figures.photo(image), "image")}{change}</figure>'
    )
    rows.append(
      f'<figure><figcaption>label</figcaption>{_image(truth, "label")}'
      f'{_MAP_KEY if change else _ERROR_KEY}</figure>'
    )
    seen.update(np.unique(label))
    for stage, prediction in predictions.items():
      seen.update(np.unique(prediction))
      right = figures.pixel_accuracy(label, prediction)
      name = {'distill': 'distilled'}.get(stage, stage)
      rows.append(
        f'<figure><figcaption>{_swatch(stage, name)}</figcaption>'
        + _image(figures.class_map(prediction, palette), name)
        + _image(figures.error_map(label, prediction), f'{name}: errors')
        + f'<small>{_e(_percent(right))} of the pixels right</small></figure>'
      )
  width = f'style="--columns:{2 + len(sets)}"'
  return (
    '<h3>Predictions</h3>'
    f'<div class="pictures" {width}>{"".join(rows)}</div>'
    + _legend(run, palette, seen)
  )


_MAP_KEY = (
  f'<ul class="mapkey"><li style="--c:{figures.RIGHT}">right'
  f'<li style="--c:{figures.WRONG}">wrong, or made wrong'
  f'<li style="--c:{figures.MENDED}">mended by distillation'
  '<li class="hatch">ignored: not labelled</ul>'
)
_ERROR_KEY = (
  f'<ul class="mapkey"><li style="--c:{figures.RIGHT}">right'
  f'<li style="--c:{figures.WRONG}">wrong'
  '<li class="hatch">ignored: not labelled</ul>'
)


def _legend(run, palette, seen):
  """Colours of the classes that the shown pictures contain."""
  names = []
  for result in run.results.values():
    names = names or list(result.get('iou_per_class') or ())
  items = [
    '<span><i style="background:#{}"></i>{}</span>'.format(
      bytes(bytearray(palette[k].tolist())).hex(),
      _e(names[k] if k < len(names) else f'class {k}'),
    )
    for k in sorted(map(int, seen))
    if k < len(palette)
  ]
  return f'<p class="key">{" ".join(items)}</p>'


def _attention(run, most):
  """Heat over the image at every tap, the teacher's above the student's."""
  arrays = run.pictures.get('distill', {})
  prefix = 'student_attention_'
  taps = [name[len(prefix) :] for name in arrays if name.startswith(prefix)]
  taps = [tap for tap in taps if f'teacher_attention_{tap}' in arrays]
  if not taps or 'image' not in arrays:
    return ''
  order = ('backbone', 'aspp', 'decoder')
  taps.sort(key=lambda tap: order.index(tap) if tap in order else len(order))
  rows = []
  for i, image in enumerate(arrays['image'][:most]):
    rows.append(
      f'<figure><figcaption>image</figcaption>'
      f'{_image(figures.photo(image), "image")}{_HEAT_KEY}</figure>'
    )
    for tap in taps:
      maps = {
        role: arrays[f'{role}_attention_{tap}'][i]
        for role in ('teacher', 'student')
      }
      r = figures.agreement(maps['teacher'], maps['student'])
      agreement = '' if np.isnan(r) else f'correlation {r:.2f}'
      rows.append(
        f'<figure><figcaption>{_e(_TAP.get(tap, tap))}</figcaption>'
        + ''.join(
          f'<div class="tag">{_image(figures.heat(image, m), f"{role}, {tap}")}'
          f'<b>{_swatch(_CHIP[role], role)}</b></div>'
          for role, m in maps.items()
        )
        + f'<small>{_e(agreement.replace("-", "−"))}</small></figure>'
      )
  return (
    '<h3>Attention</h3><p class="note">Where the attention of the teacher and '
    'of the distilled student lies, at the places where it is distilled. Every '
    'map is scaled to its own range.</p><div class="pictures" '
    f'style="--columns:{1 + len(taps)}">{"".join(rows)}</div>'
  )


_TAP = {'backbone': 'backbone', 'aspp': 'ASPP', 'decoder': 'decoder'}
_CHIP = {'teacher': 'teacher', 'student': 'distill'}
_HEAT_KEY = (
  '<p class="heat"><span>low</span><i style="background:linear-gradient('
  f'to right, {figures.heat_gradient()})"></i><span>high</span></p>'
)


def _made(run):
  """How to make the run again."""
  last = next(reversed(list(run.results.values())), {})
  versions = last.get('versions')
  if isinstance(versions, dict):
    versions = ', '.join(f'{name} {v}' for name, v in versions.items())
  seconds = {
    stage: _duration(result['train_seconds'])
    for stage, result in run.results.items()
    if _number(result.get('train_seconds')) is not None
  }
  steps = [f'{s} {r["step"]}' for s, r in run.results.items() if 'step' in r]
  facts = {
    'Command': run.command and _Html(f'<code>{_e(run.command)}</code>'),
    'Folder': _Html(f'<code>{_e(run.path)}</code>'),
    'Data': last.get('dataset') or _at(run.config, 'data', 'name'),
    'Recipe': last.get('recipe') or run.config.get('recipe'),
    'Method': _at(run.config, 'distill', 'method') or last.get('method'),
    'Seed': run.seed,
    'Kept step': ', '.join(steps),
    'Training time': ', '.join(f'{s} {t}' for s, t in seconds.items()),
    'Device': last.get('device'),
    'Versions': versions,
  }
  rows = ''.join(
    f'<dt>{name}</dt><dd>{_e(value)}</dd>'
    for name, value in facts.items()
    if value not in (None, '')
  )
  config = ''
  if run.config:
    text = _e(json.dumps(run.config, indent=2, ensure_ascii=False))
    config = (
      f'<details><summary>Full config</summary><pre>{text}</pre></details>'
    )
  return f'<h3>How it was made</h3><dl>{rows}</dl>{config}'


# The page.

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6470;--line:#d5d9df;
--paper:#fff;--tint:#f3f5f8;--teacher:TEACHER;--student:STUDENT;
--distill:DISTILL}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#9aa4b1;
--line:#3a414b;--paper:#14171b;--tint:#1f242b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 3rem;max-width:1120px;
background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6rem}
h2{font-size:1.3rem;margin:2.8rem 0 .5rem;padding-top:1rem;
border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:2rem 0 .6rem}
a{color:inherit}
.lead{font-size:1.15rem;max-width:48rem;margin:.3rem 0 1.2rem}
.note,small,figcaption,dt{color:var(--soft);font-size:.85rem}
.missing{background:var(--tint);border-left:4px solid var(--student);
padding:.5rem .9rem;margin:1rem 0;font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;
font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:left;white-space:nowrap;
border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;font-size:.8rem}
th:first-child,td:first-child{padding-left:0}
.n{text-align:right}
.best td{font-weight:700}
.dot{display:inline-block;width:.7em;height:.7em;margin-right:.5em}
.teacher{background:var(--teacher)}
.student{background:var(--student);border-radius:50%}
.distill{background:var(--distill);transform:rotate(45deg) scale(.9)}
figure{margin:0;min-width:0}
.grid{display:grid;gap:1.5rem 2rem}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
.grid>figure>figcaption{color:var(--ink);font-weight:600;margin-bottom:.3rem}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:.15rem 1rem;margin:.3rem 0;
font-size:.82rem}
.key span{display:inline-flex;align-items:center;white-space:nowrap}
.key i{flex:none}
.key i:not(.dot){width:.9em;height:.9em;margin-right:.4em}
.key .line{width:26px;margin-right:.4em}
.pictures{display:grid;gap:1.1rem .6rem;
grid-template-columns:repeat(var(--columns),1fr)}
.pictures img{display:block;width:100%;height:auto;margin-bottom:4px}
.pictures figcaption{margin-bottom:.15rem}
.pictures small{display:block;line-height:1.3}
.mapkey{list-style:none;margin:.5rem 0 0;padding:0;font-size:.8rem}
.mapkey li:before{content:"";display:inline-block;width:.9em;height:.9em;
margin-right:.5em;vertical-align:-.1em;background:var(--c)}
.mapkey .hatch:before{background:repeating-linear-gradient(135deg,#b0b2b8 0 3px,
#84878e 3px 6px)}
.tag{position:relative}
.tag b{position:absolute;left:5px;bottom:5px;padding:0 .45em;font-size:.75rem;
font-weight:500;background:var(--paper);border-radius:3px;opacity:.92}
.heat{display:flex;align-items:center;gap:.4rem;margin:.5rem 0;font-size:.8rem}
.heat i{flex:1;height:.8em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;
font-size:.9rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
pre,code{font-size:.85em}
details{margin-top:1rem;font-size:.9rem}
summary{cursor:pointer}
pre{background:var(--tint);padding:.8rem;overflow-x:auto}
@media(max-width:720px){.pictures{grid-template-columns:repeat(2,1fr)}
h1{font-size:1.35rem}.lead{font-size:1.05rem}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.5rem}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#555;--line:#ccc;
--paper:#fff;--tint:#f5f5f5}body{padding:0;font-size:12px}
figure,tr,dl{break-inside:avoid}h3{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def _title(run):
  data = _pretty(
    _at(run.config, 'data', 'name')
    or next((r.get('dataset') for r in run.results.values()), None)
  )
  recipe = run.config.get('recipe')
  parts = [
    data,
    f'{_network(run, "teacher")} → {_network(run, "student")}',
    _method(run),
    recipe and f'recipe {recipe}',
  ]
  return ' · '.join(part for part in parts if part)


def _outcome(run, results=None):
  network = _network(run, 'student')
  return outcome(results or run.results, method=_method(run), network=network)


def _run_section(run, most):
  parts = []
  if run.missing:
    parts.append(f'<div class="missing">{_e(" ".join(run.missing))}</div>')
  if run.results:
    parts.append(_stage_table(run))
  parts += [
    _curves(run),
    _classes(run),
    _pictures(run, most),
    _attention(run, most),
    _made(run),
  ]
  return '\n'.join(parts)


def _means(group):
  """Results of the first run with mIoU averaged over those of the group."""
  return {
    stage: {
      **group[0].results[stage],
      'miou': statistics.mean(r.results[stage]['miou'] for r in group),
    }
    for stage in group[0].results
    if all(stage in run.results for run in group)
  }


def _page(runs):
  if len(runs) == 1:
    title, lead = _title(runs[0]), _outcome(runs[0])
    body = _run_section(runs[0], most=4)
  else:
    titles = list(dict.fromkeys(map(_title, runs)))
    title = f'{titles[0] if len(titles) == 1 else "Comparison"}: {len(runs)} runs'
    groups = seed_groups(runs)
    if groups and len(groups[0]) == len(runs):
      lead = _outcome(runs[0], _means(runs))
      lead = f'Mean over {len(runs)} seeds: {lead}'
    else:
      done = [run for run in runs if 'distill' in run.results]
      best = max(done, key=lambda r: r.results['distill']['miou'], default=None)
      lead = f'Best: {best.name}. {_outcome(best)}' if best else ''
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [r.path for r in runs]
    body = _comparison(runs, labels)
    # Pictures are most of the bytes: fewer from each when there are many.
    for i, run in enumerate(runs):
      body += (
        f'<section id="run-{i + 1}"><h2>{_e(labels[i])}</h2>'
        f'<p class="lead">{_e(_outcome(run))}</p>'
        f'{_run_section(run, most=max(1, 4 // len(runs)))}</section>'
      )
  css = _CSS
  for role, color in figures.ROLE_COLORS.items():
    css = css.replace(role.upper(), color)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{_e(title)}</title><style>{css}</style></head>\n<body>'
    f'<h1>{_e(title)}</h1><p class="lead">{_e(lead)}</p>\n{body}\n'
    '</body></html>\n'
  )


def write_report(workdirs, output):
  """Writes one HTML page about the runs; an older page stays until it is whole.

  Args:
    workdirs: run folders, each with a results.json.
    output: path of the page; its folder is made if needed.

  Raises:
    InputError: if a folder is missing or has no results.
  """
  page = _page([read_run(workdir) for workdir in workdirs])
  output = pathlib.Path(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_name(f'.{output.name}.{os.getpid()}')
  temporary.write_text(page, encoding='utf-8')
  os.replace(temporary, output)


def main(argv):
  if len(argv) < 2:
    raise InputError('No run folder: give one or more, as runs/quickstart.')
  write_report(argv[1:], flags.FLAGS.output)
  print(f'Wrote {flags.FLAGS.output}')


if __name__ == '__main__':
  from attnfd_jax import cli

  # Not at import: main and other verbs have an --output of their own.
  flags.DEFINE_string('output', 'report.html', 'The page to write.')
  cli.run(main)
