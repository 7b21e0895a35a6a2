# SPDX-License-Identifier: Apache-2.0
"""Drawings of the report as text: charts in SVG, pictures as data URIs."""

import base64
import collections
import io
import itertools
import pathlib
import re
import warnings

import matplotlib
from matplotlib import style, ticker
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

# How a network is called and drawn, the same on the whole page. Colors by Okabe
# and Ito, 2008: told apart with every common color blindness.
Role = collections.namedtuple('Role', 'title color marker')
ROLES = {
  'teacher': Role('Teacher', '#0072B2', 's'),
  'student': Role('Student', '#E69F00', 'o'),
  'distill': Role('Distilled', '#009E73', 'D'),
}
# Of methods that are compared, beside the baseline; then the same, dashed.
_METHOD_COLORS = ('#009E73', '#0072B2', '#D55E00', '#CC79A7', '#56B4E9')
_METHOD_COLORS += ('#8C8C8C', '#8C564B')
_DASHES = ('-', '--', ':')
_LONGEST = 400  # Pixels of a side; the page enlarges smaller pictures.


def miou_chart(curves):
  """SVG text of role -> [2, n], steps and mIoU as fractions."""
  lines = {}
  for role, (steps, values) in curves.items():
    marker = ROLES[role].marker if len(steps) <= 40 else None
    lines[ROLES[role].title] = (steps, 100 * values, _line(role, marker=marker))
  return _line_chart(lines, ylabel='mIoU val, %')


def loss_chart(curves, role):
  """SVG text of name -> [2, n], steps and values; 'loss' is the total."""
  lines = {'total': (*curves['loss'], _line(role))}
  terms = [name for name in curves if name != 'loss']
  # The only term of a stage without distillation is its total.
  for name in terms if len(terms) > 1 else ():
    lines[name] = (*curves[name], {'linewidth': 1.5})
  return _line_chart(lines, ylabel='loss')


def methods_chart(curves, xlabel):
  """SVG text of title -> [2, n], steps or seconds, and mIoU as fractions; the
  first is the baseline.
  """
  others = (
    {'color': color, 'linestyle': dash, 'linewidth': 1.5}
    for dash, color in itertools.product(_DASHES, _METHOD_COLORS)
  )
  styles = itertools.chain(
    [_line('student', linewidth=3)], itertools.cycle(others)
  )
  lines = {
    title: (x, 100 * values, next(styles))
    for title, (x, values) in curves.items()
  }
  return _line_chart(lines, ylabel='mIoU val, %', xlabel=xlabel)


def _line(role, **options):
  return {'color': ROLES[role].color, 'linestyle': '-', **options}


@style.context(pathlib.Path(__file__).with_name('charts.mplstyle'))
def _line_chart(lines, *, ylabel, xlabel='step'):
  """Inline SVG; `lines` has name -> (steps, values, options of Axes.plot)."""
  # Few long names fit side by side; a legend of many rows needs its height.
  columns = max(1, min(3, 60 // max(map(len, lines))))
  rows = -(-len(lines) // columns)
  axes = Figure(figsize=(5.2, 3.2 + 0.2 * rows)).subplots()
  for name, (steps, values, options) in lines.items():
    axes.plot(_thin(steps), _thin(values), label=name, **options)
  values = np.concatenate([values for _, values, _ in lines.values()])
  low, high = values.min(), values.max()
  if low > 0 and high / low > 20:
    # A small term beside a large one is invisible on a linear axis; an SVG
    # text knows no exponents.
    axes.set_yscale('log')
    subs = (1, 2, 5) if high / low < 100 else (1,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1), ncols=columns)
  stream = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with warnings.catch_warnings():
    # An SVG has its text as text: what draws the page has the font.
    warnings.filterwarnings('ignore', 'Glyph')
    axes.figure.savefig(
      stream, format='svg', transparent=True, metadata=nothing
    )
  _, start, text = stream.getvalue().partition('<svg')
  # Several drawings share the page: names such as axes_1 would repeat.
  text = re.sub(r'<g id="[^"]*"', '<g', start + text)
  # The placeholders of charts.mplstyle.
  text = text.replace('#010203', 'var(--ink)').replace('#040506', 'var(--line)')
  return re.sub(r'\n\s*', '\n', text)


def _thin(values):
  """Means over neighbors, so that a long run stays a small drawing."""
  return [x.mean() for x in np.array_split(values, min(len(values), 150))]


def photo(image):
  """uint8 [h, w, 3] as a data URI."""
  return _uri(_shrunk(image), 'JPEG', quality=90)


def class_map(classes, palette):
  """uint8 [h, w] as a data URI in colors of the palette; no color for 255."""
  picture = _shrunk(classes, Image.Resampling.NEAREST)
  table = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
  picture.putpalette(table.tobytes())
  return _uri(picture, 'PNG', optimize=True, transparency=255)


def heat_map(image, heat):
  """Heat, float [th, tw] from 0 to 1, over the gray image; a data URI."""
  gray = _shrunk(image).convert('L')
  level = Image.fromarray(np.nan_to_num(heat.astype(np.float32)))
  level = level.resize(gray.size, Image.Resampling.BILINEAR)
  color = matplotlib.colormaps['inferno'](np.asarray(level))[..., :3]
  mixed = 0.3 * np.asarray(gray)[..., None] / 255 + 0.7 * color
  return _uri(Image.fromarray(np.uint8(255 * mixed)), 'JPEG', quality=90)


def _shrunk(array, how=Image.Resampling.BICUBIC):
  picture = Image.fromarray(np.ascontiguousarray(array))
  picture.thumbnail((_LONGEST, _LONGEST), how)
  return picture


def _uri(picture, kind, **options):
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  data = base64.b64encode(stream.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{data}'
