# SPDX-License-Identifier: Apache-2.0
"""Methods that are trained together: 'attnfd+kd', each times its weight."""

from collections.abc import Mapping
import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.losses import Mean

SCHEDULES = ('constant', 'linear_to_zero')


class WeightedSum(nn.Module):
  """Methods by name, with their weights.

  Attributes:
    methods: name -> Method.
    weights: name -> weight.
    weight_schedules: name -> one of SCHEDULES, 'constant' by default.
    num_steps: of the stage, where 'linear_to_zero' arrives.
  """

  methods: Mapping[str, nn.Module]
  weights: Mapping[str, float]
  weight_schedules: Mapping[str, str] | None = None
  num_steps: int = 1

  @nn.nowrap
  def _schedule(self, name):
    return (self.weight_schedules or {}).get(name, 'constant')

  @nn.nowrap
  def weight(self, name, step):
    """Of a method at a step."""
    if self._schedule(name) == 'constant':
      return self.weights[name]
    left = 1 - jnp.asarray(step, jnp.float32) / self.num_steps
    return self.weights[name] * jnp.maximum(left, 0)

  def __call__(self, student, teacher, labels, *, train, step, batch_size=None):
    """Each method's loss before its weight, and all terms for the log.

    Args:
      student, teacher, labels, train, step: see distill/method.py.
      batch_size: images of the whole batch, where this is a part of it.

    Returns:
      {name: Mean} and {'<name>_<term>': scalar}.
    """
    if batch_size is None:
      batch_size = student['logits'].shape[0]
    losses, terms = {}, {}
    for name in sorted(self.methods):
      method = self.methods[name]
      loss, parts = method(student, teacher, labels, train=train, step=step)
      if not isinstance(loss, Mean):
        loss = Mean(loss, jnp.ones((), loss.dtype))
      if getattr(method, 'divides_by_batch', False):
        loss = loss._replace(total=loss.total / batch_size)
        parts = {part: value / batch_size for part, value in parts.items()}
      losses[name] = loss
      terms |= {f'{name}_{part}': value for part, value in parts.items()}
    return losses, terms

  def pictures(self, student, teacher, *, train):
    """Maps of all methods that have some: {role: {name: [b, h, w]}}."""
    found = {}
    for method in self.methods.values():
      if hasattr(method, 'pictures'):
        for role, maps in method.pictures(
          student, teacher, train=train
        ).items():
          found[role] = found.get(role, {}) | maps
    return found

  def adapted(self, student, teacher):
    """Each method for these networks, see Method.adapted."""
    return self.clone(
      methods={
        name: method.adapted(student, teacher)
        if hasattr(method, 'adapted')
        else method
        for name, method in self.methods.items()
      }
    )

  def adopt(self, variables, teacher):
    """Variables with what the teacher has stored for the methods."""
    for name, method in self.methods.items():
      if not hasattr(method, 'adopt'):
        continue
      own = self.variables_of(name, variables)
      for collection, tree in method.adopt(own, teacher).items():
        if tree is not own.get(collection):
          whole = variables[collection] | {f'methods_{name}': tree}
          variables = {**variables, collection: whole}
    return variables

  def variables_of(self, name, variables):
    """Those of one method: {collection: tree}."""
    key = f'methods_{name}'
    return {part: tree[key] for part, tree in variables.items() if key in tree}

  def student_attention_variables(self, variables):
    """Of the first method that has some, or None."""
    for name, method in self.methods.items():
      if hasattr(method, 'student_attention_variables'):
        return method.student_attention_variables(
          self.variables_of(name, variables)
        )
    return None

  @nn.nowrap
  def options(self):
    """{name: its weight and fields as they are used}, as JSON can hold them."""
    return {
      name: {
        'weight': self.weights[name],
        'weight_schedule': self._schedule(name),
      }
      | {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if field.name not in ('parent', 'name')
      }
      for name, method in self.methods.items()
    }

  @property
  def connector_schedule(self):
    """Of the first method that has connectors; 'always' without one."""
    for method in self.methods.values():
      if hasattr(method, 'connector_schedule'):
        return method.connector_schedule
    return 'always'

  @property
  def pictures_note(self):
    """Sentences about the pictures of the methods."""
    notes = [getattr(x, 'pictures_note', '') for x in self.methods.values()]
    return ' '.join(filter(None, notes))

  def parameter_groups(self):
    """((regex, group), ...) of all methods; own groups get a prefix."""
    found = []
    for name, method in self.methods.items():
      own = self._optimizers_of(method)
      if hasattr(method, 'parameter_groups'):
        found += [
          (f'methods_{name}/(?:{regex})', f'{name}_{x}' if x in own else x)
          for regex, x in method.parameter_groups()
        ]
    return tuple(found)

  def optimizers(self):
    """{group: GradientTransformation} that methods bring."""
    return {
      f'{name}_{group}': tx
      for name, method in self.methods.items()
      for group, tx in self._optimizers_of(method).items()
    }

  @nn.nowrap
  def _optimizers_of(self, method):
    return method.optimizers() if hasattr(method, 'optimizers') else {}
