# SPDX-License-Identifier: Apache-2.0
"""Finds the network in a PyTorch file, below any prefix and any keys."""

import collections
from collections.abc import Iterable, Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.pytorch import files, names
from attnfd_jax.pytorch.files import Groups, Tensors
from attnfd_jax.types import StrPath

# Here a trunk is a backbone under any prefix, and a network one of ours, with
# backbone, aspp and decoder. In names a slash ends the key of a mapping, a dot
# the name of a module. What follows the prefix of a trunk, and of a network:
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
# Names below the prefix of a trunk: its own, and those of its classifier.
_INSIDE = re.compile(
  r'(?:conv1|bn1|layer\d|(?:(?:low|high)_level_)?features|cbam'
  r'|_conv_stem|_bn0|_blocks)\.'
)
_CLASSIFIER = re.compile(
  r'(?:fc|classifier|(?:high_level_)?features\.18|_conv_head|_bn1|_fc)\.'
)
# EfficientNet with squeeze-and-excite; its other layers are those of Lite.
_EXCITE = re.compile(r'(?<![^./])_blocks\.\d+\._se_')
_LOSS = re.compile(r'loss|criterion|metric', re.I)
# Names that identify a project; the first match is used.
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


# A file, or names and arrays (or torch tensors), below any prefix and keys.
TorchSource: TypeAlias = StrPath | Mapping[str, Any]


class Found(NamedTuple):
  """The network found in a file or a mapping.

  Attributes:
    where: name of the file, to start messages with.
    tensors: by the authors' names; those of a trunk start with 'backbone.'.
    remarks: which keys, prefixes and tensors were removed or ignored.
    foreign: what the source holds if it is not one of our networks, or ''.
  """

  where: str
  tensors: Tensors
  remarks: list[str]
  foreign: str


def read_groups(source: TorchSource) -> Groups:
  """`files.groups` of a file, or of a mapping of arrays or torch tensors."""

  def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: plain(x) for key, x in value.items()}
    value = value.detach().cpu() if hasattr(value, 'detach') else value
    return np.asarray(value) if hasattr(value, '__array__') else value

  if isinstance(source, Mapping):
    return files.groups(plain(source))
  return files.read_groups(source)


def read_network(source: TorchSource) -> Found:
  """Finds the network in a file or a mapping, below any prefix and any keys.

  Batch counters, aliases and the classifiers of trunks are ignored.

  Raises:
    InputError: if the network is ambiguous, since there are several.
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
  prefix, is_network, others = _find(tensors, where)
  root, kept = _root(prefix or ''), {}  # Name in the file: the authors' name.
  for name in tensors:
    if prefix is None:
      break
    inner = name.removeprefix(root if is_network else prefix)
    first = _first(inner)
    if is_network and name.startswith(root):
      unrelated = '/' in inner or first in others or _is_auxiliary(first)
      if first in _PARTS or not unrelated:
        kept[name] = inner.replace('/', '.')
    elif not is_network and name.startswith(prefix):
      if _INSIDE.match(inner) and not _CLASSIFIER.match(inner):
        kept[name] = inner
  ignored = [name for name in tensors if name not in kept]
  foreign = ''
  if not is_network:
    kept = _name_trunk(kept)
    if (
      prefix is None
      or not kept
      or any(_is_head(name, prefix) for name in ignored)
    ):
      foreign = _describe(tensors)
  remarks, (key, _, outer) = [], root.rpartition('/')
  if key:
    remarks.append(f'unwrapped {key!r}')
  if removed := [*inserted, *filter(None, [outer])]:
    shown = ', '.join(f'{x!r:.60}' for x in removed)
    remarks.append(f'removed {shown} from names')
  if ignored and kept:
    more = ', ...' if len(ignored) > 3 else ''
    remarks.append(
      f'ignored {len(ignored)} other tensors: {show(ignored[:3])}{more}'
    )
  renamed = {new_name: tensors[name] for name, new_name in kept.items()}
  return Found(where, _without_aliases(renamed), remarks, foreign)


def _first(name: str) -> str:
  return re.split(r'[./]', name, maxsplit=1)[0]


def _part(name: str) -> str:
  """The keys that lead to a name, and its first component."""
  *keys, last = name.rpartition('/')
  return ''.join(keys) + last.partition('.')[0]


def _root(prefix: str) -> str:
  """The prefix of the network whose trunk has this prefix."""
  return re.sub(r'(?<![^./])backbone[./]\Z', '', prefix)


def _is_head(name: str, prefix: str) -> bool:
  """Whether a tensor beside a trunk shows that it is part of a network."""
  if name.startswith(prefix) and _CLASSIFIER.match(name.removeprefix(prefix)):
    return False
  return not _is_auxiliary(_part(name))


def _is_auxiliary(part: str) -> bool:
  """Whether it names a loss or averaged weights, which no network needs."""
  return bool(_LOSS.search(part)) or files.is_averaged(part)


def _find(tensors: Tensors, where: str) -> tuple[str | None, bool, set[str]]:
  """Finds the trunk that is most likely meant.

  Returns:
    Its prefix, or None without a trunk; whether it is part of one of our
    networks; and the first components of other networks below the same prefix.
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
    if _root(prefix) in heads:  # One of ours, whatever the layers of its trunk.
      trunks[prefix] |= set()

  def rank(prefix: str) -> tuple:
    is_network = prefix != _root(prefix) and _root(prefix) in heads
    copy = bool(_LOSS.search(prefix)), *files.preference(prefix)
    return not is_network, len(trunks[prefix]) < 4, *copy

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


def _name_trunk(kept: dict[str, str]) -> dict[str, str]:
  """Replaces names below the prefix of a trunk by the authors' names."""
  inside = {*kept.values()}
  if 'features.0.0.weight' not in inside:  # VainF's MobileNet is in two parts.
    kept = {k: re.sub('^(low|high)_level_', '', x) for k, x in kept.items()}
  # tonylins numbers layers as the reference does; torchvision nests them.
  nested = 'features.2.conv.0.0.weight' in kept.values()
  return {
    name: f'backbone.{_unnest(x) if nested else x}' for name, x in kept.items()
  }


def _unnest(name: str) -> str:
  """The reference's name of a layer of MobileNetV2, from torchvision's."""
  match = re.fullmatch(r'features\.(\d+)\.conv\.(\d)(?:\.(\d))?\.(\w+)', name)
  if not match:
    return name
  block, index, inner, leaf = match.groups()
  nested = 1 if block == '1' else 2
  layer = 3 * int(index) + int(inner) if inner else int(index) + 2 * nested
  return f'features.{block}.conv.{layer}.{leaf}'


def _without_aliases(tensors: Tensors) -> Tensors:
  tensors = dict(tensors)
  for name in list(tensors):
    for alias in tensors.keys() & names.aliases(name):
      if not np.array_equal(tensors.pop(alias), tensors[name]):
        raise InputError(f'{alias} differs from {name}, but must be equal.')
  return tensors


def show(names: Iterable[str]) -> str:
  """Joins names for a message, cut and escaped."""
  return ', '.join(f'{name!r:.80}'.strip("'") for name in names)


def _describe(tensors: Tensors) -> str:
  """Describes a network that is not one of ours by its project and names."""
  projects = (
    f' of {project}'
    for project, pattern in _PROJECTS
    for name in tensors
    if re.search(rf'(?<![^./])(?:{pattern})', name)
  )
  # One name of each part below the common prefix.
  common = os.path.commonprefix([*tensors])
  keys = common.rfind('/') + 1
  cut = max(common.rfind('.') + 1, keys)
  parts = {}
  for name in tensors:
    parts.setdefault(_part(name[cut:]), name[keys:])
  first = show([*parts.values()][:6])
  return (
    f'holds a network{next(projects, "")} ({first}, ...), which does not fit '
    'the DeepLabV3+ here'
  )
