# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the report: charts as SVG, pictures as data URIs."""

import base64
from collections.abc import Mapping
import io
import itertools
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import matplotlib
from matplotlib import style, ticker
from matplotlib.figure import Figure
import numpy as np
from PIL import Image


class Role(NamedTuple):
  """Name and style of a network, the same on the whole page."""

  title: str
  color: str
  marker: str


# Colors by Okabe and Ito, 2008, which can be distinguished with all common
# types of color blindness.
ROLES = {
  'teacher': Role('Teacher', '#0072B2', 's'),
  'student': Role('Student', '#E69F00', 'o'),
  'distill': Role('Distilled', '#009E73', 'D'),
}
# Colors of the methods in a comparison; with each dash style in turn.
_METHOD_COLORS = ('#009E73', '#0072B2', '#D55E00', '#CC79A7', '#56B4E9')
_METHOD_COLORS += ('#8C8C8C', '#8C564B')
_DASHES = ('-', '--', ':')
_LONGEST = 400  # Maximum side of a picture; the page enlarges smaller ones.


def miou_chart(curves: Mapping[str, np.ndarray]) -> str:
  """Draws the mIoU during training as SVG.

  Args:
    curves: steps and mIoU as a fraction [2, n] of each role.
  """
  lines = {}
  for role, (steps, values) in curves.items():
    marker = ROLES[role].marker if len(steps) <= 40 else None
    lines[ROLES[role].title] = (steps, 100 * values, _line(role, marker=marker))
  return _line_chart(lines, ylabel='mIoU val, %')


def loss_chart(curves: Mapping[str, np.ndarray], role: str) -> str:
  """Draws the loss and its terms as SVG.

  Args:
    curves: steps and values [2, n] of 'loss', the total, and of each term.
    role: role whose color the total has.
  """
  steps, values = curves['loss']
  lines = {'total': (steps, values, _line(role))}
  terms = [name for name in curves if name != 'loss']
  # Without distillation, the only term is the total.
  for name in terms if len(terms) > 1 else ():
    steps, values = curves[name]
    lines[name] = (steps, values, {'linewidth': 1.5})
  return _line_chart(lines, ylabel='loss')


def methods_chart(curves: Mapping[str, np.ndarray], xlabel: str) -> str:
  """Draws the mIoU of several methods as SVG.

  Args:
    curves: steps or seconds, and mIoU as a fraction [2, n], of each title; the
      baseline is the first.
    xlabel: label of the x axis.
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


def _line(role: str, **options: Any) -> dict[str, Any]:
  """Returns options of Axes.plot for a role."""
  return {'color': ROLES[role].color, 'linestyle': '-', **options}


@style.context(pathlib.Path(__file__).with_name('charts.mplstyle'))
def _line_chart(
  lines: Mapping[str, tuple[np.ndarray, np.ndarray, dict[str, Any]]],
  *,
  ylabel: str,
  xlabel: str = 'step',
) -> str:
  """Draws a line chart as inline SVG.

  Args:
    lines: x and y values and options of Axes.plot for each name.
    ylabel: label of the y axis.
    xlabel: label of the x axis.
  """
  # Columns and rows of the legend: long names need fewer columns.
  columns = max(1, min(3, 60 // max(map(len, lines))))
  rows = -(-len(lines) // columns)
  figure = Figure(figsize=(5.2, 3.2 + 0.2 * rows))
  axes = figure.subplots()
  for name, (steps, values, options) in lines.items():
    axes.plot(_thin(steps), _thin(values), label=name, **options)
  values = np.concatenate([values for _, values, _ in lines.values()])
  low, high = values.min(), values.max()
  if low > 0 and high / low > 20:
    # On a linear axis, a small term next to a large one would be invisible.
    # Plain numbers, because text in an SVG cannot show exponents.
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
  no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with warnings.catch_warnings():
    # The browser draws the text, with its own fonts.
    warnings.filterwarnings('ignore', 'Glyph')
    figure.savefig(stream, format='svg', transparent=True, metadata=no_metadata)
  _, start, text = stream.getvalue().partition('<svg')
  # With several charts on a page, ids such as axes_1 would not be unique.
  text = re.sub(r'<g id="[^"]*"', '<g', start + text)
  # The placeholders of charts.mplstyle.
  text = text.replace('#010203', 'var(--ink)').replace('#040506', 'var(--line)')
  return re.sub(r'\n\s*', '\n', text)


def _thin(values: np.ndarray) -> list[float]:
  """Averages neighboring values, so that charts of long runs stay small."""
  return [x.mean() for x in np.array_split(values, min(len(values), 150))]


def photo(image: np.ndarray) -> str:
  """Encodes an image, uint8 [h, w, 3], as a data URI."""
  return _uri(_shrunk(image), 'JPEG', quality=90)


def class_map(classes: np.ndarray, palette: np.ndarray) -> str:
  """Draws class ids, uint8 [h, w], as a data URI; 255 is transparent."""
  picture = _shrunk(classes, Image.Resampling.NEAREST)
  table = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
  picture.putpalette(table.tobytes())
  return _uri(picture, 'PNG', optimize=True, transparency=255)


def heat_map(image: np.ndarray, heat: np.ndarray) -> str:
  """Draws a map over the grayscale image as a data URI.

  Args:
    image: uint8 [h, w, 3].
    heat: float of any height and width, from 0 to 1.
  """
  gray = _shrunk(image).convert('L')
  level = Image.fromarray(np.nan_to_num(heat.astype(np.float32)))
  level = level.resize(gray.size, Image.Resampling.BILINEAR)
  color = matplotlib.colormaps['inferno'](np.asarray(level))[..., :3]
  mixed = 0.3 * np.asarray(gray)[..., None] / 255 + 0.7 * color
  return _uri(Image.fromarray(np.uint8(255 * mixed)), 'JPEG', quality=90)


def _shrunk(
  array: np.ndarray,
  resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
  picture = Image.fromarray(np.ascontiguousarray(array))
  picture.thumbnail((_LONGEST, _LONGEST), resampling)
  return picture


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  data = base64.b64encode(stream.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{data}'
