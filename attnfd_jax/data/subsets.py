# SPDX-License-Identifier: Apache-2.0
"""Which records a stage sees, with their labels or without them."""

import dataclasses

import numpy as np

from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.data.unlabeled import REST
from attnfd_jax.data.views import View
from attnfd_jax.errors import InputError


def for_stage(dataset, config, *, labeled_limit, distills):
  """`dataset` as a stage of a run sees it.

  Args:
    config: the group `data`.
    labeled_limit: pairs of train that keep their labels, the first of a shuffle
      by `labeled_seed`; 0 for all.
    distills: whether the stage learns from unlabeled images.

  Raises:
    InputError: if 'rest' leaves nothing.
  """
  splits = dict(dataset.splits)
  if not distills:
    splits.pop(UNLABELED, None)
  train = splits['train']
  count = min(labeled_limit or len(train), len(train))
  order = np.random.default_rng(config['labeled_seed']).permutation(len(train))
  if count < len(train):
    splits['train'] = View(train, np.sort(order[:count]))
  if distills and config['unlabeled'] == REST:
    if count == len(train):
      raise InputError(
        f'config.data.unlabeled={REST}: all {count} pairs of train are labeled '
        f'with config.student.labeled_limit={labeled_limit}; 0 means all, less '
        'leaves some.'
      )
    rest = np.sort(order[count:])
    splits[UNLABELED] = View(train, rest, labeled=False)
  return dataclasses.replace(dataset, splits=splits)


def unlabeled_rows(batch_size, *, labeled, unlabeled, share):
  """How many rows of a batch are unlabeled, of so many images of each kind.

  A `share` of 0 is in proportion, at most half; below 1 a labeled row is kept.
  """
  if not unlabeled:
    return 0
  share = share or min(unlabeled / (labeled + unlabeled), 0.5)
  most = batch_size if share == 1 else batch_size - 1
  return min(max(round(share * batch_size), 1), most)
