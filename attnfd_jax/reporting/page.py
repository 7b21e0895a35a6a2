# SPDX-License-Identifier: Apache-2.0
"""The HTML of the report: takes `report.Run`, gives text for one page.

Every text that comes from a file passes through `_e`.
"""

import datetime
import html
import json
import re
import statistics

import numpy as np

from attnfd_jax.reporting import figures as figures
from attnfd_jax.reporting.figures import signed

NAMES = figures.ROLE_NAMES
_PRETTY = {'attnfd': 'AttnFD', 'at': 'AT', 'kd': 'KD', 'camvid': 'CamVid'}
_TAPS = {'backbone': 'backbone', 'aspp': 'ASPP', 'decoder': 'decoder'}


# Words and numbers.


def _e(value):
  return html.escape(str(value))


def _pretty(name):
  """'attnfd+kd' -> 'AttnFD + KD', 'resnet18 x0.25' -> 'ResNet-18 ×0.25'."""
  name = re.sub(r'\bresnet(\d+)', r'ResNet-\1', name.replace('+', ' + '))
  name = re.sub(r' x(?=\d)', ' ×', name)
  return ' '.join(_PRETTY.get(word, word) for word in name.split())


def method(run):
  return _pretty(run.results.get('distill', {}).get('method', 'attnfd'))


def network(run, stage):
  role = 'teacher' if stage == 'teacher' else 'student'
  named = run.results.get(stage, {}).get('network')
  return _pretty(named or run.config.get(role, {}).get('backbone', role))


def title(run):
  data = _pretty(run.config.get('data', {}).get('name', run.path))
  networks = f'{network(run, "teacher")} → {network(run, "student")}'
  return f'{data} · {networks} · {method(run)}'


def percent(fraction, digits=2):
  return f'{100 * fraction:.{digits}f}\u00a0%'


def points(after, before):
  """Difference of the two numbers as printed: a reader may check it."""
  return round(100 * after, 2) - round(100 * before, 2)


def alike(first, second):
  """Whether two results may be compared."""
  keys = ('dataset', 'split', 'protocol')
  return all(first.get(key) == second.get(key) for key in keys)


def _miou(result, split):
  return (result.get('test') or {} if split == 'test' else result).get('miou')


def gain(results, split='val'):
  """Points of mIoU that distillation brings, None where unknown."""
  student, distill = results.get('student', {}), results.get('distill', {})
  before, after = _miou(student, split), _miou(distill, split)
  if before is None or after is None or not alike(student, distill):
    return None
  return points(after, before)


# Markup.


def _swatch(stage, text):
  return f'<i class="dot {stage}"></i>{_e(text)}'


def _table(head, rows):
  """A table without its empty columns; cells are HTML."""
  columns = [i for i in range(len(head)) if any(row[i] for row in rows)]

  def line(cells, tag):
    cells = ''.join(f'<{tag}>{cells[i] or "–"}</{tag}>' for i in columns)
    return f'<tr>{cells}</tr>'

  body = ''.join(line(row, 'td') for row in rows)
  return (
    f'<div class="scroll"><table><thead>{line(head, "th")}</thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _picture(name, uri, stage='', note=''):
  caption = _swatch(stage, name) if stage else name
  return (
    f'<figure><figcaption>{caption}<small>{note}</small></figcaption>'
    f'<img src="{uri}" alt="{name}" loading="lazy"></figure>'
  )


def _row(cells):
  """The cells of one scene; on a phone they wrap without mixing scenes."""
  return f'<div class="row" style="--n:{len(cells)}">{"".join(cells)}</div>'


# Parts of a run.


def _stages(run):
  def number(value, scale=100, show='{:.2f}'):
    return '' if value is None else show.format(value * scale)

  rows, won = [], [gain(run.results, split) for split in ('val', 'test')]
  for stage, result in run.results.items():
    distilled = stage == 'distill'
    name = f'Student with {method(run)}' if distilled else NAMES[stage]
    seconds = result.get('train_seconds')
    row = [
      _swatch(stage, name),
      _e(network(run, stage)),
      number(result['miou']),
      number(_miou(result, 'test')),
      *(signed(g) if distilled and g is not None else '' for g in won),
      number(result.get('pixel_accuracy')),
      number(result.get('params'), 1e-6),
      number(result.get('gflops'), 1, '{:.3g}'),
      seconds and str(datetime.timedelta(seconds=round(seconds))),
    ]
    rows.append(row)
  head = 'Network|backbone|mIoU val|mIoU test|gain val|gain test|pixel acc.'
  head += '|params, M|GFLOPs|training'
  note = 'mIoU and accuracy in percent, gain in points over the student'
  sizes = {tuple(r.get('image_size', ())) for r in run.results.values()}
  if len(sizes) == 1 and any(sizes):
    note += f'; GFLOPs for an image of {"×".join(map(str, sizes.pop()))} pixels'
  return f'{_table(head.split("|"), rows)}<p class="note">{_e(note)}.</p>'


def _curves(run):
  """Small multiples: mIoU of all stages, then the losses of each."""
  panels = {}
  evals = {
    stage: curves.get('eval', {}) for stage, curves in run.curves.items()
  }
  mious = {s: found['miou'] for s, found in evals.items() if 'miou' in found}
  if mious:
    panels['mIoU during training'] = figures.miou_chart(mious)
  for stage, curves in run.curves.items():
    if 'loss' in curves.get('train', {}):
      drawing = figures.loss_chart(curves['train'], role=stage)
      panels[f'Loss: {NAMES[stage].lower()}'] = drawing
  body = ''.join(
    f'<figure><figcaption>{caption}</figcaption>{drawing}</figure>'
    for caption, drawing in panels.items()
  )
  return f'<h3>Training</h3><div class="charts">{body}</div>' if body else ''


def _classes(run):
  tables = {s: r.get('iou_per_class') for s, r in run.results.items()}
  tables = {stage: table for stage, table in tables.items() if table}
  if not tables:
    return ''
  names = run.classes or list(next(iter(tables.values())))
  ious = {
    stage: np.array([table.get(name) for name in names], float)
    for stage, table in tables.items()
  }
  key = ''.join(f'<span>{_swatch(s, NAMES[s])}</span>' for s in tables)
  drawing = figures.class_chart(names, ious)
  return f'<h3>IoU per class</h3><p class="key">{key}</p>{drawing}'


def _pictures(run, most):
  """A row per scene: image, label and the prediction of every network."""
  sets = {stage: arrays for stage, arrays in run.pictures.items() if arrays}
  if not sets:
    return ''
  shared = list(sets.values())[-1]
  labels, palette = shared['label'][:most], shared['palette']
  rows, seen = [], set(np.unique(labels))
  for i, label in enumerate(labels):
    cells = [
      _picture('Image', figures.photo(shared['image'][i])),
      _picture('Label', figures.class_map(label, palette)),
    ]
    for stage, arrays in sets.items():
      if not np.array_equal(arrays['label'], shared['label']):
        continue  # It drew other scenes.
      prediction = arrays['prediction'][i]
      seen.update(np.unique(prediction))
      right = (prediction == label)[label != 255]
      note = f'{percent(np.mean(right), 1)} right' if right.size else ''
      drawing = figures.class_map(prediction, palette)
      cells.append(_picture(NAMES[stage], drawing, stage, note))
    rows.append(_row(cells))
  colors = zip(run.classes, palette.tolist(), strict=False)
  key = ''.join(
    f'<span><i style="background:rgb({r} {g} {b})"></i>{_e(name)}</span>'
    for i, (name, (r, g, b)) in enumerate(colors)
    if i in seen
  )
  key += '<span><i class="void"></i>not labelled</span>' * (255 in seen)
  return f'<h3>Predictions</h3><p class="key">{key}</p>{"".join(rows)}'


def _attention(run, most):
  """Heat over the image at every tap, the teacher's above the student's."""
  arrays = run.pictures.get('distill', {})
  taps = [tap for tap in _TAPS if f'teacher_attention_{tap}' in arrays]
  if not taps:
    return ''
  rows = []
  for i, image in enumerate(arrays['image'][:most]):
    label = figures.class_map(arrays['label'][i], arrays['palette'])
    for role, stage, first in (
      ('teacher', 'teacher', _picture('Image', figures.photo(image))),
      ('student', 'distill', _picture('Label', label)),
    ):
      cells = [first]
      for tap in taps:
        heat = figures.heat_map(image, arrays[f'{role}_attention_{tap}'][i])
        cells.append(_picture(f'{NAMES[stage]}: {_TAPS[tap]}', heat, stage))
      rows.append(_row(cells))
  gradient = f'linear-gradient(to right, {figures.heat_gradient()})'
  return (
    '<h3>Attention</h3><p class="note">Where the refined features of the '
    'teacher and of the distilled student are strong, at the places where '
    'they are compared; every map has its own range, from low '
    f'<i class="heat" style="background:{gradient}"></i> to high.</p>'
    + ''.join(rows)
  )


def _made(run):
  """How to make the run again."""
  last = next(reversed(run.results.values()), {})
  facts = {
    'Command': run.command,
    'Folder': run.path,
    'Seed': run.config.get('seed', ''),
    'Device': last.get('device', ''),
    'Versions': ', '.join(map(' '.join, last.get('versions', {}).items())),
  }
  rows = ''.join(
    f'<dt>{name}</dt><dd>{_e(value)}</dd>'
    for name, value in facts.items()
    if value != ''
  )
  config = _e(json.dumps(run.config, indent=2, ensure_ascii=False))
  return (
    f'<h3>How it was made</h3><dl>{rows}</dl>'
    f'<details><summary>Full config</summary><pre>{config}</pre></details>'
  )


def run_parts(run, most):
  """All about one run, with pictures of at most `most` scenes."""
  missing = ', '.join(run.missing)
  text = f'<p class="missing">Missing: {_e(missing)}.</p>' if missing else ''
  text += _stages(run) if run.results else ''
  text += _curves(run) + _classes(run) + _pictures(run, most)
  return text + _attention(run, (most + 1) // 2) + _made(run)


# Several runs.


def _spread(values, show='{:.2f}'.format):
  """'43.51 ± 0.42'; the sample standard deviation."""
  values = [value for value in values if value is not None]
  if len(values) < 2:
    return ''.join(map(show, values))
  return f'{show(statistics.mean(values))} ± {statistics.stdev(values):.2f}'


def comparison(rows):
  """For every split the numbers of single runs and of groups of seeds.

  Args:
    rows: tuples (name, link or '', what distinguishes it, runs).
  """
  text = '<h2>Comparison</h2>'
  for split in ('val', 'test'):
    table = []
    for name, link, difference, runs in rows:
      name = f'<a href="{link}">{_e(name)}</a>' if link else f'<b>{name}</b>'
      cells = [name, _e(difference)]
      cells.append(', '.join(_e(run.config.get('seed', '')) for run in runs))
      for stage in NAMES:
        found = [_miou(run.results.get(stage, {}), split) for run in runs]
        cells.append(_spread([100 * m for m in found if m is not None]))
      gains = [gain(run.results, split) for run in runs]
      table.append([*cells, _spread(gains, signed)])
    if any(any(row[3:]) for row in table):
      head = [f'mIoU {split}, %', 'differs in', 'seed', *NAMES.values(), 'gain']
      text += _table(head, table)
  return (
    f'{text}<p class="note">± is the standard deviation over seeds (n − 1); '
    'the gain is paired by seed.</p>'
  )


def section(anchor, name, lead, body):
  return (
    f'<section id="{anchor}"><h2>{_e(name)}</h2><p class="lead">{_e(lead)}</p>'
    f'{body}</section>'
  )


def document(name, lead, body):
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{_e(name)}</title><style>{figures.PAGE_CSS}</style></head>\n'
    f'<body><h1>{_e(name)}</h1><p class="lead">{_e(lead)}</p>\n{body}\n'
    '</body></html>\n'
  )
