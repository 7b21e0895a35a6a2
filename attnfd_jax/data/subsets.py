# SPDX-License-Identifier: Apache-2.0
"""Selects the records that a stage trains on, labeled and unlabeled."""

import dataclasses

import numpy as np

from attnfd_jax.data.pairs import Dataset, UNLABELED
from attnfd_jax.data.records import DataConfig
from attnfd_jax.data.unlabeled import REST
from attnfd_jax.data.views import View
from attnfd_jax.errors import InputError


def for_stage(
  dataset: Dataset, config: DataConfig, *, labeled_limit: int, distills: bool
) -> Dataset:
  """Returns `dataset` with the splits that a stage of a run uses.

  Args:
    dataset: all data, with a split 'train'.
    config: the group `data`.
    labeled_limit: how many pairs of train keep their labels, chosen at random
      by `labeled_seed`; 0 for all.
    distills: whether the stage is also trained with unlabeled images.

  Raises:
    InputError: if `unlabeled` is 'rest' and all pairs are labeled.
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
        f'with config.student.labeled_limit={labeled_limit}; set one from 1 to '
        f'{count - 1} (0 means all).'
      )
    splits[UNLABELED] = View(train, np.sort(order[count:]), labeled=False)
  return dataclasses.replace(dataset, splits=splits)


def unlabeled_rows(
  batch_size: int, *, labeled: int, unlabeled: int, share: float
) -> int:
  """Returns how many images of a batch are unlabeled.

  Args:
    batch_size: number of images in a batch.
    labeled: number of labeled images in the data set.
    unlabeled: number of unlabeled images in the data set.
    share: fraction of a batch that is unlabeled; below 1 at least one image is
      labeled. 0 for their fraction of the data set, at most half.
  """
  if not unlabeled:
    return 0
  share = share or min(unlabeled / (labeled + unlabeled), 0.5)
  most = batch_size if share == 1 else batch_size - 1
  return min(max(round(share * batch_size), 1), most)
