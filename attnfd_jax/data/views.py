# SPDX-License-Identifier: Apache-2.0
"""Some records of a source, with their labels or without them."""

import numpy as np

from attnfd_jax.data import cache, pairs


class View(pairs.Decoded):
  """Some records of a source; not `labeled`, files of masks stay closed."""

  def __init__(self, source, indices, *, labeled=True):
    # What has its labels is kept by the source.
    kept = not labeled and getattr(source, 'cached', False)
    super().__init__(len(indices), cache=kept)
    self._source, self._indices = source, np.asarray(indices)
    self._labeled = labeled
    if hasattr(source, 'fingerprint'):
      self.fingerprint = self._fingerprint

  def _at(self, index):
    return int(self._indices[index])

  def _read(self, index):
    if self._labeled:
      return self._source[self._at(index)]
    # A source whose records are files reads images alone, too.
    read = getattr(self._source, 'image', None)
    image = (
      read(self._at(index)) if read else self._source[self._at(index)]['image']
    )
    return {'image': image, 'label': pairs.no_label(image.shape[:2])}

  def label(self, index):
    if not self._labeled:
      return pairs.no_label(self.size(index))
    if hasattr(self._source, 'label'):
      return self._source.label(self._at(index))
    return self[index]['label']

  def size(self, index):
    return self._source.size(self._at(index))

  def name(self, index):
    return self._source.name(self._at(index))

  def key(self, index):
    return self._source.key(self._at(index))

  def _fingerprint(self):
    kind = f'{self._source.fingerprint()} {self._labeled} '.encode()
    return cache.digest((), kind + self._indices.astype('<i8').tobytes())
