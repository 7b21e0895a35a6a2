# SPDX-License-Identifier: Apache-2.0
"""CamVid in SegNet's release: 11 classes, 480x360."""

from attnfd_jax.data import classes
from attnfd_jax.data.masks import IndexLabels
from attnfd_jax.data.pairs import check_root
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.data.pairs import make_source
from attnfd_jax.data.pairs import match_folders


def camvid(config):
  """<split>/*.png or .jpg with <split>annot/*.png."""
  root, problems, splits = check_root(config), [], {}
  read_label = IndexLabels(
    tuple(range(len(classes.CAMVID))), ignored=(classes.CAMVID_VOID,)
  )
  for split in ('train', 'val', 'test'):
    pairs = match_folders(root / split, root / f'{split}annot', problems)
    if pairs:
      splits[split] = make_source(config, pairs, read_label)
  names, palette = classes.names_and_palette(classes.CAMVID)
  return Dataset('camvid', names, palette, splits, tuple(problems))
