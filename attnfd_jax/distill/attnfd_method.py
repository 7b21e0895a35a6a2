# SPDX-License-Identifier: Apache-2.0
"""AttnFD as a method of the registry: any two networks, stored gates, maps."""

import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.attnfd import AttnFD, AttnFDOptions
from attnfd_jax.distill.method import CONNECTOR_SCHEDULES
from attnfd_jax.errors import InputError, one_of
from attnfd_jax.models import layers


class AttnFDMethod(AttnFDOptions):
  """`AttnFD` between the taps that two networks share.

  Attributes:
    taps: names of maps; those that both sides have are compared.
    teacher_attention: see AttnFD. 'in_path' and 'checkpoint' are what is asked
      for, `adapted` finds out what the teacher has: 'in_path' becomes
      'parameter_free' for a teacher without trained gates, 'checkpoint' becomes
      'random' for one without stored gates, as the authors' own training leaves
      them.
    connector_schedule: see training/optim.py; 'first_epoch' is the authors'.
    others: see AttnFD.
  """

  taps: tuple[str, ...] = ('backbone', 'aspp', 'decoder')
  connector_schedule: str = 'always'

  pictures_note = (
    'Where the refined features of the teacher and of the student are strong, '
    'at the taps where they are compared.'
  )

  def __post_init__(self):
    one_of('connector_schedule', self.connector_schedule, CONNECTOR_SCHEDULES)
    super().__post_init__()

  @property
  def divides_by_batch(self):
    """One unit for the whole batch, and a sum divided by its images."""
    return self.reduction == 'batchmean' and self.norm_scope == 'batch'

  def adapted(self, student, teacher):
    """With the attention that this teacher has, and starts by the networks."""
    attention = self.teacher_attention
    if getattr(teacher, 'in_path_attention', False):
      if attention not in ('in_path', 'checkpoint'):
        raise ValueError(
          f'teacher_attention={attention!r}, but the maps of this teacher are '
          'refined in its forward path; use in_path.'
        )
      attention = 'in_path'
    elif attention == 'in_path':
      attention = 'parameter_free'  # Gates that nobody trained would be noise.
    elif attention == 'checkpoint' and getattr(teacher, 'gates', None) is None:
      attention = 'random'
    networks = student, getattr(teacher, 'network', None)
    backbones = [str(getattr(x, 'backbone', '')) for x in networks]
    # Those of ResNets start as their convolutions, resnet.py of the authors.
    resnets = all(name.startswith('resnet') for name in backbones)
    taps = self.fan_out_taps or (('backbone',) if resnets else ())
    return self.clone(teacher_attention=attention, fan_out_taps=taps)

  def adopt(self, variables, teacher):
    """`variables` with the gates of the teacher's checkpoint."""
    gates = getattr(teacher, 'gates', None)
    if self.teacher_attention != 'checkpoint' or gates is None:
      return variables
    own = variables['teacher']
    chosen = {
      part: {tap: gates[part].get(tap) for tap in taps}
      for part, taps in own.items()
    }
    if jax.tree.map(jnp.shape, chosen) != jax.tree.map(jnp.shape, own):
      raise InputError(
        'The gates in the checkpoint of the teacher do not fit its maps; use '
        '--config.distill.attnfd.teacher_attention=parameter_free.'
      )
    return {**variables, 'teacher': chosen}

  def parameter_groups(self):
    """As the authors group them; their optimiser never sees the MLP."""
    groups = [(r'connectors_\w+/.*', 'connectors')]
    if self.student_attention == 'mlp_frozen':
      groups += [
        (r'student_gates_\w+/mlp_.*', 'frozen'),
        (r'student_gates_backbone/.*', 'backbone'),
      ]
    return tuple(groups)

  def student_attention_variables(self, variables):
    """{'params', 'batch_stats'} of the student's gates by tap, or None."""
    if self.student_attention not in ('learnable', 'mlp_frozen'):
      return None
    prefix, found = 'student_gates_', {}
    for part in ('params', 'batch_stats'):
      names = [x for x in variables[part] if x.startswith(prefix)]
      found[part] = {x.removeprefix(prefix): variables[part][x] for x in names}
    return found

  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; one term for each tap."""
    del labels, step
    distiller, maps = self._distiller(student, teacher)
    return distiller(*maps, train=train)

  def pictures(self, student, teacher, *, train):
    """Length of the refined vector at each pixel of each tap."""
    distiller, maps = self._distiller(student, teacher)
    refined = distiller.refined_maps(*maps, train=train)
    lengths = jax.tree.map(lambda x: jnp.linalg.norm(x, axis=-1), refined)
    return dict(zip(('student', 'teacher'), lengths, strict=True))

  def _distiller(self, student, teacher):
    """The AttnFD, in the scope of this module, and its two sets of maps."""
    maps = matching.shared(student, teacher, self.taps)
    channels = [{tap: x.shape[-1] for tap, x in side.items()} for side in maps]
    options = layers.options_of(self, AttnFDOptions)
    if self.divides_by_batch:
      options['reduction'] = 'unitmean'
    return AttnFD(*channels, **options, parent=self.scope), maps
