# SPDX-License-Identifier: Apache-2.0
"""Types of the data pipeline: records, sizes and the sources of records."""

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import numpy as np

# {'image': uint8 [h, w, 3] RGB, 'label': uint8 [h, w] of train ids, where 255
# is ignored}.
Record: TypeAlias = dict[str, np.ndarray]
Size: TypeAlias = tuple[int, int]  # (height, width).


class DataConfig(Protocol):
  """The group `data` of a config: a ConfigDict, or a dict with its keys."""

  def __getitem__(self, key: str, /) -> Any:
    """Value of a key."""
    ...

  def keys(self) -> Iterable[str]:
    """All keys."""
    ...


class Source(Protocol):
  """Random access to the records of a split.

  Optional members, each used where it is there:

    image(index): the image without reading the label.
    label(index): the label without decoding the image.
    encoded(index): the record with the image as stored bytes, for prepare_data.
    fingerprint(): a hex digest that changes with the content.
    cached: whether records stay in memory.
    pairs: the files of each record, for messages.
  """

  def __len__(self) -> int:
    """Number of records."""
    ...

  def __getitem__(self, index: int) -> Record:
    """Reads and decodes a record."""
    ...

  def size(self, index: int) -> Size:
    """Size of the label, without decoding it."""
    ...

  def name(self, index: int) -> str:
    """Name of a record in messages."""
    ...

  def key(self, index: int) -> str:
    """Name of a record that is unique in its split."""
    ...
