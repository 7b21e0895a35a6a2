# SPDX-License-Identifier: Apache-2.0
"""The contract of a distillation method.

A method is a Linen module whose fields are its options, with their defaults:
they appear in the config as `config.distill.<name>.<field>`. A file and a line
`register(...)` in distill/__init__.py add one; `config.distill.method` also
takes 'file.py:Class'.
"""

from collections.abc import Mapping
from typing import Protocol

import jax

from attnfd_jax.losses import Mean
from attnfd_jax.models.network import Outputs

CONNECTOR_SCHEDULES = ('always', 'first_epoch', 'warmup')


class Method(Protocol):
  """What the training step calls, in `init` and in `apply`.

  Parameters are what is trained (gates, connectors, projections); running
  statistics and memories are other collections, which are updated when
  `train`. No gradient reaches `teacher`.

  Optional members, each used where it is there:

    adapted(student, teacher) -> Method: this method for two networks, before
      `init`; see DeepLabV3Plus and teachers.Teacher for what they tell.
    extra_taps: names of maps that networks return only when they are asked,
      see DeepLabV3Plus.
    adopt(variables, teacher) -> variables: after `init`, with what the teacher
      has stored for the method.
    parameter_groups() -> ((regex, group), ...): of paths of its parameters, the
      first full match wins: 'head' (as those that match nothing), 'backbone'
      (no tenfold rate), 'connectors' (see connector_schedule), 'frozen', or a
      key of optimizers(...).
    optimizers(num_steps) -> {group: optax.GradientTransformation}: of its own,
      for a stage of so many steps.
    connector_schedule: one of CONNECTOR_SCHEDULES, see training/optim.py.
    needs_unlabeled: whether it only looks at images without labels.
    divides_by_batch: whether the loss is divided by the number of images of the
      whole batch, though it is no sum over images.
    pictures(student, teacher, *, train) -> {'student', 'teacher'}: each
      {name: [b, h, w]}, called through apply(..., method='pictures'), and
      pictures_note, a sentence: maps for the report.
    student_attention_variables(variables) -> {collection: tree} or None: gates
      of the student that are stored beside it.
  """

  def __call__(
    self, student: Outputs, teacher: Outputs, labels, *, train: bool, step
  ) -> tuple[jax.Array | Mean, Mapping[str, jax.Array]]:
    """The loss before its weight, and named scalars for the log.

    Args:
      student, teacher: Outputs of the two networks for the same images.
      labels: integers [b, H, W], 255 is ignored; all of an unlabeled image.
      train: use, and update, the statistics of the batch.
      step: updates applied so far, an int32 scalar.

    Returns:
      float32 scalar, or a Mean where it is a mean over pixels or images, and
      {name: float32 scalar}. The rng 'distill' is there for what is random.
    """
