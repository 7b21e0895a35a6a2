# SPDX-License-Identifier: Apache-2.0
"""Drawings of the report: curves and dots as SVG, pictures as PNG or JPEG.

Arrays in, text out: every function returns something that can stand in an HTML
page without a second file. Nothing here knows a run folder.
"""

import base64
import html
import io
import math
import re

import matplotlib
import numpy as np
from matplotlib import cm
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito, 2008: told apart with every common colour blindness. The roles
# keep theirs on the whole page; markers and dashes say the same without colour.
ROLE_COLORS = {'teacher': '#0072B2', 'student': '#E69F00', 'distill': '#009E73'}
ROLE_MARKERS = {'teacher': 's', 'student': 'o', 'distill': 'D'}
TERM_COLORS = ('#D55E00', '#CC79A7', '#56B4E9', '#8C8C8C', '#9467BD', '#8C564B')
TERM_DASHES = ('4 2', '1 1.6', '6 2 1 2', '2 2', '8 3', '1 3')

RIGHT, WRONG, MENDED = '#E1E4E9', '#B2182B', '#2FB594'
_HATCH = ((176, 178, 184), (132, 135, 142))  # Ignored pixels: two greys.

# Colours that no drawing uses: they become variables of the page's CSS, so that
# text and grid follow the light or dark theme of the reader.
_INK, _LINE = '#010203', '#040506'
_STYLE = {
  'svg.fonttype': 'none',  # Text stays text: small, sharp, searchable.
  'svg.hashsalt': 'attnfd_jax',
  'font.family': 'DejaVu Sans',
  'font.size': 9.5,
  'text.color': _INK,
  'text.parse_math': False,  # A class may be called 'a$b'.
  'axes.edgecolor': _LINE,
  'axes.labelcolor': _INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _LINE,
  'grid.linewidth': 0.6,
  'xtick.color': _LINE,
  'ytick.color': _LINE,
  'xtick.labelcolor': _INK,
  'ytick.labelcolor': _INK,
}


def _svg(figure, label):
  """The figure as inline SVG without outside references."""
  stream = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  figure.savefig(stream, format='svg', transparent=True, metadata=nothing)
  text = stream.getvalue()
  text = text[text.index('<svg') :]
  _, _, width, height = re.search(r'viewBox="([^"]+)"', text)[1].split()
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.S)
  # Several drawings share the page: names such as axes_1 would repeat.
  text = re.sub(r'<g id="[^"]*"', '<g', text)
  # The page's fonts and rules, not matplotlib's ('font:' before 3.11).
  text = re.sub(r'<style.*?</style>', '', text, flags=re.S)
  text = re.sub(r'font-family: [^;"]*; ?', '', text)
  text = re.sub(r'font: ([\d.]+px)[^;"]*', r'font-size: \1', text)
  opening = (
    f'<svg viewBox="0 0 {width} {height}" role="img" '
    f'style="max-width:{float(width) * 1.45:.0f}px" '
    f'aria-label="{html.escape(label)}">'
  )
  text = re.sub(r'^<svg[^>]*>', lambda _: opening, text)
  text = text.replace(_INK, 'var(--ink)').replace(_LINE, 'var(--line)')
  return re.sub(r'\n\s*', '\n', text)


def _thin(steps, values, most=150):
  """Means over neighbours, so that a long run stays a small drawing."""
  parts = min(len(steps), most)
  return [
    np.array([np.mean(p) for p in np.array_split(np.asarray(x, float), parts)])
    for x in (steps, values)
  ]


def _axes(width, height, left=44, right=12, top=8, bottom=36):
  """Axes with margins in points, so that neighbours on the page line up."""
  figure = Figure(figsize=(width / 72, height / 72), dpi=72)
  box = (left, bottom, width - left - right, height - top - bottom)
  scale = (width, height, width, height)
  return figure, figure.add_axes([b / s for b, s in zip(box, scale, strict=True)])


def miou_curves(series):
  """All stages in one axes.

  Args:
    series: role -> (steps, mIoU as fractions), none of them empty.

  Returns:
    SVG text.
  """
  with matplotlib.rc_context(_STYLE):
    figure, axes = _axes(360, 230)
    for role, (steps, values) in series.items():
      steps, values = _thin(steps, values)
      axes.plot(
        steps,
        100 * values,
        color=ROLE_COLORS[role],
        linewidth=2,
        marker=ROLE_MARKERS[role] if len(steps) <= 40 else None,
        markersize=4,
      )
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    _finish(axes, 'mIoU, %')
    return _svg(figure, 'mIoU on the validation split over steps')


def loss_curves(series, *, role):
  """One stage: the total as a broad line, every term as a dashed one.

  Args:
    series: name -> (steps, values), none of them empty; 'loss' is the total.
    role: whose colour the total has.

  Returns:
    SVG text and the key: a list of (name, colour, dashes or '').
  """
  key = []
  with matplotlib.rc_context(_STYLE):
    figure, axes = _axes(360, 230)
    names = sorted(series, key=lambda name: name != 'loss')
    terms = 0
    for name in names:
      color, dashes = ROLE_COLORS[role], ''
      if name != 'loss':
        color = TERM_COLORS[terms % len(TERM_COLORS)]
        dashes = TERM_DASHES[terms % len(TERM_DASHES)]
        terms += 1
      style = (0, tuple(map(float, dashes.split()))) if dashes else 'solid'
      axes.plot(
        *_thin(*series[name]),
        color=color,
        linewidth=1.5 if dashes else 2.6,
        linestyle=style,
      )
      key.append((name, color, dashes))
    values = np.concatenate([series[name][1] for name in names])
    # A small term beside a large one is invisible on a linear axis.
    if values.min() > 0 and values.max() / values.min() > 20:
      axes.set_yscale('log')
      _decimal_ticks(axes.yaxis, values)
    _finish(axes, 'loss')
    return _svg(figure, f'loss of the stage {role} over steps'), key


def _decimal_ticks(axis, values):
  """Ticks such as 0.1 and 1: an SVG text knows no exponents."""
  decades = math.log10(values.max() / values.min())
  subs = (1, 2, 5) if decades < 2 else (1,)
  axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=9))
  axis.set_major_formatter(lambda value, _: f'{value:g}')
  axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _finish(axes, ylabel):
  axes.set_xlabel('step', labelpad=2)
  axes.set_ylabel(ylabel, labelpad=4)
  axes.tick_params(length=0)
  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value):
  """25000 -> 25k: tick labels that fit side by side."""
  for size, unit in ((1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
      return f'{value / size:g}{unit}'
  return f'{value:g}'


def class_dots(names, values):
  """IoU per class: a row per class, a dot per network, sorted by the gain.

  Without a student or a distilled student the order is by the IoU itself.
  Classes without any value come last.

  Args:
    names: k class names.
    values: role -> k fractions, NaN where a class is absent.

  Returns:
    List of SVG texts; more than one if there are many classes.
  """
  values = {role: 100 * np.asarray(v, float) for role, v in values.items()}
  paired = 'student' in values and 'distill' in values
  gains = values['distill'] - values['student'] if paired else None
  order_by = gains if paired else next(iter(values.values()))
  order = np.argsort(-np.nan_to_num(order_by, nan=-1e3), kind='stable')
  columns = 1 if len(names) <= 24 else 2 * math.ceil(len(names) / 80)
  drawings = []
  for rows in np.array_split(order, columns):
    with matplotlib.rc_context(_STYLE):
      drawings.append(_dots(names, values, gains, rows, wide=columns == 1))
  return drawings


def _dots(names, values, gains, rows, *, wide):
  labels = [_clip(names[i]) for i in rows]
  left = 14 + 5.7 * max(len(label) for label in labels)
  right = 12 if gains is None else 46
  figure, axes = _axes(
    500 if wide else 360, 62 + 18 * len(rows), left, right, top=24
  )
  y = np.arange(len(rows))
  if gains is not None:
    start, stop = values['student'][rows], values['distill'][rows]
    axes.hlines(y, start, stop, color=_INK, alpha=0.35, linewidth=2.4, zorder=2)
    axes.text(
      1 + right / 2 / (axes.bbox.width),
      -0.95,
      'gain',
      ha='center',
      va='center',
      transform=axes.get_yaxis_transform(),
    )
    for row, gain in enumerate(gains[rows]):
      axes.text(
        1 + (right - 4) / axes.bbox.width,
        row,
        '–' if np.isnan(gain) else signed(gain),
        ha='right',
        va='center',
        transform=axes.get_yaxis_transform(),
      )
  for role, value in values.items():
    axes.scatter(
      value[rows],
      y,
      s=34,
      color=ROLE_COLORS[role],
      marker=ROLE_MARKERS[role],
      linewidths=0,
      zorder=3,
      clip_on=False,
    )
  axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), yticks=y)
  axes.set_yticklabels(labels)
  axes.set_xlabel('IoU, %', labelpad=2)
  axes.tick_params(length=0)
  axes.spines['left'].set_visible(False)
  return _svg(figure, 'IoU per class: ' + ', '.join(labels))


def _clip(name, most=20):
  return name if len(name) <= most else name[: most - 1] + '…'


def signed(points):
  """One decimal with its sign, a true minus, and no '−0.0'."""
  points = round(points, 1)
  return f'{points:+.1f}'.replace('-', '−') if points else '±0.0'


# Pictures.


def _target(height, width):
  """Size on the page: small pictures grow by whole pixels, large ones shrink."""
  longest = max(height, width)
  factor = 480 / longest if longest > 480 else max(1, round(320 / longest))
  return max(1, round(width * factor)), max(1, round(height * factor))


def _uri(picture, kind, **options):
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  data = base64.b64encode(stream.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{data}'


def photo(image):
  """uint8 [h, w, 3] as a data URI."""
  picture = Image.fromarray(np.ascontiguousarray(image))
  picture = picture.resize(_target(*image.shape[:2]), Image.Resampling.BICUBIC)
  return _uri(picture, 'JPEG', quality=85)


def class_map(classes, colors):
  """Classes as flat colours; what is not below len(colors) is hatched grey.

  Args:
    classes: uint8 [h, w].
    colors: uint8 [k, 3], k at most 254.

  Returns:
    A PNG as a data URI.
  """
  k = min(len(colors), 254)
  size = _target(*classes.shape)
  picture = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8))
  index = np.array(picture.resize(size, Image.Resampling.NEAREST))
  y, x = np.indices(index.shape)
  index = np.where(index < k, index, 254 + (x + y) // 5 % 2).astype(np.uint8)
  table = np.zeros((256, 3), np.uint8)
  table[:k] = np.asarray(colors)[:k]
  table[254:] = _HATCH
  picture = Image.fromarray(index).convert('P')
  picture.putpalette(table.tobytes())
  return _uri(picture, 'PNG', optimize=True)


def _rgb(*colors):
  return np.array([list(bytes.fromhex(color[1:])) for color in colors])


def error_map(label, prediction):
  """Wrong pixels red, right ones grey, ignored ones hatched."""
  wrong = (label != prediction).astype(np.uint8)
  wrong[label == 255] = 255
  return class_map(wrong, _rgb(RIGHT, WRONG))


def change_map(label, before, after):
  """Pixels that became right or wrong from one network to the other."""
  change = np.zeros(label.shape, np.uint8)
  change[(before == label) & (after != label)] = 1
  change[(before != label) & (after == label)] = 2
  change[label == 255] = 255
  return class_map(change, _rgb(RIGHT, WRONG, MENDED))


def pixel_accuracy(label, prediction):
  """Share of right pixels among those that count; NaN if there are none."""
  counts = label != 255
  return float(np.mean((label == prediction)[counts])) if counts.any() else np.nan


def _enlarged(attention, size):
  picture = Image.fromarray(np.ascontiguousarray(attention, dtype=np.float32))
  return np.array(picture.resize(size, Image.Resampling.BILINEAR))


def heat(image, attention):
  """Attention over the grey image, from its own smallest to largest value.

  Args:
    image: uint8 [h, w, 3].
    attention: float [th, tw], any range; a constant map is all dark.

  Returns:
    A JPEG as a data URI.
  """
  size = _target(*image.shape[:2])
  grey = Image.fromarray(np.ascontiguousarray(image)).convert('L').resize(size)
  level = _enlarged(np.nan_to_num(attention), size)
  span = level.max() - level.min()
  level = (level - level.min()) / (span if span > 0 else 1)
  colors = matplotlib.colormaps['inferno'](level)[..., :3]
  mixed = 0.3 * np.asarray(grey)[..., None] / 255 + 0.7 * colors
  picture = Image.fromarray(np.uint8(np.clip(255 * mixed, 0, 255)))
  return _uri(picture, 'JPEG', quality=85)


def agreement(first, second):
  """Correlation of two attention maps; NaN if one of them is constant."""
  size = first.shape[::-1]
  first = np.asarray(first, float).ravel()
  second = _enlarged(second, size).astype(float).ravel()
  if not (np.std(first) > 0 and np.std(second) > 0):
    return np.nan
  return float(np.corrcoef(first, second)[0, 1])


def heat_gradient():
  """CSS colours of the attention maps from low to high."""
  levels = cm.ScalarMappable(cmap='inferno').to_rgba(np.linspace(0, 1, 7))
  return ', '.join(matplotlib.colors.to_hex(level) for level in levels)
