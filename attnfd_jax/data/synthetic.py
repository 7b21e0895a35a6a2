# SPDX-License-Identifier: Apache-2.0
"""Procedural street scenes: a segmentation set that needs no download.

A pinhole camera stands on a road; everything is a polygon in metres, painted
from far to near into image and label alike, so labels are exact. Colour tells
little: walls, roads and pavements share their greys, cars and clothes have
any colour, puddles and windows show the sky, and posters show people and cars
that are 'building'. All sizes and probabilities are our choice.
"""

import math
import random

import cv2
import numpy as np

from attnfd_jax.data import pairs, views
from attnfd_jax.errors import within
from attnfd_jax.losses import IGNORE_LABEL

CLASS_NAMES = tuple(
  'sky building road marking pavement tree pole car person'.split()
)
SKY, BUILDING, ROAD, MARKING, PAVEMENT, TREE, POLE, CAR, PERSON = range(9)
# fmt: off
# Of each weather and time of day: RGB of the sky at the top of the image and at
# the horizon (also of fog), factors of the sun on colours, brightness inside a
# shadow (1 for none), metres until 63 % of the light comes from fog, clouds.
LIGHTINGS = (
  ((62, 112, 190), (178, 205, 228), (1.08, 1.03, .98), .5, 400, .4),
  ((120, 150, 190), (208, 215, 220), (1., 1., 1.), .6, 250, .7),
  ((150, 156, 162), (196, 198, 200), (.8, .82, .86), .93, 160, 1.),
  ((98, 134, 178), (248, 212, 156), (1.2, .99, .76), .42, 200, .3),
  ((54, 58, 98), (212, 134, 112), (.74, .66, .7), .8, 200, .6),
  ((178, 182, 184), (188, 190, 190), (.8, .82, .83), 1., 55, 0.),
)
# Cityscapes, but lane markings white and poles yellow, to be seen.
PALETTE = np.uint8([
  (70, 130, 180), (70, 70, 70), (128, 64, 128), (255, 255, 255),
  (244, 35, 232), (107, 142, 35), (220, 220, 0), (0, 0, 142), (220, 20, 60),
])
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
ROUGHNESS = np.full(256, 0.05, np.float32)  # Contrast by class.
ROUGHNESS[[SKY, TREE, CAR]] = 0, 0.12, 0.02
CIRCLE = [(math.cos(a), math.sin(a)) for a in np.arange(10) * math.pi / 5]


# A plane maps (s, t) in metres to the world: x right, y up, z ahead.
def ground(x, z):
  return x, 0.0, z


def facing(x, z, scale=1.0, side=1):
  """Upright plane across the road; s runs right, or left if side is -1."""
  return lambda s, t: (x + side * scale * s, scale * t, z)


def along(x, z, y=0.0, scale=1.0, run=0.0):
  """Plane beside the road, s runs ahead; `run` metres of x per metre up."""
  return lambda s, t: (x + run * t, y + scale * t, z + scale * s)


# Shapes on a plane: lists of (s, t).
def box(s0, t0, s1, t1):
  return [(s0, t0), (s1, t0), (s1, t1), (s0, t1)]


def disc(s, t, radius, height=None):
  return [(s + radius * c, t + (height or radius) * d) for c, d in CIRCLE]


def strip(x0, x1, z0, z1):
  """Long stretch of ground; corners on the way let it follow a bend."""
  depths = [z0 * (z1 / z0) ** (i / 6) for i in range(7)]
  return [(x0, z) for z in depths] + [(x1, z) for z in reversed(depths)]


def scaled(colour, factor):
  return [factor * c for c in colour]


class Painter:
  """Camera, light and canvas of one scene; the canvas has twice its size."""

  def __init__(self, generator, height, width):
    self.generator = generator
    # For single numbers the standard library is several times faster.
    self.rng = rng = random.Random(int(generator.integers(2**63)))
    self.image = np.zeros((2 * height, 2 * width, 3), np.uint8)
    self.label = np.zeros((2 * height, 2 * width), np.uint8)
    self.zenith, self.skyline, self.light, *rest = rng.choice(LIGHTINGS)
    self.shade, self.visibility, self.clouds = rest
    self.focal = rng.uniform(1.4, 1.9) * width
    self.eye = rng.uniform(1.25, 2.0)  # Metres above the ground.
    self.horizon = int(rng.uniform(0.36, 0.52) * 2 * height)
    self.centre = rng.uniform(0.3, 0.7) * 2 * width  # Vanishing point.
    self.bend = rng.uniform(-1, 1) ** 3 * 0.005
    self.sun = rng.uniform(-1.2, 1.2)  # Length of shadows, to the right.
    # Where the road ends.
    self.left, self.right = -rng.uniform(2, 6), rng.uniform(2, 4.5)
    self.things = []  # (z, function that draws it, its arguments).
    self.gaps = []  # Between houses: (x, near, far).
    self.shadows = []  # Shapes on the ground.

  def add(self, z, draw, *arguments):
    self.things.append((z, draw, arguments))

  def pick(self, colours, spread=14):
    """One of the colours, somewhat lighter or darker, warmer or colder."""
    shift, warmth = self.rng.gauss(0, spread), self.rng.gauss(0, spread / 3)
    red, green, blue = self.rng.choice(colours)
    return red + shift + warmth, green + shift, blue + shift - warmth

  def nearest(self, x):
    """The z from which on things at x are inside the image."""
    side = self.centre if x < 0 else self.image.shape[1] - self.centre
    return max(5.0, self.focal * abs(x) / side)

  def depth(self, x, far):
    """Random z where things at x are visible, more often near than far."""
    near = 1.1 * self.nearest(x)
    return near + self.rng.random() ** 2 * max(far - near, 4)

  def pixels(self, plane, shape):
    corners = []
    for x, y, z in (plane(*corner) for corner in shape):
      column = self.centre + self.focal * (x / z + self.bend * z)
      corners.append((column, self.horizon - self.focal * (y - self.eye) / z))
    return np.array(corners, np.int32)

  def fill(self, plane, shapes, colour, class_id=None):
    """Fills shapes that do not overlap; without a class, the image only."""
    pixels = [self.pixels(plane, shape) for shape in shapes]
    # One depth per call would not do for the ground: see `draw_ground`.
    depth = 0 if plane is ground else plane(*shapes[0][0])[2]
    clear = math.exp(-depth / self.visibility)
    channels = zip(colour, self.light, self.skyline, strict=True)
    colour = [
      min(max(c * sun, 0), 255) * clear + fog * (1 - clear)
      for c, sun, fog in channels
    ]
    cv2.fillPoly(self.image, pixels, colour)
    if class_id is not None:
      cv2.fillPoly(self.label, pixels, class_id)


def smooth_noise(generator, height, width, cells):
  """float32 [h, w] of about unit variance with `cells` values in a row."""
  rows = max(2, cells * height // width)
  noise = generator.standard_normal((rows, cells), np.float32)
  return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_sky(p):
  # Half the size: it is smooth anyway.
  shape = p.horizon // 2 + 1, p.image.shape[1] // 2
  skyline = np.float32(p.skyline)
  mix = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None, None]
  sky = np.float32(p.pick([p.zenith])) * (1 - mix) + skyline * mix
  noise = smooth_noise(p.generator, *shape, 5)
  noise += 0.5 * smooth_noise(p.generator, *shape, 17)
  cover = np.clip(noise + 2 * p.clouds - 1, 0, p.clouds)
  cloud = 0.5 * skyline + p.rng.uniform(80, 125)
  sky = sky + 0.8 * cover[..., None] * (cloud - sky)
  sky = np.clip(sky, 0, 255).astype(np.uint8)
  p.image[: 2 * shape[0]] = cv2.resize(sky, (2 * shape[1], 2 * shape[0]))


def draw_skyline(p):
  """Houses and tree tops at the end of the road."""
  x, z = -80, 110
  while x < 80:
    width, height = p.rng.uniform(8, 24), p.rng.uniform(2, 10)
    shape, colours, class_id = box(0, -2, width, height + 4), WALLS, BUILDING
    if p.rng.random() < 0.4:
      shape = disc(width / 2, 0, width * 0.7, height)
      colours, class_id = LEAVES, TREE
    p.fill(facing(x, z), [shape], p.pick(colours), class_id)
    x += width


def draw_ground(p):
  """Pavement everywhere, the road on it, side streets in the gaps."""
  rng, below, left, right = p.rng, slice(p.horizon, None), p.left, p.right
  road, paving = p.pick(GREYS), p.pick(GREYS)
  p.image[below] = np.clip(np.multiply(paving, p.light), 0, 255)
  p.label[below] = PAVEMENT
  slabs = [box(-40, z, 40, z + 0.06) for z in range(4, 32, 3)]
  slabs += [strip(x, x + 0.05, 2, 60) for x in (left - 2, right + 2)]
  p.fill(ground, slabs, scaled(paving, 0.84))
  kerbs = [strip(left - 0.3, left, 1, 150), strip(right, right + 0.3, 1, 150)]
  p.fill(ground, kerbs, p.pick(GREYS, 30))
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
  fog = np.float32(p.skyline) * (1 - clear)
  p.image[below] = p.image[below] * clear + fog


def draw_markings(p):
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


def draw_building(p, x, near, far):
  """House that fills the side of the road beyond x, from near to far."""
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
    colour = scaled(base, gain)
    p.fill(plane, [box(0, 0, span, top)], colour, BUILDING)
    if near < 50:  # Bands of glass behind piers: fewer shapes than windows.
      floors = np.arange(1.3, top - 1.8, storey).tolist()
      bands = [box(0, t, span, t + 1.5) for t in floors]
      p.fill(plane, bands, scaled(glass, gain))
      starts = np.arange(0, span, pitch).tolist()
      p.fill(plane, [box(s, 0, s + pier, top) for s in starts], colour)
    ledges = [box(0, top - 0.5, span, top), box(0, 0, span, 0.5)]
    p.fill(plane, ledges, scaled(colour, rng.uniform(0.7, 1.2)))
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


def draw_tree(p, x, z, height):
  rng, plane, bark = p.rng, facing(x, z), p.pick(METALS)
  width, lean = rng.uniform(0.12, 0.25), rng.uniform(-0.4, 0.4)
  radius = rng.uniform(0.22, 0.36) * height
  trunk = [(-width, 0), (width, 0), (lean + 0.1, height), (lean, height)]
  p.fill(plane, [trunk], bark, TREE)
  leaf = p.pick(LEAVES)
  for i in range(12):  # Leaves in the shade first, those in the sun last.
    angle, reach = rng.uniform(0, 6.3), radius * rng.random() ** 0.5
    s = lean + reach * math.cos(angle) - i * 0.02 * radius * p.sun
    t = 0.68 * height + reach * math.sin(angle) + i * 0.02 * radius
    size = radius * rng.uniform(0.25, 0.5)
    blob = [(a + rng.uniform(-0.3, 0.3), b) for a, b in disc(s, t, size)]
    p.fill(plane, [blob], scaled(p.pick([leaf], 8), 0.6 + i * 0.05), TREE)


def draw_pole(p, x, z, kind):
  """Lamp, traffic light, road sign or bollard; all of it is 'pole'."""
  rng, metal, width = p.rng, p.pick(METALS), p.rng.uniform(0.08, 0.15)
  plane = facing(x, z, side=-math.copysign(1, x))
  top = {'lamp': rng.uniform(5, 8), 'bollard': 1.0}.get(kind, 2.9)
  p.fill(plane, [box(-width, 0, width, top)], metal, POLE)
  if kind == 'lamp':
    p.fill(plane, [box(0, top, 1.6, top + 0.15)], metal, POLE)
    p.fill(plane, [box(1.2, top - 0.15, 2, top + 0.2)], p.pick(METALS), POLE)
  elif kind == 'light':
    p.fill(plane, [box(-0.28, 2.2, 0.28, 3.3)], BLACK, POLE)
    t, colour = rng.choice(((3.0, (235, 40, 30)), (2.45, (40, 220, 120))))
    p.fill(plane, [disc(0, t, 0.18)], colour)
  elif kind == 'sign':
    triangle = [(-0.5, 2.4), (0.5, 2.4), (0, 3.3)]
    plate = rng.choice((disc(0, 2.9, 0.45), triangle, box(-0.5, 2.3, 0.5, 3)))
    p.fill(plane, [plate], p.pick(PAINTS), POLE)
    p.fill(plane, [box(-0.25, 2.6, 0.25, 2.8)], p.pick(LINES))


def draw_car_side(p, plane, class_id, paint=None, top=1.45):
  """Side view, 4.2 m long, on any plane; bonnet at the end of s."""
  paint = paint or p.pick(PAINTS)
  body = [(0, 0.3), (4.2, 0.3), (4.2, 0.75), (3.2, 0.95), (0.1, 0.95)]
  cabin = [(0.15, 0.9), (3.2, 0.9), (2.5, top), (0.5, top)]
  rear = [(0.5, 0.95), (1.5, 0.95), (1.5, top - 0.1), (0.7, top - 0.1)]
  front = [(1.65, 0.95), (2.8, 0.95), (2.4, top - 0.1), (1.65, top - 0.1)]
  p.fill(plane, [body], paint, class_id)
  p.fill(plane, [cabin], scaled(paint, 0.9), class_id)
  p.fill(plane, [rear, front], p.pick((DARK, p.skyline)))
  p.fill(plane, [disc(s, 0.33, 0.34) for s in (0.8, 3.4)], BLACK, class_id)


def draw_car(p, x, z, oncoming):
  """Car or van that stands along the road with its near end at z."""
  paint, top = p.pick(PAINTS), p.rng.choice((1.4, 1.5, 1.65, 2.0, 2.3))
  inward = -math.copysign(1, x)

  def lean(t):  # The cabin is narrower at the top.
    return min(max(0.0, t - 0.95) * 0.4, 0.24)

  def flank(s, t):
    return x + inward * (0.9 - lean(t)), t, z + (4.2 - s if oncoming else s)

  def end(s, t):
    return x + s * (1 - lean(t)), t, z + lean(t)

  draw_car_side(p, flank, CAR, scaled(paint, p.rng.uniform(0.6, 1.1)), top)
  p.fill(end, [box(-0.85, 0, 0.85, 0.4)], BLACK, CAR)
  back = [box(-0.9, 0.28, 0.9, 0.95), box(-0.9, 0.95, 0.9, top)]
  p.fill(end, back, paint, CAR)
  p.fill(end, [box(-0.75, 0.98, 0.75, top - 0.1)], p.pick((DARK, BLACK)))
  lamps = [box(s, 0.65, s + 0.3, 0.85) for s in (-0.85, 0.55)]
  p.fill(end, lamps, (250, 246, 220) if oncoming else (190, 24, 24))
  p.fill(end, [box(-0.3, 0.45, 0.3, 0.6)], LINES[0])


def draw_person(p, plane, class_id):
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


def furnish_side(p, side, edge):
  """What stands beyond the kerb at x=edge."""
  rng, pavement = p.rng, p.rng.uniform(2.5, 6)
  wall, z = edge + side * pavement, rng.uniform(1, 6)
  while z < 75:
    length = rng.uniform(6, 18)
    if rng.random() < 0.2:
      p.gaps.append((wall, z, z + length))
    elif z + length > p.nearest(wall):
      # Sorted by the far end: what stands before the wall is drawn later.
      p.add(z + length, draw_building, wall, z, z + length)
    z += length
  if side * p.sun < -0.3:  # These houses stand before the sun.
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


def furnish_road(p):
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


def photograph(p):
  """Canvas to image: smaller, with texture, a lens, noise and JPEG."""
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
  cast = np.float32([rng.uniform(0.93, 1.07) for _ in range(3)])
  image = image * gain[..., None] * cast + noise * rng.uniform(2, 8)
  image = np.clip(image, 0, 255).astype(np.uint8)
  quality = [cv2.IMWRITE_JPEG_QUALITY, rng.randint(60, 98)]
  return cv2.imdecode(cv2.imencode('.jpg', image, quality)[1], 1)


def render_scene(generator, height, width):
  """RGB image, uint8 [h, w, 3], and label, uint8 [h, w], of one scene.

  A label is an index of CLASS_NAMES or 255 (ignored). The same state of the
  generator gives the same scene.
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
  if p.rng.random() < 0.25:  # Of the car that carries the camera.
    bonnet = (width, 2 * height), (width, int(0.14 * height))
    cv2.ellipse(p.image, *bonnet, 0, 0, 360, p.pick(PAINTS), -1)
    cv2.ellipse(p.label, *bonnet, 0, 0, 360, IGNORE_LABEL, -1)
  return photograph(p), p.label[::2, ::2].copy()


class StreetScenes(pairs.Decoded):
  """A source of scenes 0 to num_scenes - 1, drawn when asked for, then kept.

  A scene is a pure function of (seed, index): sets with other seeds do not
  overlap, and any reader may read in any order or process.
  """

  def __init__(self, num_scenes, *, height, width, seed):
    super().__init__(num_scenes, cache=True)
    within('num_scenes', num_scenes, 1)
    within('height', height, 32)
    within('width', width, 32)
    self._size, self._seed = (height, width), seed

  def _read(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f'{index=} is outside [0, {len(self)}).')
    generator = np.random.default_rng([self._seed, index])
    image, label = render_scene(generator, *self._size)
    return {'image': image, 'label': label}

  def size(self, index):
    return self._size

  def name(self, index):
    return f'scene {index}'

  def key(self, index):
    return f'scene_{index}'


def scenes(config, splits):
  """Drawn scenes; val is drawn from another seed than train."""
  del splits  # Each is drawn where it is read.
  height, width = config['image_size']
  splits = {}
  for i, split in enumerate(('train', 'val')):
    # Even and odd: no scene of val is one of another run's train.
    seed, count = 2 * config['scenes_seed'] + i, config[f'{split}_scenes']
    splits[split] = StreetScenes(count, height=height, width=width, seed=seed)
  return pairs.Dataset('scenes', CLASS_NAMES, PALETTE, splits)


def unlabeled(config):
  """As many scenes as train has, of neither train nor val, without labels."""
  (height, width), count = config['image_size'], config['train_scenes']
  # Beyond the seeds of labeled scenes.
  seed = 2**40 + config['scenes_seed']
  source = StreetScenes(count, height=height, width=width, seed=seed)
  return views.View(source, range(count), labeled=False)
