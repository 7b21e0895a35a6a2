# SPDX-License-Identifier: Apache-2.0
"""Adds up the weighted losses of several methods, as in 'attnfd+kd'."""

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp
import optax

from attnfd_jax.distill.method import Scalar, Step
from attnfd_jax.losses import Labels, Mean
from attnfd_jax.models.layers import options_of
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray, PyTree, Variables

# 'linear_to_zero' is 0 at the end of the stage; 'linear_from_zero' is 1 minus
# it.
SCHEDULES = ('constant', 'linear_to_zero', 'linear_from_zero')


class WeightedSum(nn.Module):
  """Methods by name; has every optional member that one of them has.

  Attributes:
    methods: methods by name.
    weights: the weight of each method.
    weight_schedules: one of SCHEDULES for each method; the default is
      'constant'.
    num_steps: number of steps of the stage, for the schedules.
    task_schedule: schedule of the weight of the task loss.
  """

  methods: Mapping[str, nn.Module]
  weights: Mapping[str, float]
  weight_schedules: Mapping[str, str] = flax.core.FrozenDict()
  num_steps: int = 1
  task_schedule: str = 'constant'

  @nn.nowrap
  def weight(self, name: str, step: Step) -> float | Scalar:
    """Weight of a method at a step."""
    schedule = self.weight_schedules.get(name, 'constant')
    return self.weights[name] * self._scale(schedule, step)

  @nn.nowrap
  def task_weight(self, step: Step) -> float | Scalar:
    """Weight of the task loss at a step."""
    return self._scale(self.task_schedule, step)

  @nn.nowrap
  def _scale(self, schedule: str, step: Step) -> float | Scalar:
    if schedule == 'constant':
      return 1.0
    done = jnp.minimum(jnp.asarray(step, jnp.float32) / self.num_steps, 1)
    return done if schedule == 'linear_from_zero' else 1 - done

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
    batch_size: int | None = None,
  ) -> tuple[dict[str, Mean], dict[str, Scalar]]:
    """Computes the losses of all methods before their weights.

    Args:
      student: see distill/method.py.
      teacher: likewise.
      labels: likewise.
      train: likewise.
      step: likewise.
      batch_size: effective batch size, if this is only a part of a batch.

    Returns:
      The loss of each method, and the terms '<method>_<term>' for the log.
    """
    batch_size = batch_size or student['logits'].shape[0]
    losses, terms = {}, {}
    for name, method in sorted(self.methods.items()):
      loss, parts = method(student, teacher, labels, train=train, step=step)
      if not isinstance(loss, Mean):
        loss = Mean(loss, jnp.ones((), loss.dtype))
      if getattr(method, 'divides_by_batch', False):
        loss = loss._replace(total=loss.total / batch_size)
        parts = {part: value / batch_size for part, value in parts.items()}
      losses[name] = loss
      terms |= {f'{name}_{part}': value for part, value in parts.items()}
    return losses, terms

  @nn.nowrap
  def _members(self, member: str) -> list[tuple[str, Any]]:
    """That member of the methods that have it, with their names."""
    items = self.methods.items()
    return [(k, getattr(x, member)) for k, x in items if hasattr(x, member)]

  def adapted(self, student: Any, teacher: Any) -> 'WeightedSum':
    """Configures each method for a student network and a Teacher."""
    changed = {
      name: adapted(student, teacher)
      for name, adapted in self._members('adapted')
    }
    return self.clone(methods={**self.methods, **changed})

  def adopt(self, variables: Variables, teacher: Any) -> Variables:
    """Takes over what the teacher has stored for the methods."""
    for name, adopt in self._members('adopt'):
      own = _variables_of(name, variables)
      for part, tree in adopt(own, teacher).items():
        if tree is not own.get(part):
          collection = variables[part] | {f'methods_{name}': tree}
          variables = {**variables, part: collection}
    return variables

  def pictures(
    self, student: Outputs, teacher: Outputs, *, train: bool
  ) -> dict[str, dict[str, AnyArray]]:
    """Maps of all methods for the report: {role: {name: [b, h, w]}}."""
    maps_by_role = {}
    for _, pictures in self._members('pictures'):
      for role, maps in pictures(student, teacher, train=train).items():
        maps_by_role[role] = maps_by_role.get(role, {}) | maps
    return maps_by_role

  @property
  def pictures_note(self) -> str:
    """Sentences that describe the pictures."""
    return ' '.join(note for _, note in self._members('pictures_note') if note)

  def student_attention_variables(
    self, variables: Variables
  ) -> Variables | None:
    """Gates of the student, from the first method that has any."""
    gates = (
      of(_variables_of(name, variables))
      for name, of in self._members('student_attention_variables')
    )
    return next(gates, None)

  @property
  def connector_schedule(self) -> str:
    """Of the first method that has connectors; otherwise 'always'."""
    return next((x for _, x in self._members('connector_schedule')), 'always')

  @property
  def extra_taps(self) -> tuple[str, ...]:
    """Names of the feature maps that methods request from the networks."""
    names = [tap for _, taps in self._members('extra_taps') for tap in taps]
    return tuple(sorted({*names}))

  @property
  def needs_unlabeled(self) -> list[str]:
    """Names of the methods that use unlabeled images only."""
    return [name for name, needed in self._members('needs_unlabeled') if needed]

  def parameter_groups(self) -> tuple[tuple[str, str], ...]:
    """Pairs (regex, group) of all methods; groups of their own get a prefix."""
    all_groups, own = [], self.optimizers()
    for name, groups in self._members('parameter_groups'):
      for regex, group in groups():
        prefixed = f'{name}_{group}'
        group = prefixed if prefixed in own else group
        all_groups.append((f'methods_{name}/(?:{regex})', group))
    return tuple(all_groups)

  def optimizers(self) -> dict[str, optax.GradientTransformation]:
    """The optimizers '<method>_<group>' that methods define."""
    return {
      f'{name}_{group}': tx
      for name, optimizers in self._members('optimizers')
      for group, tx in optimizers(self.num_steps).items()
    }

  @nn.nowrap
  def options(self) -> dict[str, dict[str, Any]]:
    """Weight and options in use for each method, for a JSON file."""
    return {
      name: {
        'weight': self.weights[name],
        'weight_schedule': self.weight_schedules.get(name, 'constant'),
        **options_of(method),
      }
      for name, method in self.methods.items()
    }


def _variables_of(name: str, variables: Variables) -> dict[str, PyTree]:
  """The collections of one method."""
  key = f'methods_{name}'
  return {part: tree[key] for part, tree in variables.items() if key in tree}
