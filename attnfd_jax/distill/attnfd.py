# SPDX-License-Identifier: Apache-2.0
"""Attention-guided feature distillation (AttnFD, arXiv 2403.05451).

At every tap k, with student map S, teacher map T, attention A and connector
phi (1x1 convolution and batch normalisation):

  s = phi(A_student(S)),  t = A_teacher(T),
  loss = sum over k of || s / ||s|| - t / ||t|| ||^2 / b

where ||.|| runs over the whole batch (distiller.py:40-51 of the authors).
"""

from collections.abc import Mapping
import math

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.method import CONNECTOR_SCHEDULES
from attnfd_jax.errors import InputError, one_of
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.attention import CBAM

# The arrays that are scaled to unit length: axes of [b, h, w, c].
NORM_AXES = {
  'batch': (0, 1, 2, 3),
  'image': (1, 2, 3),
  'pixel': (3,),
  'channel': (1, 2),
}
# Those of teachers' gates that have parameters of their own.
STORED = ('checkpoint', 'random')
CHOICES = {
  'teacher_attention': (*STORED, 'parameter_free', 'in_path', 'none'),
  'student_attention': ('learnable', 'mlp_frozen', 'parameter_free', 'none'),
  'norm_scope': tuple(NORM_AXES),
  'reduction': ('batchmean', 'unitmean', 'mean'),
  'teacher_bn': ('batch', 'running'),
  'match_size': ('none', 'to_teacher', 'to_student'),
  'connector_schedule': CONNECTOR_SCHEDULES,  # Of the Method alone.
}
# Squared length below which a map has no direction.
TINY = 1e-12


def unit(x, axes):
  """x scaled to length 1 over `axes`, in float32; zeros stay zeros.

  The authors divide by the bare norm, which is NaN for a map of zeros.
  """
  x = x.astype(layers.at_least_float32(x.dtype))
  square = jnp.sum(jnp.square(x), axes, keepdims=True)
  has_length = square > TINY
  scale = jax.lax.rsqrt(jnp.where(has_length, square, 1))
  return x * jnp.where(has_length, scale, 0)


def direction_distance(student, teacher, *, norm_scope, reduction):
  """Squared distance of two maps [b, h, w, c], each scaled to unit length.

  With the cosine of each pair of unit arrays a distance is 2 - 2 cos. The
  teacher's map is a constant; a float32 scalar, finite also for maps of zeros.

  Args:
    norm_scope: key of NORM_AXES; 'batch' is global on a sharded batch, too.
    reduction: of the distances: 'batchmean' sums and divides by b, 'unitmean'
      averages, 'mean' divides by the number of elements.
  """
  axes = NORM_AXES[norm_scope]
  target = jax.lax.stop_gradient(unit(teacher, axes))
  distance = jnp.sum(jnp.square(unit(student, axes) - target))
  b, size = student.shape[0], student.size
  units = size // math.prod(student.shape[axis] for axis in axes)
  divisor = {'batchmean': b, 'unitmean': units, 'mean': size}
  return distance / divisor[reduction]


class Connector(nn.Module):
  """1x1 convolution and normalisation to the teacher's channels."""

  features: int

  @nn.compact
  def __call__(self, x, *, train):
    init = layers.fan_out_normal  # N(0, 2 / c_teacher), distiller.py:10-22.
    conv_norm = layers.ConvNorm(
      self.features, 1, kernel_init=init, dtype=x.dtype, name='conv_norm'
    )
    return conv_norm(x, train=train)


class AttnFDOptions(nn.Module, kw_only=True):
  """The options of AttnFD, which describes them, and of its Method."""

  teacher_attention: str = 'parameter_free'
  student_attention: str = 'learnable'
  norm_scope: str = 'batch'
  reduction: str = 'unitmean'
  teacher_bn: str = 'running'
  match_size: str = 'none'
  fan_out_taps: tuple[str, ...] = ()

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if hasattr(self, name):
        one_of(name, getattr(self, name), choices)
    super().__post_init__()


class AttnFD(AttnFDOptions):
  """Attention gates, connectors and the distance of refined maps.

  Attributes:
    student_channels: tap -> channels of the student's map.
    teacher_channels: tap -> channels of the teacher's map, the same taps.
    teacher_attention: 'checkpoint' or 'random': frozen CBAMs in the collection
      'teacher', to be replaced by stored ones in the first case;
      'parameter_free'; 'in_path' if the maps were refined by the teacher
      itself; 'none'. As the three others have no parameters, no such
      collection exists for them.
    student_attention: 'learnable', 'mlp_frozen' (the authors' optimiser never
      sees the MLP of the channel gate), 'parameter_free' or 'none'.
    norm_scope: see `direction_distance`.
    reduction: likewise.
    teacher_bn: 'running' or 'batch' statistics in the teacher's gates while
      training; the update is discarded.
    match_size: when heights or widths differ, 'to_teacher' or 'to_student'
      resizes the other map before the distance; 'none' is an error.
    fan_out_taps: taps whose spatial gate starts as a ResNet convolution.
  """

  student_channels: Mapping[str, int]
  teacher_channels: Mapping[str, int]

  def __post_init__(self):
    if set(self.student_channels) != set(self.teacher_channels):
      raise ValueError(
        f'Taps differ: student {sorted(self.student_channels)}, teacher '
        f'{sorted(self.teacher_channels)}.'
      )
    # Hashable, so that jit can take a module as a static argument.
    self.student_channels = flax.core.FrozenDict(self.student_channels)
    self.teacher_channels = flax.core.FrozenDict(self.teacher_channels)
    self.fan_out_taps = tuple(self.fan_out_taps)
    super().__post_init__()

  def setup(self):
    taps, channels = sorted(self.student_channels), self.teacher_channels
    if self.student_attention != 'none':
      self.student_gates = {
        tap: self._gate(tap, self.student_attention) for tap in taps
      }
    self.connectors = {tap: Connector(channels[tap]) for tap in taps}
    # The teacher's gates are constants: a collection of their own, not params.
    stored, gates = self.teacher_attention in STORED, {}
    parts = ('params', 'batch_stats') if stored else ()
    if parts and not self.has_variable('teacher', 'params'):
      rng = self.make_rng('params')
      for i, tap in enumerate(taps):
        gate = self._gate(tap, self.teacher_attention, parent=None)
        x = jnp.zeros((1, 1, 1, channels[tap]))
        gates[tap] = gate.init(jax.random.fold_in(rng, i), x, train=False)
    self.teacher_variables = {
      part: self.variable(
        'teacher', part, lambda x: {tap: gates[tap][x] for tap in taps}, part
      )
      for part in parts
    }

  def _gate(self, tap, attention, **options):
    fan_out = tap in self.fan_out_taps
    return CBAM(
      parameter_free=attention == 'parameter_free',
      freeze_mlp=attention == 'mlp_frozen',
      spatial_init=layers.fan_out_normal if fan_out else layers.fan_in_normal,
      **options,
    )

  def _check(self, student_features, teacher_features):
    for role, features, channels in (
      ('student', student_features, self.student_channels),
      ('teacher', teacher_features, self.teacher_channels),
    ):
      for tap, expected in channels.items():
        if tap not in features:
          raise ValueError(f'{role} has no map {tap!r}, only {list(features)}.')
        shape = features[tap].shape
        if len(shape) != 4 or shape[-1] != expected:
          raise ValueError(
            f'{role} map {tap!r} has shape {shape}; expected '
            f'[b, h, w, {expected}] as in {role}_channels.'
          )
    for tap in self.student_channels:
      ours, theirs = student_features[tap].shape, teacher_features[tap].shape
      if ours[0] != theirs[0]:
        raise ValueError(f'Batches differ at {tap!r}: {ours} and {theirs}.')
      if self.match_size == 'none' and ours[1:3] != theirs[1:3]:
        raise ValueError(
          f'Sizes differ at {tap!r}: student {ours}, teacher {theirs}. Pass '
          "match_size='to_teacher' or 'to_student' to resize."
        )

  def refined_maps(self, student_features, teacher_features, *, train):
    """The maps after attention: two dicts tap -> [b, h, w, c]."""
    self._check(student_features, teacher_features)
    students, teachers = {}, {}
    for tap in sorted(self.student_channels):
      ours, theirs = student_features[tap], teacher_features[tap]
      if self.student_attention != 'none':
        ours = self.student_gates[tap](ours, train=train)
      if self.teacher_attention in (*STORED, 'parameter_free'):
        gate = self._gate(tap, self.teacher_attention, parent=None)
        variables = {k: x.value[tap] for k, x in self.teacher_variables.items()}
        batch = train and self.teacher_bn == 'batch'
        theirs = gate.apply(variables, theirs, train=batch)
      students[tap], teachers[tap] = ours, theirs
    return students, jax.lax.stop_gradient(teachers)

  def __call__(self, student_features, teacher_features, *, train):
    """Sum over the taps, and {tap: its term}; see `attnfd_loss`. ValueError
    names a tap and both shapes that do not fit.
    """
    maps = student_features, teacher_features
    students, teachers = self.refined_maps(*maps, train=train)
    terms = {}
    for tap, target in teachers.items():
      student = self.connectors[tap](students[tap], train=train)
      if self.match_size == 'to_teacher':
        student = resizing.resize(student, *target.shape[1:3])
      elif self.match_size == 'to_student':
        target = resizing.resize(target, *student.shape[1:3])
      terms[tap] = direction_distance(
        student, target, norm_scope=self.norm_scope, reduction=self.reduction
      )
    return sum(terms.values()), terms


def attnfd_loss(
  params, state, student_features, teacher_features, *, distiller, train
):
  """AttnFD loss of two sets of feature maps, before its weight lambda.

  Pure: use it in any training step, under jit, grad, vmap or a sharded batch.

  Args:
    params: trained variables of `distiller`: student gates and connectors.
    state: its other collections, e.g. running statistics.
    student_features: tap -> [b, h, w, c].
    teacher_features: tap -> [b, h, w, c]; no gradient reaches them.
    distiller: an AttnFD module.
    train: use and update batch statistics.

  Returns:
    float32 scalar, and {'state': the new state, 'terms': {tap: scalar}}.
  """
  (loss, terms), updated = distiller.apply(
    {'params': params, **state},
    student_features,
    teacher_features,
    train=train,
    mutable=list(state),
  )
  return loss, {'state': {**state, **updated}, 'terms': terms}


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
  """

  taps: tuple[str, ...] = ('backbone', 'aspp', 'decoder')
  connector_schedule: str = 'always'

  pictures_note = (
    'Where the refined features of the teacher and of the student are strong, '
    'at the taps where they are compared.'
  )

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
