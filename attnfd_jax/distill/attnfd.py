# SPDX-License-Identifier: Apache-2.0
"""Attention-guided feature distillation (AttnFD, arXiv 2403.05451).

At every tap k, with student map S, teacher map T, attention A and connector
phi (1x1 convolution and batch normalization):

  s = phi(A_student(S)),  t = A_teacher(T),
  loss = sum over k of || s / ||s|| - t / ||t|| ||^2 / b

where the norm ||.|| is over the whole batch (the authors' distiller.py:40-51).
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.method import (
  CONNECTOR_SCHEDULES,
  LossAndTerms,
  Scalar,
  Step,
)
from attnfd_jax.errors import check_choice, InputError
from attnfd_jax.losses import Labels
from attnfd_jax.models import layers, resizing
from attnfd_jax.models.attention import CBAM
from attnfd_jax.models.network import FeatureMaps, Outputs
from attnfd_jax.types import AnyArray, PyTree, Variables

# Axes of [b, h, w, c] that are jointly scaled to unit length.
NORM_AXES = {
  'batch': (0, 1, 2, 3),
  'image': (1, 2, 3),
  'pixel': (3,),
  'channel': (1, 2),
}
# Kinds of teacher gates with parameters.
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
# A map with a smaller squared length counts as zero.
TINY = 1e-12


def unit(
  x: Float[AnyArray, '*shape'], axes: tuple[int, ...]
) -> Float[Array, '*shape']:
  """Scales x to length 1 over `axes`, in at least float32; zeros stay zeros.

  The authors divide by the plain norm, which gives NaN for a map of zeros.

  >>> unit(jnp.array([3.0, 4.0]), (0,)).round(3).tolist()
  [0.6..., 0.8...]
  """
  x = x.astype(layers.at_least_float32(x.dtype))
  square = jnp.sum(jnp.square(x), axes, keepdims=True)
  has_length = square > TINY
  scale = jax.lax.rsqrt(jnp.where(has_length, square, 1))
  return jnp.multiply(x, jnp.where(has_length, scale, 0))


def direction_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w c'],
  *,
  norm_scope: str,
  reduction: str,
) -> Scalar:
  """Squared distance of two feature maps after scaling to unit length.

  With the cosine of each pair of unit vectors, a distance is 2 - 2 cos. Finite
  also for maps of zeros.

  >>> x, options = jnp.ones((3, 1, 1, 4)), {'norm_scope': 'pixel'}
  >>> float(direction_distance(x, -x, **options, reduction='unitmean'))
  4.0

  Args:
    student: the student's map.
    teacher: the teacher's map, which gets no gradient.
    norm_scope: key of NORM_AXES; 'batch' spans all devices.
    reduction: 'batchmean' divides the sum of the distances by b, 'unitmean' by
      the number of unit vectors, 'mean' by the number of elements.
  """
  axes = NORM_AXES[norm_scope]
  target = jax.lax.stop_gradient(unit(teacher, axes))
  distance = jnp.sum(jnp.square(unit(student, axes) - target))
  b, size = student.shape[0], student.size
  units = size // math.prod(student.shape[axis] for axis in axes)
  divisor = {'batchmean': b, 'unitmean': units, 'mean': size}
  return distance / divisor[reduction]


class Connector(nn.Module):
  """1x1 convolution and batch normalization to the teacher's channels."""

  features: int

  @nn.compact
  def __call__(
    self, x: Float[AnyArray, 'b h w c'], *, train: bool
  ) -> Float[Array, 'b h w {self.features}']:
    """Maps the channels to `features`."""
    init = layers.fan_out_normal  # N(0, 2 / c_teacher), distiller.py:10-22.
    conv_norm = layers.ConvNorm(
      self.features, 1, kernel_init=init, dtype=x.dtype, name='conv_norm'
    )
    return conv_norm(x, train=train)


class AttnFDOptions(nn.Module, kw_only=True):
  """Options that AttnFD and AttnFDMethod share, described at AttnFD."""

  teacher_attention: str = 'parameter_free'
  student_attention: str = 'learnable'
  norm_scope: str = 'batch'
  reduction: str = 'unitmean'
  teacher_bn: str = 'running'
  match_size: str = 'none'
  fan_out_taps: Sequence[str] = ()

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if hasattr(self, name):
        check_choice(name, getattr(self, name), choices)
    super().__post_init__()


class AttnFD(AttnFDOptions):
  """Attention gates, connectors and the distance of refined maps.

  Attributes:
    student_channels: channels of the student's map at each tap.
    teacher_channels: channels of the teacher's map at the same taps.
    teacher_attention: 'checkpoint' or 'random': frozen CBAMs in the collection
      'teacher', for 'checkpoint' to be replaced by stored ones;
      'parameter_free'; 'in_path' if the teacher itself has refined the maps;
      'none'. The last three have no parameters and no such collection.
    student_attention: 'learnable', 'mlp_frozen' (the authors' optimizer never
      updates the MLP of the channel gate), 'parameter_free' or 'none'.
    norm_scope: see `direction_distance`.
    reduction: see `direction_distance`.
    teacher_bn: 'running' or 'batch' statistics in the teacher's gates during
      training; the update is discarded.
    match_size: if heights or widths differ, 'to_teacher' or 'to_student'
      resizes the other map before the distance; 'none' raises an error.
    fan_out_taps: taps whose spatial gate is initialized as a ResNet
      convolution.
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
    """Creates gates, connectors and the collection 'teacher'."""
    taps, channels = sorted(self.student_channels), self.teacher_channels
    if self.student_attention != 'none':
      self.student_gates = {
        tap: self._gate(tap, self.student_attention) for tap in taps
      }
    self.connectors = {tap: Connector(channels[tap]) for tap in taps}
    # The teacher's gates are constants, so they are not in 'params'.
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

  def _gate(self, tap: str, attention: str, **options: Any) -> CBAM:
    fan_out = tap in self.fan_out_taps
    return CBAM(
      parameter_free=attention == 'parameter_free',
      freeze_mlp=attention == 'mlp_frozen',
      spatial_init=layers.fan_out_normal if fan_out else layers.fan_in_normal,
      **options,
    )

  def _check(
    self, student_features: FeatureMaps, teacher_features: FeatureMaps
  ) -> None:
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
      student, teacher = (
        student_features[tap].shape,
        teacher_features[tap].shape,
      )
      if student[0] != teacher[0]:
        raise ValueError(f'Batches differ at {tap!r}: {student} and {teacher}.')
      if self.match_size == 'none' and student[1:3] != teacher[1:3]:
        raise ValueError(
          f'Sizes differ at {tap!r}: student {student}, teacher {teacher}. '
          "Pass match_size='to_teacher' or 'to_student' to resize."
        )

  def refined_maps(
    self,
    student_features: FeatureMaps,
    teacher_features: FeatureMaps,
    *,
    train: bool,
  ) -> tuple[FeatureMaps, FeatureMaps]:
    """Applies attention to the maps of both networks."""
    self._check(student_features, teacher_features)
    students, teachers = {}, {}
    for tap in sorted(self.student_channels):
      student_map, teacher_map = student_features[tap], teacher_features[tap]
      if self.student_attention != 'none':
        student_map = self.student_gates[tap](student_map, train=train)
      if self.teacher_attention in (*STORED, 'parameter_free'):
        gate = self._gate(tap, self.teacher_attention, parent=None)
        variables = {k: x.value[tap] for k, x in self.teacher_variables.items()}
        batch = train and self.teacher_bn == 'batch'
        teacher_map = gate.apply(variables, teacher_map, train=batch)
      students[tap], teachers[tap] = student_map, teacher_map
    return students, jax.lax.stop_gradient(teachers)

  def __call__(
    self,
    student_features: FeatureMaps,
    teacher_features: FeatureMaps,
    *,
    train: bool,
  ) -> tuple[Scalar, dict[str, Scalar]]:
    """Computes the sum over the taps, and the term of each; see `attnfd_loss`.

    Raises:
      ValueError: if a map is missing or has a wrong shape.
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
    return matching.total(terms.values()), terms


def attnfd_loss(
  params: PyTree,
  state: Variables,
  student_features: FeatureMaps,
  teacher_features: FeatureMaps,
  *,
  distiller: AttnFD,
  train: bool,
) -> tuple[Scalar, dict[str, Any]]:
  """AttnFD loss of two sets of feature maps, before its weight lambda.

  A pure function: use it in any training step, under jit, grad, vmap or with a
  sharded batch. docs/functional_api.md has an example.

  Args:
    params: trained parameters of `distiller`: student gates and connectors.
    state: its other collections, e.g. running statistics.
    student_features: the student's maps by tap.
    teacher_features: the teacher's maps by tap, which get no gradient.
    distiller: the module.
    train: whether to use and update batch statistics.

  Returns:
    The loss, and {'state': the new state, 'terms': the loss of each tap}.
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
  """AttnFD at the taps that two networks share.

  The other options are described at AttnFD.

  Example:
    `--config.distill.method=attnfd --config.distill.attnfd.norm_scope=image`

  Attributes:
    taps: names of feature maps; those that both networks have are compared.
    teacher_attention: see AttnFD. `adapted` replaces what the teacher does not
      have: 'in_path' becomes 'parameter_free' for a teacher without trained
      gates; 'checkpoint' becomes 'random' for one without stored gates, as
      after the authors' own training.
    connector_schedule: see training/optim.py; the authors use 'first_epoch'.
  """

  taps: Sequence[str] = ('backbone', 'aspp', 'decoder')
  connector_schedule: str = 'always'

  pictures_note = (
    'Magnitude of the refined features of teacher and student at the compared '
    'taps.'
  )

  @property
  def divides_by_batch(self) -> bool:
    """Whether the distance of the one unit is divided by the batch size."""
    return self.reduction == 'batchmean' and self.norm_scope == 'batch'

  def adapted(self, student: Any, teacher: Any) -> 'AttnFDMethod':
    """Sets the teacher's attention, and the initialization of the gates.

    Args:
      student: the student network.
      teacher: a Teacher.

    Raises:
      ValueError: if teacher_attention does not fit the teacher.
    """
    attention = self.teacher_attention
    if getattr(teacher, 'in_path_attention', False):
      if attention not in ('in_path', 'checkpoint'):
        raise ValueError(
          f'teacher_attention={attention!r}, but the maps of this teacher are '
          'refined in its forward path; use in_path.'
        )
      attention = 'in_path'
    elif attention == 'in_path':
      attention = 'parameter_free'  # Untrained gates would be noise.
    elif attention == 'checkpoint' and getattr(teacher, 'gates', None) is None:
      attention = 'random'
    networks = student, getattr(teacher, 'network', None)
    backbones = [str(getattr(x, 'backbone', '')) for x in networks]
    # As in the authors' resnet.py, where all convolutions start alike.
    resnets = all(name.startswith('resnet') for name in backbones)
    taps = self.fan_out_taps or (('backbone',) if resnets else ())
    return self.clone(teacher_attention=attention, fan_out_taps=taps)

  def adopt(self, variables: Variables, teacher: Any) -> Variables:
    """Takes over the gates of the teacher's checkpoint.

    Raises:
      InputError: if they do not fit the teacher's maps.
    """
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

  def parameter_groups(self) -> tuple[tuple[str, str], ...]:
    """The authors' groups; their optimizer never updates the MLP."""
    groups = [(r'connectors_\w+/.*', 'connectors')]
    if self.student_attention == 'mlp_frozen':
      groups += [
        (r'student_gates_\w+/mlp_.*', 'frozen'),
        (r'student_gates_backbone/.*', 'backbone'),
      ]
    return tuple(groups)

  def student_attention_variables(
    self, variables: Variables
  ) -> dict[str, PyTree] | None:
    """Selects 'params' and 'batch_stats' of the student's gates by tap."""
    if self.student_attention not in ('learnable', 'mlp_frozen'):
      return None
    prefix, gates = 'student_gates_', {}
    for part in ('params', 'batch_stats'):
      names = [x for x in variables[part] if x.startswith(prefix)]
      gates[part] = {x.removeprefix(prefix): variables[part][x] for x in names}
    return gates

  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; one term for each tap."""
    del labels, step
    distiller, maps = self._distiller(student, teacher)
    return distiller(*maps, train=train)

  def pictures(
    self, student: Outputs, teacher: Outputs, *, train: bool
  ) -> dict[str, dict[str, Float[Array, 'b _h _w']]]:
    """Length of the refined vector at each pixel, by role and tap."""
    distiller, maps = self._distiller(student, teacher)
    refined = distiller.refined_maps(*maps, train=train)
    lengths = jax.tree.map(lambda x: jnp.linalg.norm(x, axis=-1), refined)
    return dict(zip(('student', 'teacher'), lengths, strict=True))

  def _distiller(
    self, student: Outputs, teacher: Outputs
  ) -> tuple[AttnFD, list[FeatureMaps]]:
    """The AttnFD in the scope of this module, and the maps of both networks."""
    maps = matching.shared(student, teacher, self.taps)
    channels = [{tap: x.shape[-1] for tap, x in side.items()} for side in maps]
    options = layers.options_of(self, AttnFDOptions)
    if self.divides_by_batch:
      options['reduction'] = 'unitmean'
    distiller = AttnFD(
      *channels,
      **options,
      # Flax accepts scopes as well.
      parent=self.scope,  # pyright: ignore[reportArgumentType]
    )
    return distiller, maps
