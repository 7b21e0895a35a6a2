# SPDX-License-Identifier: Apache-2.0
"""Methods that are trained together: 'attnfd+kd', each times its weight."""

from collections.abc import Mapping

import flax.core
import flax.linen as nn
import jax.numpy as jnp

from attnfd_jax.losses import Mean
from attnfd_jax.models.layers import options_of

# 'linear_to_zero' arrives with the stage; 'linear_from_zero' is 1 minus it.
SCHEDULES = ('constant', 'linear_to_zero', 'linear_from_zero')


class WeightedSum(nn.Module):
  """Methods by name; has each optional member that one of them has."""

  methods: Mapping[str, nn.Module]
  weights: Mapping[str, float]
  weight_schedules: Mapping[str, str] = flax.core.FrozenDict()  # Of SCHEDULES
  num_steps: int = 1  # Of the stage.
  task_schedule: str = 'constant'  # Of SCHEDULES, of the task loss.

  @nn.nowrap
  def weight(self, name, step):
    """Of a method at a step."""
    schedule = self.weight_schedules.get(name, 'constant')
    return self.weights[name] * self._scale(schedule, step)

  @nn.nowrap
  def task_weight(self, step):
    """Of the loss of the task at a step."""
    return self._scale(self.task_schedule, step)

  @nn.nowrap
  def _scale(self, schedule, step):
    if schedule == 'constant':
      return 1.0
    done = jnp.minimum(jnp.asarray(step, jnp.float32) / self.num_steps, 1)
    return done if schedule == 'linear_from_zero' else 1 - done

  def __call__(self, student, teacher, labels, *, train, step, batch_size=None):
    """{name: Mean} of the losses before their weights, and {'<name>_<term>':
    scalar} for the log; `batch_size` is that of the whole batch, where this is
    a part of it.
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
  def _having(self, member):
    """(name, its `member`) of the methods that have it."""
    items = self.methods.items()
    return [(k, getattr(x, member)) for k, x in items if hasattr(x, member)]

  def adapted(self, student, teacher):
    """With each method for these networks."""
    found = self._having('adapted')
    changed = {name: adapted(student, teacher) for name, adapted in found}
    return self.clone(methods={**self.methods, **changed})

  def adopt(self, variables, teacher):
    """Variables with what the teacher has stored for the methods."""
    for name, adopt in self._having('adopt'):
      own = _variables_of(name, variables)
      for part, tree in adopt(own, teacher).items():
        if tree is not own.get(part):
          whole = variables[part] | {f'methods_{name}': tree}
          variables = {**variables, part: whole}
    return variables

  def pictures(self, student, teacher, *, train):
    """Maps of all methods that have some: {role: {name: [b, h, w]}}."""
    found = {}
    for _, pictures in self._having('pictures'):
      for role, maps in pictures(student, teacher, train=train).items():
        found[role] = found.get(role, {}) | maps
    return found

  @property
  def pictures_note(self):
    """Sentences about the pictures of the methods."""
    return ' '.join(note for _, note in self._having('pictures_note') if note)

  def student_attention_variables(self, variables):
    """Of the first method that has some, or None."""
    found = self._having('student_attention_variables')
    gates = (of(_variables_of(name, variables)) for name, of in found)
    return next(gates, None)

  @property
  def connector_schedule(self):
    """Of the first method that has connectors; 'always' without one."""
    return next((x for _, x in self._having('connector_schedule')), 'always')

  @property
  def extra_taps(self):
    """Names of further maps that one of the methods asks for."""
    asked = [tap for _, taps in self._having('extra_taps') for tap in taps]
    return tuple(sorted({*asked}))

  @property
  def needs_unlabeled(self):
    """Names of the methods that only look at images without labels."""
    return [name for name, needed in self._having('needs_unlabeled') if needed]

  def parameter_groups(self):
    """((regex, group), ...) of all methods; own groups get a prefix."""
    found, own = [], self.optimizers()
    for name, groups in self._having('parameter_groups'):
      for regex, group in groups():
        prefixed = f'{name}_{group}'
        group = prefixed if prefixed in own else group
        found.append((f'methods_{name}/(?:{regex})', group))
    return tuple(found)

  def optimizers(self):
    """{'<name>_<group>': GradientTransformation} that methods bring."""
    return {
      f'{name}_{group}': tx
      for name, optimizers in self._having('optimizers')
      for group, tx in optimizers(self.num_steps).items()
    }

  @nn.nowrap
  def options(self):
    """{name: its weight and fields as they are used}, as JSON can hold them."""
    return {
      name: {
        'weight': self.weights[name],
        'weight_schedule': self.weight_schedules.get(name, 'constant'),
        **options_of(method),
      }
      for name, method in self.methods.items()
    }


def _variables_of(name, variables):
  """{collection: tree} of one method."""
  key = f'methods_{name}'
  return {part: tree[key] for part, tree in variables.items() if key in tree}
