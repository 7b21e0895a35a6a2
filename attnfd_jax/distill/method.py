# SPDX-License-Identifier: Apache-2.0
"""Defines the interface of a distillation method, and its types.

A method is a Linen module whose fields are its options, with defaults; they
appear in the config as `config.distill.<name>.<field>`. To add one, write a
file and a line `register(...)` in distill/__init__.py. Without changing the
package, set `config.distill.method` to 'file.py:Class'.
"""

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from jaxtyping import Array, Float, Integer

from attnfd_jax.losses import Labels, Mean
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

CONNECTOR_SCHEDULES = ('always', 'first_epoch', 'warmup')

Scalar: TypeAlias = Float[Array, '']
# Number of updates applied so far.
Step: TypeAlias = int | Integer[AnyArray, '']
# Named scalars for the log.
Terms: TypeAlias = Mapping[str, Scalar]
LossAndTerms: TypeAlias = tuple[Scalar | Mean, Terms]


class Method(Protocol):
  """What the training step calls, through `init` and `apply`.

  Parameters are trained (gates, connectors, projections). Running statistics
  and memory banks belong to other collections, updated when `train` is true.
  No gradient reaches `teacher`.

  Optional members:

    adapted(student, teacher) -> Method: this method, configured for a student
      network and a Teacher; called before `init`. See DeepLabV3Plus and
      teachers.Teacher for their attributes.
    extra_taps: names of feature maps that a network returns only on request,
      see DeepLabV3Plus.
    adopt(variables, teacher) -> variables: called after `init`, to take over
      what the teacher has stored for this method.
    parameter_groups() -> ((regex, group), ...): optimizer groups by parameter
      path; the first regex that matches the whole path wins. A group is 'head'
      (the default), 'backbone' (without the tenfold learning rate),
      'connectors' (see connector_schedule), 'frozen', or a key of
      optimizers(...).
    optimizers(num_steps) -> {group: optax.GradientTransformation}: optimizers
      of its own, for a stage of that many steps.
    connector_schedule: one of CONNECTOR_SCHEDULES, see training/optim.py.
    needs_unlabeled: whether it uses unlabeled images only.
    divides_by_batch: whether to divide the loss by the effective batch size,
      although it is not a sum over images.
    pictures(student, teacher, *, train) -> {'student', 'teacher'}: for each
      {name: [b, h, w]}, maps for the report, called through
      apply(..., method='pictures').
    pictures_note: a sentence that describes them.
    student_attention_variables(variables) -> {collection: tree} or None: the
      student's gates, which are stored with it.
  """

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """Computes the loss before its weight, and scalars for the log.

    Random operations use the rng 'distill'.

    Args:
      student: outputs of the student.
      teacher: outputs of the teacher for the same images.
      labels: class indices, or 255 for ignored pixels; every pixel of an
        unlabeled image is 255.
      train: whether to use and update batch statistics.
      step: number of updates applied so far.

    Returns:
      The loss, a Mean if it is a mean over pixels or images, and the terms.
    """
    ...
