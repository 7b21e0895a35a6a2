# SPDX-License-Identifier: Apache-2.0
"""Structured knowledge distillation (SKD; Liu et al., arXiv 1903.04197).

The pair-wise term compares the similarity of all pairs of positions of a
feature map. The holistic term is adversarial: a discriminator learns to tell
logits of the teacher from those of the student, which learns to fool it. The
authors' pixel-wise term is KD: 'kd+skd'.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from attnfd_jax.distill import adversarial
from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.discriminator import Discriminator
from attnfd_jax.distill.method import LossAndTerms, Scalar, Step
from attnfd_jax.distill.pooling import max_pool
from attnfd_jax.distill.vectors import unit
from attnfd_jax.errors import check_choice, check_range, InputError
from attnfd_jax.losses import Labels, Mean
from attnfd_jax.models import layers
from attnfd_jax.models.network import Outputs
from attnfd_jax.types import AnyArray

OPTIMIZERS = ('adam', 'sgd')


def place_cosines(
  x: Float[AnyArray, 'b h w c'],
  kernel: Sequence[int],
  *,
  detach_norm: bool = False,
) -> Float[Array, 'b m m']:
  """Cosine similarity of all pairs of positions after max-pooling.

  Args:
    x: a feature map.
    kernel: height and width of the pooling windows.
    detach_norm: no gradient through the lengths, as in the authors' code.
  """
  x = max_pool(x.astype(layers.at_least_float32(x.dtype)), *kernel)
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  if detach_norm:
    length = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(x)), 2))
    x = x / (length + 1e-8)[..., None]
  else:
    x = unit(x, (2,))
  return jnp.einsum('bic,bjc->bij', x, x)


def pair_distance(
  student: Float[AnyArray, 'b h w c'],
  teacher: Float[AnyArray, 'b h w d'],
  kernel: Sequence[int],
  *,
  detach_norm: bool = False,
) -> Float[Array, ' b']:
  """Mean squared difference of the cosines, per image; from 0 to 4.

  >>> student, teacher = jnp.ones((1, 1, 2, 1)), jnp.array([[[[1.0], [-1.0]]]])
  >>> pair_distance(student, teacher, (1, 1)).round(3).tolist()
  [2.0]

  Args:
    student: the student's feature map.
    teacher: the teacher's feature map, which gets no gradient.
    kernel: see place_cosines.
    detach_norm: see place_cosines; for the student.
  """
  student_cosines = place_cosines(student, kernel, detach_norm=detach_norm)
  teacher_cosines = place_cosines(jax.lax.stop_gradient(teacher), kernel)
  return jnp.mean(jnp.square(student_cosines - teacher_cosines), (1, 2))


class SKD(nn.Module):
  """Both terms, with the weights of the authors' script.

  The loss is pair_weight times the pair-wise term, plus adversarial_weight
  times the student's loss for being recognized, plus discriminator_weight times
  the discriminator's loss. Each player's loss treats the other as a constant,
  so that one gradient of the sum trains both. The discriminator has its own
  optimizer. Its batch statistics are those of the batch, or with gradient
  accumulation of each part.

  Example:
    `--config.distill.method=kd+skd --config.distill.skd.game=hinge`

  Attributes:
    taps: feature maps of the pair-wise term; the terms of those that both
      networks have are added up.
    match_size: 'to_teacher' or 'to_student' if heights or widths of the maps
      differ.
    full_size: feed the discriminator logits at the size of the image. Its
      attention compares all pixels at a sixteenth and an eighth of that size.
    pair_weight: weight of the pair-wise term, 0 omits it; 0.5 in the script, 10
      in the paper and CIRKD.
    adversarial_weight: weight of the student's loss; 0.1 in the script, 1e-3 in
      IFVD and CIRKD.
    discriminator_weight: weight of the discriminator's loss; 0.1 in all three.
      If this and adversarial_weight are 0, there is no discriminator.
    pool_scale: side of a max-pooling window as a fraction of the side of the
      map, rounded down to pixels: 0.5 gives 2 x 2 positions for even sizes and
      3 x 3 for odd ones.
    pool_size: side in pixels instead of pool_scale, 2 in CIRKD; 0 is off.
    detach_norm: no gradient through the lengths of feature vectors, as in the
      authors' code.
    game: 'wgan_gp', or 'hinge' as in CIRKD, which is stable for several users
      for whom the other ended in NaN.
    penalty_weight: weight of the gradient penalty in 'wgan_gp'.
    discriminator_channels: channels of its first convolution.
    discriminator_optimizer: 'adam' with decays of 0.9 and 0.99, as in IFVD and
      CIRKD, or 'sgd' with momentum 0.9 and weight decay 5e-4, as in the script.
    discriminator_lr: its learning rate.
    discriminator_schedule: 'poly' decays the learning rate to 0 with power 0.9,
      as in SKD and IFVD; 'constant' is CIRKD's.
  """

  taps: Sequence[str] = ('aspp',)
  match_size: str = 'none'
  full_size: bool = False
  pair_weight: float = 0.5
  adversarial_weight: float = 0.1
  discriminator_weight: float = 0.1
  pool_scale: float = 0.5
  pool_size: int = 0
  detach_norm: bool = False
  game: str = 'wgan_gp'
  penalty_weight: float = 10.0
  discriminator_channels: int = 64
  discriminator_optimizer: str = 'adam'
  discriminator_lr: float = 4e-4
  discriminator_schedule: str = 'poly'

  def __post_init__(self):
    matching.check(self.taps, self.match_size)
    weights = ('pair_weight', 'adversarial_weight', 'discriminator_weight')
    for name in (*weights, 'penalty_weight', 'discriminator_lr'):
      check_range(name, getattr(self, name), 0)
    if not any(getattr(self, name) for name in weights):
      raise InputError(f'One of {", ".join(weights)} must be above 0.')
    check_range('pool_scale', self.pool_scale, 0, 1)
    check_range('pool_size', self.pool_size, 0)
    check_range('discriminator_channels', self.discriminator_channels, 1, 2**16)
    check_choice('game', self.game, adversarial.GAMES)
    optimizer = self.discriminator_optimizer
    check_choice('discriminator_optimizer', optimizer, OPTIMIZERS)
    schedule = self.discriminator_schedule
    check_choice('discriminator_schedule', schedule, ('poly', 'constant'))
    super().__post_init__()

  def parameter_groups(self) -> tuple[tuple[str, str], ...]:
    """Keeps the discriminator out of the student's optimizer."""
    return ((r'discriminator/.*', 'discriminator'),)

  def optimizers(
    self, num_steps: int
  ) -> dict[str, optax.GradientTransformation]:
    """Makes the optimizer of the discriminator."""
    rate = self.discriminator_lr
    if self.discriminator_schedule == 'poly':
      rate = optax.polynomial_schedule(rate, 0.0, 0.9, num_steps)
    if self.discriminator_optimizer == 'adam':
      return {'discriminator': optax.adam(rate, 0.9, 0.99)}
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9))
    return {'discriminator': sgd}

  @nn.compact
  def __call__(
    self,
    student: Outputs,
    teacher: Outputs,
    labels: Labels,
    *,
    train: bool,
    step: Step,
  ) -> LossAndTerms:
    """See distill/method.py; the terms are before weighting."""
    del labels, step
    terms, weighted = {}, []
    if self.pair_weight:
      terms['pair'] = self._pair_term(student, teacher)
      weighted.append(self.pair_weight * terms['pair'])
    if self.adversarial_weight or self.discriminator_weight:
      terms |= self._play(student, teacher, train=train)
      weighted += [
        self.adversarial_weight * terms['adversarial'],
        self.discriminator_weight * terms['discriminator'],
      ]
    loss = matching.total(weighted)  # One of the weights is above 0.
    # A mean over images: parts of a batch have weights by their sizes.
    images = jnp.asarray(student['logits'].shape[0], loss.dtype)
    return Mean(images * loss, images), terms

  def _pair_term(self, student: Outputs, teacher: Outputs) -> Scalar:
    maps = matching.pairs(
      student, teacher, self.taps, match_size=self.match_size
    )

    def distance(student, teacher):
      kernel = [max(int(self.pool_scale * n), 1) for n in student.shape[1:3]]
      if self.pool_size:
        kernel = [min(self.pool_size, n) for n in student.shape[1:3]]
      return jnp.mean(
        pair_distance(student, teacher, kernel, detach_norm=self.detach_norm)
      )

    return matching.total(distance(*pair) for pair in maps.values())

  def _play(
    self, student: Outputs, teacher: Outputs, *, train: bool
  ) -> dict[str, Scalar]:
    """Runs the discriminator once, and updates its statistics.

    The terms are the losses of both players, 'adversarial' and 'discriminator';
    'teacher_score', its mean score for the teacher (that for the student is
    minus 'adversarial'); and the 'penalty' of wgan_gp, part of 'discriminator'.
    """
    logits = matching.logits(student, teacher, full_size=self.full_size)
    matching.check_logits(*logits)
    student_logits, teacher_logits = matching.in_float32(*logits)
    owner = Discriminator(self.discriminator_channels, name='discriminator')
    if self.is_initializing():
      owner(student_logits, train=False)
    # A function of the parameters, since each player has its own constants.
    state = dict(owner.variables)
    params = state.pop('params')
    network = Discriminator(self.discriminator_channels, parent=None)

    def score(params, x, state):
      variables = {'params': params, **state}
      return network.apply(variables, x, train=train, mutable=list(state))

    def total(x, state):
      scores, state = score(params, x, state)
      return jnp.sum(scores), state

    # In the authors' order: each pass updates statistics and singular vectors.
    constants = jax.lax.stop_gradient(params)
    student_score, state = score(constants, student_logits, state)
    student_logits = jax.lax.stop_gradient(student_logits)
    real, state = score(params, teacher_logits, state)
    fake, state = score(params, student_logits, state)
    loss = adversarial.discriminator_loss(real, fake, self.game)
    terms = {'adversarial': -jnp.mean(student_score)}
    terms['teacher_score'] = jnp.mean(real)
    if self.game == 'wgan_gp':
      dtype = student_logits.dtype
      share = jnp.full(student_logits.shape[:1], 0.5, dtype)
      if train:
        rng = self.make_rng('distill')
        share = jax.random.uniform(rng, share.shape, share.dtype)
      between = adversarial.mixed(teacher_logits, student_logits, share)
      slopes, state = jax.grad(total, has_aux=True)(between, state)
      terms['penalty'] = adversarial.gradient_penalty(slopes)
      loss += self.penalty_weight * terms['penalty']
    terms['discriminator'] = loss
    if train and not self.is_initializing():
      for collection, tree in state.items():
        if self.is_mutable_collection(collection):
          for name, value in tree.items():
            owner.put_variable(collection, name, value)
    return terms
