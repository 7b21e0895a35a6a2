# SPDX-License-Identifier: Apache-2.0
"""Renders random street scenes: a segmentation data set without a download.

A pinhole camera stands on a road. Everything is a polygon in meters, painted
from far to near into both image and label, so labels are exact. Color alone
does not identify a class: walls, roads and pavements share their grays, cars
and clothes have any color, puddles and windows show the sky, and posters show
people and cars that are labeled 'building'. All sizes and probabilities are our
choice.
"""

from collections.abc import Callable, Iterable, Sequence
import math
import random
from typing import TypeAlias

import cv2
import numpy as np

from attnfd_jax.data import pairs, views
from attnfd_jax.data.records import DataConfig, Record, Size
from attnfd_jax.errors import check_range
from attnfd_jax.losses import IGNORE_LABEL

Color: TypeAlias = Sequence[float] | np.ndarray  # RGB in [0, 255].
# Polygon of (s, t) in meters on a plane.
Shape: TypeAlias = list[tuple[float, float]]
# Maps (s, t) in meters to the world: x right, y up, z ahead.
Plane: TypeAlias = Callable[[float, float], tuple[float, float, float]]

CLASS_NAMES = tuple(
  'sky building road marking pavement tree pole car person'.split()
)
SKY, BUILDING, ROAD, MARKING, PAVEMENT, TREE, POLE, CAR, PERSON = range(9)
# fmt: off
# For each weather and time of day: RGB of the sky at the top of the image, RGB
# at the horizon and of fog, factors that sunlight multiplies colors by,
# brightness inside a shadow (1: no shadows), meters after which 63 % of the
# light comes from fog, amount of clouds.
LIGHTINGS = (
  ((62, 112, 190), (178, 205, 228), (1.08, 1.03, .98), .5, 400, .4),
  ((120, 150, 190), (208, 215, 220), (1., 1., 1.), .6, 250, .7),
  ((150, 156, 162), (196, 198, 200), (.8, .82, .86), .93, 160, 1.),
  ((98, 134, 178), (248, 212, 156), (1.2, .99, .76), .42, 200, .3),
  ((54, 58, 98), (212, 134, 112), (.74, .66, .7), .8, 200, .6),
  ((178, 182, 184), (188, 190, 190), (.8, .82, .83), 1., 55, 0.),
)
# As Cityscapes, but lane markings are white and poles yellow, to be visible.
PALETTE = np.array([
  (70, 130, 180), (70, 70, 70), (128, 64, 128), (255, 255, 255),
  (244, 35, 232), (107, 142, 35), (220, 220, 0), (0, 0, 142), (220, 20, 60),
], np.uint8)
GREYS = ((72, 72, 76), (94, 92, 90), (112, 114, 120), (128, 122, 112),
         (148, 142, 130), (166, 164, 160))
WALLS = GREYS + (
  (150, 86, 66), (116, 66, 56), (196, 172, 130), (212, 204, 190),
  (226, 226, 222), (150, 176, 200), (126, 146, 104), (208, 160, 140))
PAINTS = ((22, 22, 26), (232, 232, 230), (150, 152, 156), (86, 88, 94),
          (168, 26, 28), (30, 58, 128), (44, 92, 66), (214, 172, 40),
          (112, 84, 62), (126, 168, 204))
LEAVES = ((58, 92, 42), (84, 112, 48), (44, 70, 48), (150, 116, 44))
SKINS = ((236, 196, 168), (204, 152, 118), (150, 102, 74), (92, 62, 46))
METALS = ((66, 68, 70), (128, 130, 132), (44, 58, 50), (104, 86, 66))
LINES = ((212, 212, 208), (226, 226, 220), (206, 170, 70))
DARK, BLACK = (46, 52, 60), (24, 24, 26)
# fmt: on
ROUGHNESS = np.full(256, 0.05, np.float32)  # Contrast of texture by class.
ROUGHNESS[[SKY, TREE, CAR]] = 0, 0.12, 0.02
CIRCLE = [(math.cos(a), math.sin(a)) for a in np.arange(10) * math.pi / 5]


def ground(x: float, z: float) -> tuple[float, float, float]:
  """The plane of the road."""
  return x, 0.0, z


def facing(x: float, z: float, scale: float = 1.0, side: float = 1) -> Plane:
  """Upright plane across the road; s runs right, or left if side is -1."""
  return lambda s, t: (x + side * scale * s, scale * t, z)


def along(
  x: float, z: float, y: float = 0.0, scale: float = 1.0, run: float = 0.0
) -> Plane:
  """Plane beside the road; s runs ahead, x changes by `run` per meter up."""
  return lambda s, t: (x + run * t, y + scale * t, z + scale * s)


def box(s0: float, t0: float, s1: float, t1: float) -> Shape:
  """Rectangle between two corners."""
  return [(s0, t0), (s1, t0), (s1, t1), (s0, t1)]


def disc(
  s: float, t: float, radius: float, height: float | None = None
) -> Shape:
  """Ellipse with center (s, t) and two radii, or a circle."""
  return [(s + radius * c, t + (height or radius) * d) for c, d in CIRCLE]


def strip(x0: float, x1: float, z0: float, z1: float) -> Shape:
  """Long rectangle of ground with extra corners, to follow a bent road."""
  depths = [z0 * (z1 / z0) ** (i / 6) for i in range(7)]
  return [(x0, z) for z in depths] + [(x1, z) for z in reversed(depths)]


def scaled(color: Color, factor: float) -> list[float]:
  """A lighter or darker color."""
  return [factor * c for c in color]


class Painter:
  """Camera, light and canvas of a scene; the canvas is twice its size."""

  def __init__(self, generator: np.random.Generator, height: int, width: int):
    self.generator = generator
    # For single numbers, several times faster than NumPy.
    self.rng = rng = random.Random(int(generator.integers(2**63)))
    self.image = np.zeros((2 * height, 2 * width, 3), np.uint8)
    self.label = np.zeros((2 * height, 2 * width), np.uint8)
    self.zenith, self.skyline, self.light, *rest = rng.choice(LIGHTINGS)
    self.shade, self.visibility, self.clouds = rest
    self.focal = rng.uniform(1.4, 1.9) * width
    self.eye = rng.uniform(1.25, 2.0)  # Meters above the ground.
    self.horizon = int(rng.uniform(0.36, 0.52) * 2 * height)
    self.center = rng.uniform(0.3, 0.7) * 2 * width  # Vanishing point.
    self.bend = rng.uniform(-1, 1) ** 3 * 0.005
    self.sun = rng.uniform(-1.2, 1.2)  # Length of shadows, to the right.
    # Where the road ends.
    self.left, self.right = -rng.uniform(2, 6), rng.uniform(2, 4.5)
    # Distance z, function that draws the object, its arguments.
    self.things: list[tuple[float, Callable[..., None], tuple]] = []
    # Between houses: x, and where they begin and end in z.
    self.gaps: list[tuple[float, float, float]] = []
    self.shadows: list[Shape] = []  # On the ground.

  def add(self, z: float, draw: Callable[..., None], *arguments) -> None:
    """Adds an object to draw at distance z."""
    self.things.append((z, draw, arguments))

  def pick(
    self, colors: Sequence[Color], spread: float = 14
  ) -> tuple[float, float, float]:
    """Picks a color and makes it a bit lighter or darker, warmer or colder."""
    shift, warmth = self.rng.gauss(0, spread), self.rng.gauss(0, spread / 3)
    red, green, blue = self.rng.choice(colors)
    return red + shift + warmth, green + shift, blue + shift - warmth

  def nearest(self, x: float) -> float:
    """The least z at which objects at x are inside the image."""
    side = self.center if x < 0 else self.image.shape[1] - self.center
    return max(5.0, self.focal * abs(x) / side)

  def depth(self, x: float, far: float) -> float:
    """Random z where objects at x are visible, more often near than far."""
    near = 1.1 * self.nearest(x)
    return near + self.rng.random() ** 2 * max(far - near, 4)

  def pixels(self, plane: Plane, shape: Shape) -> np.ndarray:
    """Projects a shape to (column, row) on the canvas."""
    corners = []
    for x, y, z in (plane(*corner) for corner in shape):
      column = self.center + self.focal * (x / z + self.bend * z)
      corners.append((column, self.horizon - self.focal * (y - self.eye) / z))
    return np.array(corners, np.int32)

  def fill(
    self,
    plane: Plane,
    shapes: Sequence[Shape],
    color: Color,
    class_id: int | None = None,
  ) -> None:
    """Fills shapes in the image and, unless class_id is None, in the label.

    The shapes must not overlap. Farther ones are fogged more.
    """
    pixels = [self.pixels(plane, shape) for shape in shapes]
    # A shape on the ground has many depths: `draw_ground` adds its fog.
    depth = 0 if plane is ground else plane(*shapes[0][0])[2]
    clear = math.exp(-depth / self.visibility)
    channels = zip(color, self.light, self.skyline, strict=True)
    color = [
      min(max(c * sun, 0), 255) * clear + fog * (1 - clear)
      for c, sun, fog in channels
    ]
    cv2.fillPoly(self.image, pixels, color)
    if class_id is not None:
      cv2.fillPoly(self.label, pixels, class_id)


def smooth_noise(
  generator: np.random.Generator, height: int, width: int, cells: int
) -> np.ndarray:
  """Noise of about unit variance, float32, from `cells` values per row."""
  rows = max(2, cells * height // width)
  noise = generator.standard_normal((rows, cells), np.float32)
  return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_sky(p: Painter) -> None:
  """Sky with clouds."""
  # At half the resolution, since it is smooth.
  shape = p.horizon // 2 + 1, p.image.shape[1] // 2
  skyline = np.array(p.skyline, np.float32)
  mix = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None, None]
  sky = np.array(p.pick([p.zenith]), np.float32) * (1 - mix) + skyline * mix
  noise = smooth_noise(p.generator, *shape, 5)
  noise += 0.5 * smooth_noise(p.generator, *shape, 17)
  cover = np.clip(noise + 2 * p.clouds - 1, 0, p.clouds)
  cloud = 0.5 * skyline + p.rng.uniform(80, 125)
  sky = sky + 0.8 * cover[..., None] * (cloud - sky)
  sky = np.clip(sky, 0, 255).astype(np.uint8)
  p.image[: 2 * shape[0]] = cv2.resize(sky, (2 * shape[1], 2 * shape[0]))


def draw_skyline(p: Painter) -> None:
  """Houses and tree tops at the end of the road."""
  x, z = -80, 110
  while x < 80:
    width, height = p.rng.uniform(8, 24), p.rng.uniform(2, 10)
    shape, colors, class_id = box(0, -2, width, height + 4), WALLS, BUILDING
    if p.rng.random() < 0.4:
      shape = disc(width / 2, 0, width * 0.7, height)
      colors, class_id = LEAVES, TREE
    p.fill(facing(x, z), [shape], p.pick(colors), class_id)
    x += width


def draw_ground(p: Painter) -> None:
  """Pavement, the road, side streets in the gaps, puddles and shadows."""
  rng, below, left, right = p.rng, slice(p.horizon, None), p.left, p.right
  road, paving = p.pick(GREYS), p.pick(GREYS)
  p.image[below] = np.clip(np.multiply(paving, p.light), 0, 255)
  p.label[below] = PAVEMENT
  slabs = [box(-40, z, 40, z + 0.06) for z in range(4, 32, 3)]
  slabs += [strip(x, x + 0.05, 2, 60) for x in (left - 2, right + 2)]
  p.fill(ground, slabs, scaled(paving, 0.84))
  curbs = [strip(left - 0.3, left, 1, 150), strip(right, right + 0.3, 1, 150)]
  p.fill(ground, curbs, p.pick(GREYS, 30))
  p.fill(ground, [strip(left, right, 1, 150)], road, ROAD)
  for x, near, far in p.gaps:
    street = box(left if x < 0 else right, near + 1, 8 * x, far - 1)
    p.fill(ground, [street], road, ROAD)
  for _ in range(rng.randrange(4)):  # Repairs and manhole covers.
    x, z = rng.uniform(left + 0.5, right - 2), rng.uniform(4, 20)
    repair = strip(x, x + rng.uniform(0.5, 1.5), z, z * 1.3)
    p.fill(ground, [repair], p.pick([road], 18))
    p.fill(ground, [disc(x, z - 1, 0.35)], scaled(road, 0.6))
  draw_markings(p)
  for _ in range(rng.randrange(3) if p.shade > 0.5 else 0):  # Puddles.
    x, z = rng.uniform(left - 1, right + 1), rng.uniform(4, 15)
    puddle = disc(x, z, rng.uniform(0.5, 1.8), rng.uniform(0.5, 1.5))
    sky = np.divide(p.skyline, p.light)
    p.fill(ground, [puddle], sky * rng.uniform(0.75, 1))
  shaded = np.zeros(p.label.shape, np.uint8)
  for shadow in p.shadows:
    cv2.fillPoly(shaded, [p.pixels(ground, shadow)], 255)
  dark = cv2.convertScaleAbs(p.image, alpha=p.shade)
  cv2.copyTo(dark[below], shaded[below], p.image[below])
  rows = np.arange(0.5, p.image.shape[0] - p.horizon, dtype=np.float32)
  clear = np.exp(-p.focal * p.eye / rows / p.visibility)[:, None, None]
  fog = np.array(p.skyline, np.float32) * (1 - clear)
  p.image[below] = p.image[below] * clear + fog


def draw_markings(p: Painter) -> None:
  """Lines between lanes and at the edges, and perhaps a crossing."""
  rng, width, left, right = p.rng, p.rng.uniform(0.14, 0.24), p.left, p.right
  lanes = max(2, round((right - left) / 3.2))
  paint = scaled(p.pick(LINES, 10), rng.uniform(0.7, 1.05))  # Worn.
  lines = []
  for lane in range(1, lanes):
    x = left + (right - left) * lane / lanes - width / 2
    if rng.random() < 0.25:
      lines.append(strip(x, x + width, 2, 60))
      continue
    dash, pitch = rng.choice(((2, 4), (3, 6), (3, 5)))
    starts = rng.uniform(2, 4) + pitch * np.arange(10)
    lines += [box(x, z, x + width, z + dash) for z in starts]
  if rng.random() < 0.6:
    edges = (left + 0.4, right - 0.4 - width)
    lines += [strip(x, x + width, 1, 70) for x in edges]
  p.fill(ground, lines, paint, MARKING)
  if rng.random() < 0.4:  # Zebra crossing.
    z, bar = rng.uniform(5, 16), rng.uniform(0.4, 0.6)
    bars = np.arange(left + 0.2, right - bar, 2 * bar)
    p.fill(ground, [box(x, z, x + bar, z + 3) for x in bars], paint, MARKING)


def draw_building(p: Painter, x: float, near: float, far: float) -> None:
  """House beside the road, whose wall is at x, from near to far."""
  rng, side, length = p.rng, math.copysign(1, x), far - near
  storey, base = rng.uniform(2.8, 3.4), p.pick(WALLS)
  top = 1 + storey * rng.randint(1, 5)
  glass = rng.choice((DARK, BLACK, p.skyline, scaled(base, 0.55)))
  pitch, pier = rng.uniform(1.8, 3.5), rng.uniform(0.8, 1.4)
  front, wall = facing(x, near, side=side), along(x, near)
  sunny = 1.1 if side * p.sun > 0 else p.shade**0.5
  faces = [(wall, length, sunny)]
  if near > p.nearest(x):
    faces.append((front, 12, rng.uniform(0.7, 1.1)))
  for plane, span, gain in faces:
    color = scaled(base, gain)
    p.fill(plane, [box(0, 0, span, top)], color, BUILDING)
    if near < 50:  # Bands of glass behind piers: fewer shapes than windows.
      floors = np.arange(1.3, top - 1.8, storey).tolist()
      bands = [box(0, t, span, t + 1.5) for t in floors]
      p.fill(plane, bands, scaled(glass, gain))
      starts = np.arange(0, span, pitch).tolist()
      p.fill(plane, [box(s, 0, s + pier, top) for s in starts], color)
    ledges = [box(0, top - 0.5, span, top), box(0, 0, span, 0.5)]
    p.fill(plane, ledges, scaled(color, rng.uniform(0.7, 1.2)))
  if rng.random() < 0.5:  # Pitched roof.
    slope, rise = side * rng.uniform(0.5, 1.5), rng.uniform(1, 3)
    roof, ridge = along(x, near, top, run=slope), top + rise
    p.fill(roof, [box(0, 0, length, rise)], p.pick(WALLS), BUILDING)
    gable = [(0, top), (abs(slope) * rise, ridge), (12, ridge), (12, top)]
    p.fill(front, [gable], base, BUILDING)
  if rng.random() < 0.5:  # Shop with an awning.
    p.fill(wall, [box(0.4, 0.3, length - 0.4, 2.6)], glass)
    awning, end = along(x, near, 3.3, run=side * 1.3), length - 0.4
    p.fill(awning, [box(0.4, -0.8, end, 0)], p.pick(PAINTS), BUILDING)
  if rng.random() < 0.4:  # A drainpipe looks like a pole.
    p.fill(wall, [box(length - 0.4, 0, length - 0.15, top)], p.pick(METALS))
  if rng.random() < 0.5 and near < 30:  # Poster.
    s = rng.uniform(0, length - 2.4)
    p.fill(wall, [box(s, 0.5, s + 2.4, 3)], p.pick(PAINTS))
    if rng.random() < 0.6:
      draw_person(p, along(x, near + s + 1.2, 0.6, 2.2), None)
    else:
      draw_car_side(p, along(x, near + s, 0.8, 0.55), None)


def draw_tree(p: Painter, x: float, z: float, height: float) -> None:
  """Trunk and crown."""
  rng, plane, bark = p.rng, facing(x, z), p.pick(METALS)
  width, lean = rng.uniform(0.12, 0.25), rng.uniform(-0.4, 0.4)
  radius = rng.uniform(0.22, 0.36) * height
  trunk = [(-width, 0), (width, 0), (lean + 0.1, height), (lean, height)]
  p.fill(plane, [trunk], bark, TREE)
  leaf = p.pick(LEAVES)
  for i in range(12):  # From leaves in the shade to those in the sun.
    angle, reach = rng.uniform(0, 6.3), radius * rng.random() ** 0.5
    s = lean + reach * math.cos(angle) - i * 0.02 * radius * p.sun
    t = 0.68 * height + reach * math.sin(angle) + i * 0.02 * radius
    size = radius * rng.uniform(0.25, 0.5)
    blob = [(a + rng.uniform(-0.3, 0.3), b) for a, b in disc(s, t, size)]
    p.fill(plane, [blob], scaled(p.pick([leaf], 8), 0.6 + i * 0.05), TREE)


def draw_pole(p: Painter, x: float, z: float, kind: str) -> None:
  """Lamp, traffic light, road sign or bollard; its class is 'pole'."""
  rng, metal, width = p.rng, p.pick(METALS), p.rng.uniform(0.08, 0.15)
  plane = facing(x, z, side=-math.copysign(1, x))
  top = {'lamp': rng.uniform(5, 8), 'bollard': 1.0}.get(kind, 2.9)
  p.fill(plane, [box(-width, 0, width, top)], metal, POLE)
  if kind == 'lamp':
    p.fill(plane, [box(0, top, 1.6, top + 0.15)], metal, POLE)
    p.fill(plane, [box(1.2, top - 0.15, 2, top + 0.2)], p.pick(METALS), POLE)
  elif kind == 'light':
    p.fill(plane, [box(-0.28, 2.2, 0.28, 3.3)], BLACK, POLE)
    t, color = rng.choice(((3.0, (235, 40, 30)), (2.45, (40, 220, 120))))
    p.fill(plane, [disc(0, t, 0.18)], color)
  elif kind == 'sign':
    triangle = [(-0.5, 2.4), (0.5, 2.4), (0, 3.3)]
    plate = rng.choice((disc(0, 2.9, 0.45), triangle, box(-0.5, 2.3, 0.5, 3)))
    p.fill(plane, [plate], p.pick(PAINTS), POLE)
    p.fill(plane, [box(-0.25, 2.6, 0.25, 2.8)], p.pick(LINES))


def draw_car_side(
  p: Painter,
  plane: Plane,
  class_id: int | None,
  paint: Color | None = None,
  top: float = 1.45,
) -> None:
  """Side view of a car, 4.2 m long; its hood is where s is large."""
  paint = paint or p.pick(PAINTS)
  body = [(0, 0.3), (4.2, 0.3), (4.2, 0.75), (3.2, 0.95), (0.1, 0.95)]
  cabin = [(0.15, 0.9), (3.2, 0.9), (2.5, top), (0.5, top)]
  rear = [(0.5, 0.95), (1.5, 0.95), (1.5, top - 0.1), (0.7, top - 0.1)]
  front = [(1.65, 0.95), (2.8, 0.95), (2.4, top - 0.1), (1.65, top - 0.1)]
  p.fill(plane, [body], paint, class_id)
  p.fill(plane, [cabin], scaled(paint, 0.9), class_id)
  p.fill(plane, [rear, front], p.pick((DARK, p.skyline)))
  p.fill(plane, [disc(s, 0.33, 0.34) for s in (0.8, 3.4)], BLACK, class_id)


def draw_car(p: Painter, x: float, z: float, oncoming: bool) -> None:
  """Car or van, parallel to the road, whose near end is at z."""
  paint, top = p.pick(PAINTS), p.rng.choice((1.4, 1.5, 1.65, 2.0, 2.3))
  inward = -math.copysign(1, x)

  def lean(t: float) -> float:  # The cabin is narrower at the top.
    return min(max(0.0, t - 0.95) * 0.4, 0.24)

  def flank(s: float, t: float) -> tuple[float, float, float]:
    return x + inward * (0.9 - lean(t)), t, z + (4.2 - s if oncoming else s)

  def end(s: float, t: float) -> tuple[float, float, float]:
    return x + s * (1 - lean(t)), t, z + lean(t)

  draw_car_side(p, flank, CAR, scaled(paint, p.rng.uniform(0.6, 1.1)), top)
  p.fill(end, [box(-0.85, 0, 0.85, 0.4)], BLACK, CAR)
  back = [box(-0.9, 0.28, 0.9, 0.95), box(-0.9, 0.95, 0.9, top)]
  p.fill(end, back, paint, CAR)
  p.fill(end, [box(-0.75, 0.98, 0.75, top - 0.1)], p.pick((DARK, BLACK)))
  lamps = [box(s, 0.65, s + 0.3, 0.85) for s in (-0.85, 0.55)]
  p.fill(end, lamps, (250, 246, 220) if oncoming else (190, 24, 24))
  p.fill(end, [box(-0.3, 0.45, 0.3, 0.6)], LINES[0])


def draw_person(p: Painter, plane: Plane, class_id: int | None) -> None:
  """Person of height 1: legs, arms, body, perhaps a bag, hair and face."""
  rng, top, skin = p.rng, p.pick(PAINTS), p.rng.choice(SKINS)
  legs, arms, hands = [], [], []
  for side in (-1, 1):
    foot, hand = side * rng.uniform(0.04, 0.2), side * rng.uniform(0.14, 0.26)
    hip = [(side * 0.12, 0.5), (side * 0.01, 0.5)]
    legs.append(hip + [(foot - 0.04, 0), (foot + 0.04, 0)])
    arms.append([(side * 0.1, 0.82), (side * 0.17, 0.8), (hand, 0.44)])
    hands.append(box(hand - 0.03, 0.43, hand + 0.03, 0.49))
  p.fill(plane, legs, p.pick(PAINTS), class_id)
  p.fill(plane, arms, scaled(top, 0.8), class_id)
  p.fill(plane, hands, skin, class_id)
  hem = rng.choice((0.48, 0.48, 0.3))  # A jacket or a coat.
  body = [(-0.13, hem), (0.13, hem), (0.15, 0.8), (0.05, 0.86), (-0.15, 0.8)]
  p.fill(plane, [body], top, class_id)
  if rng.random() < 0.4:
    bag = disc(rng.choice((-0.2, 0.0, 0.2)), rng.uniform(0.4, 0.6), 0.08)
    p.fill(plane, [bag], p.pick(PAINTS), class_id)
  p.fill(plane, [disc(0, 0.925, 0.065, 0.075)], p.pick(METALS), class_id)
  p.fill(plane, [disc(0.01, 0.9, 0.05)], skin, class_id)


def furnish_side(p: Painter, side: int, edge: float) -> None:
  """Adds houses, trees, poles, people and parked cars beside the road.

  Args:
    p: the scene.
    side: -1 for the left side, 1 for the right one.
    edge: x of the curb.
  """
  rng, pavement = p.rng, p.rng.uniform(2.5, 6)
  wall, z = edge + side * pavement, rng.uniform(1, 6)
  while z < 75:
    length = rng.uniform(6, 18)
    if rng.random() < 0.2:
      p.gaps.append((wall, z, z + length))
    elif z + length > p.nearest(wall):
      # Sorted by the far end, so that objects in front are drawn later.
      p.add(z + length, draw_building, wall, z, z + length)
    z += length
  if side * p.sun < -0.3:  # These houses block the sun.
    reach = edge - side * rng.uniform(0, 4)
    p.shadows.append(strip(2 * wall, reach, 1, rng.uniform(20, 90)))

  for _ in range(rng.randrange(4)):
    x, height = edge + side * rng.uniform(0.7, 1.5), rng.uniform(3.5, 9)
    z = p.depth(x, 45)
    p.add(z, draw_tree, x, z, height)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
      s = x + p.sun * t * height + rng.uniform(-1, 1)
      p.shadows.append(disc(s, z + rng.uniform(-1, 1), rng.uniform(0.4, 1)))
  for kind in rng.choices(('lamp', 'light', 'sign', 'bollard'), k=2):
    x = edge + side * rng.uniform(0.4, 0.9)
    z = p.depth(x, 24)
    p.add(z, draw_pole, x, z, kind)
    p.shadows.append(box(x, z, x + 4 * p.sun, z + 0.15))
  for _ in range(rng.randint(1, 3)):
    x = edge + side * rng.uniform(0.2, pavement - 0.4)
    z = p.depth(x, 22)
    p.add(z, draw_person, facing(x, z, rng.uniform(1.2, 1.9)), PERSON)
  if rng.random() < 0.55:  # Parked cars.
    first = p.depth(edge, 20)
    for i in range(rng.randint(1, 3)):
      z = first + 5.4 * i
      p.add(z, draw_car, edge - side * 1.1, z, rng.random() < 0.3)
      p.shadows.append(box(edge - side * 2.3, z - 0.3, edge, z + 4.5))


def furnish_road(p: Painter) -> None:
  """Adds traffic, and perhaps a person or a car that crosses."""
  rng = p.rng
  for _ in range(rng.randrange(3)):  # Traffic.
    lane = rng.choice((0.28, 0.72))
    x = p.left + lane * (p.right - p.left)
    z = p.depth(x, 45) + 2
    p.add(z, draw_car, x, z, lane < 0.5)
    p.shadows.append(box(x - 1.1, z - 0.3, x + 1.1 + p.sun, z + 4.5))
  if rng.random() < 0.4:  # Someone or something crosses.
    x, z = rng.uniform(p.left, p.right), rng.uniform(8, 20)
    if rng.random() < 0.6:
      p.add(z, draw_person, facing(x, z, 1.7), PERSON)
    else:
      p.add(z, draw_car_side, facing(x, z, side=rng.choice((-1, 1))), CAR)


def photograph(p: Painter) -> np.ndarray:
  """Shrinks the canvas; adds texture, vignette, noise and JPEG artifacts."""
  rng, shape = p.rng, (p.label.shape[0] // 2, p.label.shape[1] // 2)
  image = cv2.resize(p.image, shape[::-1], interpolation=cv2.INTER_AREA)
  if rng.random() < 0.5:
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.8))
  texture = sum(smooth_noise(p.generator, *shape, n) for n in (4, 16, 48))
  texture *= ROUGHNESS[p.label[::2, ::2]]
  noise = p.generator.standard_normal((*shape, 3), np.float32)
  rows = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
  columns = np.linspace(-1, 1, shape[1], dtype=np.float32)
  vignette = 1 - rng.uniform(0, 0.15) * (rows**2 + columns**2)
  gain = rng.uniform(0.85, 1.15) * vignette * (1 + texture)
  cast = np.array([rng.uniform(0.93, 1.07) for _ in range(3)], np.float32)
  image = image * gain[..., None] * cast + noise * rng.uniform(2, 8)
  image = np.clip(image, 0, 255).astype(np.uint8)
  quality = [cv2.IMWRITE_JPEG_QUALITY, rng.randint(60, 98)]
  jpeg = cv2.imdecode(cv2.imencode('.jpg', image, quality)[1], 1)
  assert jpeg is not None  # For type checkers.
  return jpeg


def render_scene(
  generator: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Renders a scene, which depends on the state of the generator alone.

  Returns:
    The image, uint8 [h, w, 3] RGB, and the label, uint8 [h, w], with indices of
    CLASS_NAMES and 255 (ignored).
  """
  p = Painter(generator, height, width)
  furnish_side(p, -1, p.left)
  furnish_side(p, 1, p.right)
  furnish_road(p)
  draw_sky(p)
  draw_ground(p)
  draw_skyline(p)
  for _, draw, arguments in sorted(p.things, key=lambda thing: -thing[0]):
    draw(p, *arguments)
  if p.rng.random() < 0.25:  # The hood of the car with the camera.
    hood = (width, 2 * height), (width, int(0.14 * height))
    cv2.ellipse(p.image, *hood, 0, 0, 360, p.pick(PAINTS), -1)
    cv2.ellipse(p.label, *hood, 0, 0, 360, IGNORE_LABEL, -1)
  return photograph(p), p.label[::2, ::2].copy()


class StreetScenes(pairs.Decoded):
  """A source of rendered scenes, which are kept in memory once rendered.

  A scene is a pure function of (seed, index): sources with different seeds show
  different scenes, and the order of reads and the process do not matter.
  """

  def __init__(self, num_scenes: int, *, height: int, width: int, seed: int):
    super().__init__(num_scenes, cache=True)
    check_range('num_scenes', num_scenes, 1)
    check_range('height', height, 32)
    check_range('width', width, 32)
    self._size, self._seed = (height, width), seed

  def _read(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'{index=} is outside [0, {len(self)}).')
    generator = np.random.default_rng([self._seed, index])
    image, label = render_scene(generator, *self._size)
    return {'image': image, 'label': label}

  def size(self, index: int) -> Size:
    """Size of all scenes."""
    return self._size

  def name(self, index: int) -> str:
    """Name of a scene in messages."""
    return f'scene {index}'

  def key(self, index: int) -> str:
    """Name of a scene in names of files."""
    return f'scene_{index}'


def scenes(config: DataConfig, splits: Iterable[str]) -> pairs.Dataset:
  """Creates the data set of rendered scenes, with splits 'train' and 'val'."""
  del splits  # Scenes are rendered only when read.
  height, width = config['image_size']
  sources = {}
  for i, split in enumerate(('train', 'val')):
    # Even for train, odd for val: no two seeds share a scene between them.
    seed, count = 2 * config['scenes_seed'] + i, config[f'{split}_scenes']
    sources[split] = StreetScenes(count, height=height, width=width, seed=seed)
  return pairs.Dataset('scenes', CLASS_NAMES, PALETTE, sources)


def unlabeled(config: DataConfig) -> views.View:
  """As many further scenes as train has, without their labels."""
  (height, width), count = config['image_size'], config['train_scenes']
  # Larger than the seeds of train and val.
  seed = 2**40 + config['scenes_seed']
  source = StreetScenes(count, height=height, width=width, seed=seed)
  return views.View(source, np.arange(count), labeled=False)
