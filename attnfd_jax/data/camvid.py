# SPDX-License-Identifier: Apache-2.0
"""CamVid in SegNet's release: 11 classes, 480x360."""

from attnfd_jax.data import classes, masks, pairs


def camvid(config, splits):
  """<split>/*.png or .jpg with <split>annot/*.png."""
  root = pairs.check_root(config)
  splits = {
    split: pairs.match_folders(root / split, root / f'{split}annot')
    for split in splits
  }
  ids = tuple(range(len(classes.CAMVID)))
  read_label = masks.IndexLabels(ids, ignored=(classes.CAMVID_VOID,))
  return pairs.make_dataset(config, classes.CAMVID, splits, read_label)
