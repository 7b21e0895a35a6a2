# SPDX-License-Identifier: Apache-2.0
"""Which network a PyTorch file holds, and where in it."""

import collections
from collections.abc import Mapping
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.pytorch import files, names

# What follows the prefix of a trunk, and that of a DeepLabV3+ with our names; a
# slash ends the key of a mapping.
_TRUNK = re.compile(
  r'(?<![^./])(?:layer([1-4])\.\d+\.(?:conv|bn|downsample\.)\d'
  r'|(?:(?:low|high)_level_)?features\.(\d+)\.conv'
  r'|_blocks\.(\d+)\._(?:expand_conv|depthwise_conv|project_conv|bn\d))\.'
)
_HEAD = re.compile(
  r'(?<![^./])(?:aspp[./](?:aspp\d|global_avg_pool|conv1|bn1)'
  r'|decoder[./](?:conv1|bn1|last_conv))\.'
)
_BODY = re.compile(r'(?<![^./])backbone[./]')
_PARTS = ('backbone', 'aspp', 'decoder')
# Of a trunk: what belongs to it, and what classifies images.
_INSIDE = re.compile(
  r'(?:conv1|bn1|layer\d|(?:(?:low|high)_level_)?features|cbam'
  r'|_conv_stem|_bn0|_blocks)\.'
)
_CLASSIFIER = re.compile(
  r'(?:fc|classifier|(?:high_level_)?features\.18|_conv_head|_bn1|_fc)\.'
)
# EfficientNet with squeeze-and-excite, whose other layers are those of Lite.
_EXCITE = re.compile(r'(?<![^./])_blocks\.\d+\._se_')
_LOSS = re.compile(r'loss|criterion|metric', re.I)
# Names that only one project gives, the first that fits.
_PROJECTS = (
  ('transformers', r'segformer\.|decode_head\.(?:classifier|linear_c)\.'),
  ('mmsegmentation', r'(?:decode|auxiliary)_head\.'),
  ('segmentation_models.pytorch', r'segmentation_head\.'),
  (
    "VainF's DeepLabV3Plus-Pytorch",
    r'classifier\.(?:project|aspp|classifier)\.',
  ),
  (
    'torchvision',
    r'(?:aux_)?classifier\.(?:0\.convs\.|[04]\.|cbr\.|\w+_classifier\.)',
  ),
  ('EfficientNet with squeeze-and-excite', r'_blocks\.\d+\._se_'),
)


class Found(NamedTuple):
  """The network in a source."""

  where: str  # Its file, to begin a message with.
  tensors: dict  # By the authors' names; a trunk is below 'backbone.'.
  remarks: list[str]  # What was unwrapped, taken off and left out.
  foreign: str  # A text about a network that is none of ours, or ''.


def read_groups(source):
  """`files.groups` of a file, or of a mapping of arrays or torch tensors."""

  def plain(value):
    if isinstance(value, Mapping):
      return {key: plain(x) for key, x in value.items()}
    value = value.detach().cpu() if hasattr(value, 'detach') else value
    return np.asarray(value) if hasattr(value, '__array__') else value

  if isinstance(source, Mapping):
    return files.groups(plain(source))
  return files.read_groups(source)


def read_network(source):
  """What is `Found` below whatever prefix and keys a network has in `source`.

  Counters of batches, aliases and classifiers of trunks are left out.
  InputError if two networks could be meant.
  """
  where = 'The mapping'
  if not isinstance(source, Mapping):
    where = pathlib.Path(source).name
  tensors, inserted = files.plain_names(
    {
      path + name: x
      for path, group in read_groups(source).items()
      for name, x in group.items()
      if not name.endswith('num_batches_tracked')
    }
  )
  prefix, whole, others = _find(tensors, where)
  root, kept = _root(prefix or ''), {}  # Names in the file: the authors'.
  for name in tensors if prefix is not None else ():
    inner = name.removeprefix(root if whole else prefix)
    first = _first(inner)
    if whole and name.startswith(root):
      strange = '/' in inner or first in others or _is_aside(first)
      if first in _PARTS or not strange:
        kept[name] = inner.replace('/', '.')
    elif not whole and name.startswith(prefix):
      if _INSIDE.match(inner) and not _CLASSIFIER.match(inner):
        kept[name] = inner
  left = [name for name in tensors if name not in kept]
  foreign = ''
  if not whole:
    kept = _name_trunk(kept)
    if not kept or any(_is_head(name, prefix) for name in left):
      foreign = _describe(tensors)
  remarks, (key, _, rest) = [], root.rpartition('/')
  if key:
    remarks.append(f'unwrapped {key!r}')
  if taken := [*inserted, *filter(None, [rest])]:
    remarks.append(f'took off {", ".join(f"{x!r:.60}" for x in taken)}')
  if left and kept:
    more = ', ...' if len(left) > 3 else ''
    remarks.append(
      f'left out {len(left)} tensors beside it: {show(left[:3])}{more}'
    )
  found = {ours: tensors[name] for name, ours in kept.items()}
  return Found(where, _without_aliases(found), remarks, foreign)


def _first(name):
  return re.match(r'[^./]*', name)[0]


def _part(name):
  """The keys that lead to a name, and what is before its first dot."""
  return re.match(r'(?:.*/)?[^.]*', name, re.S)[0]


def _root(prefix):
  """The prefix of the network whose trunk has this prefix."""
  return re.sub(r'(?<![^./])backbone[./]\Z', '', prefix)


def _is_head(name, prefix):
  """Whether what is beside a trunk shows that it is part of a network."""
  if name.startswith(prefix) and _CLASSIFIER.match(name.removeprefix(prefix)):
    return False
  return not _is_aside(_part(name))


def _is_aside(part):
  """Whether it names a loss or averaged weights, which no network needs."""
  return bool(_LOSS.search(part)) or files.is_averaged(part)


def _find(tensors, where):
  """Prefix of a trunk or None; whether a head of ours is beside it; what other
  networks begin with below the same prefix.
  """
  trunks, heads, bodies = collections.defaultdict(set), set(), set()
  excited = {
    name[: match.start()] for name in tensors if (match := _EXCITE.search(name))
  }
  for name in tensors:
    match = _TRUNK.search(name)
    if match and name[: match.start()] not in excited:
      trunks[name[: match.start()]].add(match[1] or match[2] or match[3])
    if match := _HEAD.search(name):
      heads.add(name[: match.start()])
    if match := _BODY.search(name):
      bodies.add(name[: match.end()])
  for prefix in bodies:
    if _root(prefix) in heads:  # Of ours, whatever the layers of its trunk.
      trunks[prefix] |= set()

  def rank(prefix):
    whole = prefix != _root(prefix) and _root(prefix) in heads
    copy = bool(_LOSS.search(prefix)), *files.preference(prefix)
    return not whole, len(trunks[prefix]) < 4, *copy

  if not trunks:
    return None, False, set()
  ranks = {prefix: rank(prefix) for prefix in trunks}
  first = min(ranks.values())
  best, *more = (x for x in ranks if ranks[x] == first)
  root = _root(best)
  if more:
    roots = [root, *map(_root, more)]
    hint = 'save one of them alone'
    if {*roots} == {'s_net.', 't_net.'}:
      hint += ', or use attnfd_jax.load_torch_distiller'
    below = ' and '.join(f'{x!r:.60}' for x in roots[:3])
    raise InputError(
      f'{where}: has {len(roots)} networks, below {below}; {hint}.'
    )
  inner = [x.removeprefix(root) for x in trunks if x.startswith(root)]
  return best, not first[0], {*map(_first, inner)} - {*_PARTS, ''}


def _name_trunk(kept):
  """Names in the file to the authors' names, of names inside of a trunk."""
  inside = {*kept.values()}
  if 'features.0.0.weight' not in inside:  # VainF's MobileNet is in two parts.
    kept = {k: re.sub('^(low|high)_level_', '', x) for k, x in kept.items()}
  # tonylins numbers layers as the reference; torchvision nests them.
  nested = 'features.2.conv.0.0.weight' in kept.values()
  return {
    name: f'backbone.{_unnest(x) if nested else x}' for name, x in kept.items()
  }


def _unnest(name):
  """As the reference numbers the layers that torchvision nests in threes."""
  match = re.fullmatch(r'features\.(\d+)\.conv\.(\d)(?:\.(\d))?\.(\w+)', name)
  if not match:
    return name
  block, index, inner, leaf = match.groups()
  nested = 1 if block == '1' else 2
  layer = 3 * int(index) + int(inner) if inner else int(index) + 2 * nested
  return f'features.{block}.conv.{layer}.{leaf}'


def _without_aliases(tensors):
  tensors = dict(tensors)
  for name in list(tensors):
    for alias in tensors.keys() & names.aliases(name):
      if not np.array_equal(tensors.pop(alias), tensors[name]):
        raise InputError(f'{alias} differs from {name}, which it must repeat.')
  return tensors


def show(names):
  """Names for one line, whatever is in them."""
  return ', '.join(f'{name!r:.80}'.strip("'") for name in names)


def _describe(tensors):
  """Project and names of a network that is not one of ours."""
  known = (
    f' of {project}'
    for project, pattern in _PROJECTS
    for name in tensors
    if re.search(rf'(?<![^./])(?:{pattern})', name)
  )
  # One of each part below what all names have.
  common = os.path.commonprefix([*tensors])
  keys = common.rfind('/') + 1
  cut = max(common.rfind('.') + 1, keys)
  parts = {}
  for name in tensors:
    parts.setdefault(_part(name[cut:]), name[keys:])
  first = show([*parts.values()][:6])
  return (
    f'holds a network{next(known, "")} ({first}, ...), which does not fit the '
    'DeepLabV3+ here'
  )
