# SPDX-License-Identifier: Apache-2.0
"""Drawings of the report: charts as SVG, pictures as PNG or JPEG.

Arrays in, text out: every function returns something that can stand in an HTML
page without a second file. Nothing here knows a run folder.
"""

import base64
import html
import io
import re

import matplotlib
from matplotlib import colors
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

# Okabe and Ito, 2008: told apart with every common colour blindness. A role
# keeps its colour on the whole page; markers say the same without colour.
ROLE_COLORS = {'teacher': '#0072B2', 'student': '#E69F00', 'distill': '#009E73'}
ROLE_NAMES = {
  'teacher': 'Teacher',
  'student': 'Student',
  'distill': 'Distilled',
}
ROLE_MARKERS = {'teacher': 's', 'student': 'o', 'distill': 'D'}
TERM_COLORS = ('#D55E00', '#CC79A7', '#56B4E9', '#8C8C8C', '#9467BD', '#8C564B')
TERM_DASHES = ('--', ':', '-.')

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
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': _LINE,
  'grid.linewidth': 0.6,
  'legend.frameon': False,
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
  view_box = re.search(r'viewBox="[^"]+"', text)[0]
  text = re.sub(r'.*?<svg[^>]*>', '', text, count=1, flags=re.S)
  text = re.sub(r'<(metadata|style).*?</\1>', '', text, flags=re.S)
  # Several drawings share the page: names such as axes_1 would repeat.
  text = re.sub(r'<g id="[^"]*"', '<g', text)
  # The page's font, not matplotlib's ('font:' before 3.11).
  text = re.sub(r'font-family: [^;"]*; ?', '', text)
  text = re.sub(r'font: ([\d.]+px)[^;"]*', r'font-size: \1', text)
  text = text.replace(_INK, 'var(--ink)').replace(_LINE, 'var(--line)')
  text = re.sub(r'\n\s*', '\n', text)
  return f'<svg {view_box} role="img" aria-label="{html.escape(label)}">{text}'


def _thin(steps, values, most=150):
  """Means over neighbours, so that a long run stays a small drawing."""
  parts = min(len(steps), most)
  return [
    np.array([np.mean(part) for part in np.array_split(x, parts)])
    for x in (steps, values)
  ]


def _line_chart(lines, *, ylabel):
  """SVG text; `lines` has name -> (steps, values, options of `Axes.plot`)."""
  figure = Figure(figsize=(5.2, 3.4), dpi=72, layout='constrained')
  axes = figure.subplots()
  for name, (steps, values, options) in lines.items():
    axes.plot(*_thin(steps, values), label=name, **options)
  low, high = (
    f([f(values) for _, values, _ in lines.values()]) for f in (min, max)
  )
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
  axes.set(xlabel='step', ylabel=ylabel)
  axes.tick_params(length=0)
  axes.margins(x=0.02)
  axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1), ncols=3)
  return _svg(figure, f'{ylabel} over steps: {", ".join(lines)}')


@matplotlib.rc_context(_STYLE)
def miou_chart(series):
  """SVG text of role -> (steps, mIoU as fractions)."""
  lines = {}
  for role, (steps, values) in series.items():
    options = {'color': ROLE_COLORS[role], 'linewidth': 2}
    if len(steps) <= 40:
      options |= {'marker': ROLE_MARKERS[role], 'markersize': 4}
    lines[ROLE_NAMES[role]] = (steps, 100 * values, options)
  return _line_chart(lines, ylabel='mIoU val, %')


@matplotlib.rc_context(_STYLE)
def loss_chart(series, *, role):
  """SVG text of name -> (steps, values); 'loss' is the total."""
  options = {'color': ROLE_COLORS[role], 'linewidth': 2}
  lines = {'total': (*series['loss'], options)}
  terms = [name for name in series if name != 'loss']
  # The only term of a stage without distillation is its total.
  for i, name in enumerate(terms if len(terms) > 1 else ()):
    options = {
      'color': TERM_COLORS[i % len(TERM_COLORS)],
      'linestyle': TERM_DASHES[i % len(TERM_DASHES)],
    }
    lines[name] = (*series[name], options)
  return _line_chart(lines, ylabel='loss')


def signed(value, digits=2):
  """A number with its sign, a true minus, and no '−0.0'."""
  text = f'{value:+.{digits}f}'
  return text.replace('-', '−') if float(text) else '±' + text[1:]


@matplotlib.rc_context(_STYLE)
def class_chart(names, ious):
  """IoU per class: a row per class, a dot per network.

  Args:
    names: k class names, from top to bottom.
    ious: role -> k fractions, NaN where a class is absent.

  Returns:
    SVG text.
  """
  height = 0.9 + 0.28 * len(names)
  figure = Figure(figsize=(10.8, height), dpi=72, layout='constrained')
  axes = figure.subplots()
  y = np.arange(len(names))
  for i, (role, values) in enumerate(ious.items()):
    axes.scatter(
      100 * values,
      y + 0.2 * (i - (len(ious) - 1) / 2),
      s=30,
      color=ROLE_COLORS[role],
      marker=ROLE_MARKERS[role],
      linewidths=0,
      clip_on=False,
      zorder=3,
    )
  axes.set(xlim=(-1.5, 100), ylim=(len(names) - 0.4, -1), xlabel='IoU, %')
  axes.set_yticks(y, [name[:28] for name in names])
  axes.tick_params(length=0)
  axes.spines['left'].set_visible(False)
  if {'student', 'distill'} <= set(ious):
    gains = 100 * (ious['distill'] - ious['student'])
    gains = ['–' if np.isnan(gain) else signed(gain, 1) for gain in gains]
    right = axes.secondary_yaxis('right')
    right.set_yticks([-0.8, *y], ['gain', *gains])
    right.tick_params(length=0)
    right.spines['right'].set_visible(False)
  return _svg(figure, f'IoU per class: {", ".join(names)}')


# Pictures.


def _size(height, width, wanted=400):
  """Small pictures grow by whole pixels, so that edges stay; large ones shrink.

  Returns:
    (width, height) for PIL.
  """
  scale = wanted / max(height, width)
  scale = round(scale) if scale > 1 else scale
  return max(1, round(width * scale)), max(1, round(height * scale))


def _uri(picture, kind, **options):
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  data = base64.b64encode(stream.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{data}'


def photo(image):
  """uint8 [h, w, 3] as a data URI."""
  picture = Image.fromarray(np.ascontiguousarray(image))
  picture = picture.resize(_size(*image.shape[:2]), Image.Resampling.BICUBIC)
  return _uri(picture, 'JPEG', quality=88)


def class_map(classes, palette):
  """Classes as flat colours; ignored pixels, of value 255, are transparent.

  Args:
    classes: uint8 [h, w].
    palette: uint8 [k, 3], k below 256.

  Returns:
    A PNG as a data URI.
  """
  picture = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8))
  picture = picture.resize(_size(*classes.shape), Image.Resampling.NEAREST)
  table = np.zeros((256, 3), np.uint8)
  table[: len(palette)] = palette
  picture.putpalette(table.tobytes())
  return _uri(picture, 'PNG', optimize=True, transparency=255)


def heat_map(image, attention):
  """Attention over the grey image.

  Args:
    image: uint8 [h, w, 3].
    attention: float [th, tw] from 0 to 1.

  Returns:
    A JPEG as a data URI.
  """
  size = _size(*image.shape[:2])
  grey = Image.fromarray(np.ascontiguousarray(image)).convert('L').resize(size)
  level = Image.fromarray(np.nan_to_num(attention.astype(np.float32)))
  level = np.asarray(level.resize(size, Image.Resampling.BILINEAR))
  color = matplotlib.colormaps['inferno'](level)[..., :3]
  mixed = 0.3 * np.asarray(grey)[..., None] / 255 + 0.7 * color
  return _uri(Image.fromarray(np.uint8(255 * mixed)), 'JPEG', quality=88)


def heat_gradient():
  """CSS colours of the heat maps from low to high."""
  stops = matplotlib.colormaps['inferno'](np.linspace(0, 1, 7))
  return ', '.join(map(colors.to_hex, stops))


# The page: light, dark, on paper and on a phone.
PAGE_CSS = """
:root{color-scheme:light dark;--teacher:@teacher;--student:@student;
--distill:@distill;--ink:#1b1f24;--soft:#5b6470;--line:#d5d9df;
--paper:#fff;--tint:#f3f5f8}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#9aa4b1;
--line:#3a414b;--paper:#14171b;--tint:#1f242b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 3rem;max-width:1120px;
background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6rem}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem}
h3{font-size:1.05rem;margin:2rem 0 .5rem}
section{border-top:1px solid var(--line);margin-top:2.5rem}
section h2{margin-top:1rem;overflow-wrap:anywhere}
a{color:inherit}
.lead{font-size:1.15rem;max-width:48rem;margin:.3rem 0 1.2rem}
.note,small,dt{color:var(--soft);font-size:.85rem}
.missing{background:var(--tint);border-left:4px solid var(--student);
padding:.5rem .9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin-bottom:1rem;
font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;font-size:.8rem}
th:first-child,td:first-child{padding-left:0}
:is(th,td):nth-child(-n+2){text-align:left}
i{display:inline-block;width:.8em;height:.8em;margin-right:.45em}
i.dot{width:.7em;height:.7em;background:var(--teacher)}
i.student{background:var(--student);border-radius:50%}
i.distill{background:var(--distill);transform:rotate(45deg) scale(.9)}
i.heat{width:8em;margin:0 .3em}
.void,.row img{background:repeating-linear-gradient(135deg,#b0b2b8 0 4px,
#84878e 4px 8px)}
i:not(.dot){outline:1px solid var(--line)}
figure{margin:0;min-width:0}
figcaption{font-size:.85rem;display:flex;align-items:baseline;
white-space:nowrap}
figcaption small{margin-left:auto;font-size:.75rem}
.charts{display:grid;gap:1.2rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
.charts figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:.15rem 1rem;margin:.3rem 0 .6rem;
font-size:.85rem}
.row{display:grid;gap:.5rem;margin-bottom:.6rem;
grid-template-columns:repeat(var(--n),1fr)}
.row img{display:block;width:100%;height:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;
font-size:.9rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
details{margin-top:1rem;font-size:.9rem}
pre{background:var(--tint);padding:.8rem;overflow-x:auto;font-size:.85em}
@media(max-width:720px){.row{grid-template-columns:repeat(2,1fr)}}
@media print{figure,tr,dl{break-inside:avoid}h3{break-after:avoid}
*{print-color-adjust:exact}}
"""
for _role, _color in ROLE_COLORS.items():
  PAGE_CSS = PAGE_CSS.replace(f'@{_role}', _color)
