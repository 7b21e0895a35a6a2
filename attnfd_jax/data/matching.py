# SPDX-License-Identifier: Apache-2.0
"""Matches file names of images and masks that are not exactly equal.

Only where the match is unambiguous: one to one, by one rule for all names.
"""

import collections
from collections.abc import Callable, Collection, Hashable, Iterator
import difflib
import itertools
import posixpath
from typing import TypeAlias
import unicodedata

# (prefix, suffix) of the left names, and of the right names.
_Affixes: TypeAlias = tuple[tuple[str, str], tuple[str, str]]

_SAMPLES = 3, 100  # Names of the left and right from which affixes are guessed.
_NONE: _Affixes = ('', ''), ('', '')


def _plain(name: str) -> str:
  """Normalizes case, slashes and Unicode form, which file systems change."""
  return unicodedata.normalize('NFC', name.replace('\\', '/')).casefold()


def _agree(
  left: Collection[str],
  right: Collection[str],
  key_left: Callable[[str], Hashable],
  key_right: Callable[[str], Hashable],
) -> dict[str, str]:
  """Returns {left: right} of equal keys; {} if a side repeats a key.

  Names whose key is None are skipped.
  """
  sides = []
  for names, key_of in ((left, key_left), (right, key_right)):
    by_key = collections.defaultdict(list)
    for name in names:
      if (key := key_of(name)) is not None:
        by_key[key].append(name)
    if any(x[1:] for x in by_key.values()):
      return {}
    sides.append({key: x[0] for key, x in by_key.items()})
  by_left, by_right = sides
  return {
    name: by_right[key] for key, name in by_left.items() if key in by_right
  }


def _guess_affixes(left: list[str], right: list[str]) -> set[_Affixes]:
  """Finds the affixes around the longest common part of some names."""
  guesses = set()
  few, many = _SAMPLES
  for a, b in itertools.product(left[:few], right[:many]):
    a, b = posixpath.basename(a), posixpath.basename(b)
    part = difflib.SequenceMatcher(None, a, b, False).find_longest_match()
    affixes = (
      (a[: part.a], a[part.a + part.size :]),
      (b[: part.b], b[part.b + part.size :]),
    )
    # Digits usually distinguish the names of one side.
    if part.size and not any(c.isdigit() for x in affixes for c in ''.join(x)):
      guesses.add(affixes)
  return guesses


def _core_of(
  affixes: tuple[str, str], folders: bool
) -> Callable[[str], tuple[str, str] | None]:
  """Returns a key function: the name without affixes, and its folder or ''."""
  prefix, suffix = affixes

  def core(name: str) -> tuple[str, str] | None:
    folder, base = posixpath.split(name)
    end = len(base) - len(suffix)
    fits = base.startswith(prefix) and base.endswith(suffix)
    if not fits or end <= len(prefix):
      return None
    return (folder if folders else '', base[len(prefix) : end])

  return core


def _by_rule(
  left: list[str], right: list[str]
) -> Iterator[tuple[dict[str, str], _Affixes, bool]]:
  """Yields ({left: right}, affixes, whether folders are equal) of all rules."""
  swapped = {(b, a) for a, b in _guess_affixes(right, left)}
  guesses = sorted(_guess_affixes(left, right) | swapped | {_NONE})
  for folders, affixes in itertools.product((True, False), guesses):
    key_left, key_right = (_core_of(affix, folders) for affix in affixes)
    yield _agree(left, right, key_left, key_right), affixes, folders


def agree(
  left: Collection[str], right: Collection[str], *, all_items: bool = True
) -> tuple[dict[str, str], str]:
  """Matches names; returns {left: right} and how the names differ.

  Names that are equal except for case, slashes and Unicode form match. If there
  are none, one rule is tried that has to match more than half of the names: the
  same names in different folders, or with a prefix and suffix that all names of
  a side share.

  Args:
    left: paths with '/', or with the backslashes of Windows.
    right: like `left`.
    all_items: whether a rule has to match more than half of both sides, or
      only of the left one.

  Returns:
    The matched names, and a description of the difference; '' if none.
  """
  pairs = {name: name for name in left if name in right}
  unmatched = [[x for x in side if x not in pairs] for side in (left, right)]
  alike = _agree(unmatched[0], unmatched[1], _plain, _plain)
  if pairs or alike or not all(unmatched):
    return pairs | alike, 'upper case, slashes or Unicode form' * bool(alike)
  # Ambiguous plain forms: not matched above, and by no rule either.
  plain = [{_plain(x): x for x in side} for side in unmatched]
  if any(len(x) < len(side) for x, side in zip(plain, unmatched, strict=True)):
    return {}, ''
  rules = [*_by_rule(sorted(plain[0]), sorted(plain[1]))]
  most = max(len(matched) for matched, *_ in rules)
  best = [rule for rule in rules if len(rule[0]) == most]
  matched, affixes, folders = best[0]
  count = max(map(len, unmatched if all_items else unmatched[:1]))
  # A single pair with affixes on both sides may be a coincidence.
  guessed = most == 1 and all(map(any, affixes))
  if 2 * most <= count or guessed or any(x != matched for x, *_ in best):
    return {}, ''
  named = (f'{prefix}NAME{suffix}' for prefix, suffix in affixes)
  difference = '' if affixes == _NONE else ' and '.join(named)
  folder_difference = '' if folders else 'other folders'
  difference = ', '.join(filter(None, (difference, folder_difference)))
  return {plain[0][a]: plain[1][b] for a, b in matched.items()}, difference
