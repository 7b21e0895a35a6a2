# SPDX-License-Identifier: Apache-2.0
"""Reads CamVid in SegNet's release: 11 classes, 480x360."""

from collections.abc import Sequence

from attnfd_jax.data import classes, masks, pairs
from attnfd_jax.data.records import DataConfig


def camvid(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Pairs <split>/*.png or *.jpg with <split>annot/*.png."""
  root = pairs.check_root(config)
  entries = {
    split: pairs.match_folders(root / split, root / f'{split}annot')
    for split in splits
  }
  ids = tuple(range(len(classes.CAMVID)))
  read_label = masks.IndexLabels(ids, ignored=(classes.CAMVID_VOID,))
  return pairs.make_dataset(config, classes.CAMVID, entries, read_label)
