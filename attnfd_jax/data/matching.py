# SPDX-License-Identifier: Apache-2.0
"""Which names of two sides belong together although they differ.

Only where that is unambiguous: each name with one other, by one rule for all.
"""

import collections
import difflib
import itertools
import posixpath
import unicodedata

_LOOKED_AT = 3, 100  # Names of either side from which affixes are guessed.
_NONE = ('', ''), ('', '')


def _plain(name):
  """The same for all spellings that keyboards and file systems make of it."""
  return unicodedata.normalize('NFC', name.replace('\\', '/')).casefold()


def _agree(left, right, key_left, key_right):
  """{left: right} of equal keys; {} if a side has one twice. None is no key."""
  sides = []
  for names, key_of in ((left, key_left), (right, key_right)):
    by_key = collections.defaultdict(list)
    for name in names:
      if (key := key_of(name)) is not None:
        by_key[key].append(name)
    if any(x[1:] for x in by_key.values()):
      return {}
    sides.append({key: x[0] for key, x in by_key.items()})
  left, right = sides
  return {name: right[key] for key, name in left.items() if key in right}


def _guess_affixes(left, right):
  """{((prefix, suffix) of left, of right)} around a part that is the same."""
  found = set()
  few, many = _LOOKED_AT
  for a, b in itertools.product(left[:few], right[:many]):
    a, b = posixpath.basename(a), posixpath.basename(b)
    part = difflib.SequenceMatcher(None, a, b, False).find_longest_match()
    affixes = (
      (a[: part.a], a[part.a + part.size :]),
      (b[: part.b], b[part.b + part.size :]),
    )
    # Digits are what tells names apart.
    if part.size and not any(c.isdigit() for x in affixes for c in ''.join(x)):
      found.add(affixes)
  return found


def _core_of(prefix, suffix, folders):
  """The key of a name: itself without affixes and, if asked, its `folders`."""

  def core(name):
    folder, base = posixpath.split(name)
    end = len(base) - len(suffix)
    fits = base.startswith(prefix) and base.endswith(suffix)
    if not fits or end <= len(prefix):
      return None
    return (folder if folders else '', base[len(prefix) : end])

  return core


def _by_rule(left, right):
  """Yields ({left: right}, affixes, whether folders are equal) of all rules."""
  swapped = {pair[::-1] for pair in _guess_affixes(right, left)}
  guesses = sorted(_guess_affixes(left, right) | swapped | {_NONE})
  for folders, affixes in itertools.product((True, False), guesses):
    keys = (_core_of(*affix, folders) for affix in affixes)
    yield _agree(left, right, *keys), affixes, folders


def agree(left, right, *, all_items=True):
  """{name of left: name of right}, and in what they differ: '' if in nothing.

  Names are paths with '/', or with Windows' backslashes. Those that are equal,
  but for case and Unicode form, are taken. Where none is, one rule may pair
  more than half of the left and, if `all_items`, of the right side: the same
  names in other folders, or with a prefix and suffix that all of a side have.
  """
  pairs = {name: name for name in left if name in right}
  rest = [[x for x in side if x not in pairs] for side in (left, right)]
  alike = _agree(*rest, _plain, _plain)
  if pairs or alike or not all(rest):
    return pairs | alike, 'upper case, slashes or Unicode form' * bool(alike)
  # Plain forms that come twice were not taken above, and must not be here.
  plain = [{_plain(x): x for x in side} for side in rest]
  if any(len(x) < len(side) for x, side in zip(plain, rest, strict=True)):
    return {}, ''
  rules = [*_by_rule(*map(sorted, plain))]
  most = max(len(found) for found, *_ in rules)
  best = [rule for rule in rules if len(rule[0]) == most]
  found, affixes, folders = best[0]
  whole = max(map(len, rest if all_items else rest[:1]))
  # One pair with two different affixes may be anything.
  guessed = most == 1 and all(map(any, affixes))
  if 2 * most <= whole or guessed or any(x != found for x, *_ in best):
    return {}, ''
  named = (f'{prefix}NAME{suffix}' for prefix, suffix in affixes)
  how = '' if affixes == _NONE else ' and '.join(named)
  how = ', '.join(filter(None, (how, '' if folders else 'other folders')))
  return {plain[0][a]: plain[1][b] for a, b in found.items()}, how
