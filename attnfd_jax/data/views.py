# SPDX-License-Identifier: Apache-2.0
"""Views of some records of a source, with or without their labels."""

from typing import Any

import numpy as np

from attnfd_jax.data import cache, pairs
from attnfd_jax.data.records import Record, Size, Source


class View(pairs.Decoded):
  """Some records of a source.

  Unless `labeled`, all labels are ignored, and mask files are not opened.
  """

  def __init__(
    self, source: Source, indices: np.ndarray, *, labeled: bool = True
  ):
    # The source itself caches labeled records.
    cached = not labeled and getattr(source, 'cached', False)
    super().__init__(len(indices), cache=cached)
    self._source: Any = source  # May have the optional members of a Source.
    self._indices, self._labeled = np.asarray(indices), labeled
    if hasattr(source, 'fingerprint'):
      self.fingerprint = self._fingerprint

  def _at(self, index: int) -> int:
    return int(self._indices[index])

  def _read(self, index: int) -> Record:
    if self._labeled:
      return self._source[self._at(index)]
    # Sources of files can read an image without its mask.
    read = getattr(self._source, 'image', None)
    image = (
      read(self._at(index)) if read else self._source[self._at(index)]['image']
    )
    return {'image': image, 'label': pairs.no_label(image.shape[:2])}

  def label(self, index: int) -> np.ndarray:
    """Reads the label, without decoding the image if the source can."""
    if not self._labeled:
      return pairs.no_label(self.size(index))
    if hasattr(self._source, 'label'):
      return self._source.label(self._at(index))
    return self[index]['label']

  def size(self, index: int) -> Size:
    """Height and width, without decoding."""
    return self._source.size(self._at(index))

  def name(self, index: int) -> str:
    """Name of the image in messages."""
    return self._source.name(self._at(index))

  def key(self, index: int) -> str:
    """Unique name of the record in its split."""
    return self._source.key(self._at(index))

  def _fingerprint(self) -> str:
    kind = f'{self._source.fingerprint()} {self._labeled} '.encode()
    return cache.digest((), kind + self._indices.astype('<i8').tobytes())
