# SPDX-License-Identifier: Apache-2.0
"""Structured knowledge distillation (SKD; Liu et al., arXiv 1903.04197).

Pair-wise: how alike any two places of a map are. Holistic: a discriminator
learns to tell logits of the teacher from those of the student, which learns to
deceive it. Their pixel-wise term is KD: 'kd+skd'.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from attnfd_jax.distill import adversarial
from attnfd_jax.distill import taps as matching
from attnfd_jax.distill.discriminator import Discriminator
from attnfd_jax.distill.pooling import max_pool
from attnfd_jax.distill.vectors import unit
from attnfd_jax.errors import InputError, one_of, within
from attnfd_jax.losses import Mean
from attnfd_jax.models import layers

OPTIMIZERS = ('adam', 'sgd')


def place_cosines(x, kernel, *, detach_norm=False):
  """Cosines of any two places of a map after pooling: [b, m, m].

  Args:
    x: [b, h, w, c].
    kernel: height and width of the windows of which a place is the maximum.
    detach_norm: lengths are constants to the gradient, as in the authors' code.
  """
  x = max_pool(x.astype(layers.at_least_float32(x.dtype)), *kernel)
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  if detach_norm:
    length = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(x)), 2))
    x = x / (length + 1e-8)[..., None]
  else:
    x = unit(x, (2,))
  return jnp.einsum('bic,bjc->bij', x, x)


def pair_distance(student, teacher, kernel, *, detach_norm=False):
  """Of each image, the mean squared difference of its cosines, [b], 0 to 4.

  Of maps [b, h, w, c], channels may differ; the teacher's is a constant.
  """
  ours = place_cosines(student, kernel, detach_norm=detach_norm)
  theirs = place_cosines(jax.lax.stop_gradient(teacher), kernel)
  return jnp.mean(jnp.square(ours - theirs), (1, 2))


class SKD(nn.Module):
  """Both terms with the weights of the authors' script; 0 leaves one out.

  The loss is pair_weight times the pair-wise term, adversarial_weight times
  what the student has to gain by deceiving, discriminator_weight times what
  the discriminator has to lose. Each player's term sees the other as a
  constant, so that one gradient of the sum trains both. The discriminator has
  an optimizer of its own. Its statistics are over the batch, or the part of it
  that is computed at a time.

  Attributes:
    taps: maps of the pair-wise term; those that both networks have, their
      terms are added.
    match_size: 'to_teacher' or 'to_student' where heights or widths of the maps
      of a tap differ.
    full_size: give the discriminator logits of the size of the image. Its
      attention compares all pixels of a sixteenth and an eighth of that size.
    pair_weight: the script has 0.5, the paper and CIRKD 10.
    adversarial_weight, discriminator_weight: 0.1 both; IFVD and CIRKD have
      1e-3 and 0.1.
    pool_scale: side of a window for max-pooling over that of the map, rounded
      down to pixels: 2 x 2 places for even sizes, 3 x 3 for odd ones.
    pool_size: side in pixels in place of pool_scale, 2 in CIRKD; 0 is off.
    detach_norm: lengths of features have no gradient, as in the authors' code.
    game: 'wgan_gp', or 'hinge' as in CIRKD, which several users found stable
      where the other ended in NaN.
    penalty_weight: of the gradient penalty in 'wgan_gp'.
    discriminator_channels: of its first convolution.
    discriminator_optimizer: 'adam' with decays 0.9 and 0.99, as in IFVD and
      CIRKD, or 'sgd' with momentum 0.9 and weight decay 5e-4, as SKD's script.
    discriminator_lr: its learning rate.
    discriminator_schedule: 'poly', the rate falls by poly 0.9 to 0 at the end,
      as in SKD and IFVD; or 'constant', as in CIRKD.
  """

  taps: tuple[str, ...] = ('aspp',)
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
      within(name, getattr(self, name), 0)
    if not any(getattr(self, name) for name in weights):
      raise InputError(f'One of {", ".join(weights)} must be above 0.')
    within('pool_scale', self.pool_scale, 0, 1)
    within('pool_size', self.pool_size, 0)
    within('discriminator_channels', self.discriminator_channels, 1, 2**16)
    one_of('game', self.game, adversarial.GAMES)
    optimizer = self.discriminator_optimizer
    one_of('discriminator_optimizer', optimizer, OPTIMIZERS)
    schedule = self.discriminator_schedule
    one_of('discriminator_schedule', schedule, ('poly', 'constant'))
    super().__post_init__()

  def parameter_groups(self):
    """The student's optimizer, and its weight decay, leave it alone."""
    return ((r'discriminator/.*', 'discriminator'),)

  def optimizers(self, num_steps):
    """That of the discriminator."""
    rate = self.discriminator_lr
    if self.discriminator_schedule == 'poly':
      rate = optax.polynomial_schedule(rate, 0.0, 0.9, num_steps)
    if self.discriminator_optimizer == 'adam':
      return {'discriminator': optax.adam(rate, 0.9, 0.99)}
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9))
    return {'discriminator': sgd}

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """See distill/method.py; terms before their weights."""
    del labels, step
    terms, loss = {}, 0.0
    if self.pair_weight:
      terms['pair'] = self._pair_term(student, teacher)
      loss += self.pair_weight * terms['pair']
    if self.adversarial_weight or self.discriminator_weight:
      terms |= self._play(student, teacher, train=train)
      loss += self.adversarial_weight * terms['adversarial']
      loss += self.discriminator_weight * terms['discriminator']
    # Means over images: parts of a batch weigh by how many they have.
    images = jnp.asarray(student['logits'].shape[0], loss.dtype)
    return Mean(images * loss, images), terms

  def _pair_term(self, student, teacher):
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

    return sum(distance(*pair) for pair in maps.values())

  def _play(self, student, teacher, *, train):
    """Both players' terms; 'teacher_score', the mean over the teacher's logits
    (that over the student's is minus 'adversarial'); the 'penalty' of wgan_gp,
    which is a part of 'discriminator'.
    """
    logits = matching.logits(student, teacher, full_size=self.full_size)
    matching.check_logits(*logits)
    ours, theirs = matching.in_float32(*logits)
    owner = Discriminator(self.discriminator_channels, name='discriminator')
    if self.is_initializing():
      owner(ours, train=False)
    # As a function of its parameters: each player needs its own constants.
    state = dict(owner.variables)
    params = state.pop('params')
    network = Discriminator(self.discriminator_channels, parent=None)

    def score(params, x, state):
      variables = {'params': params, **state}
      return network.apply(variables, x, train=train, mutable=list(state))

    def total(x, state):
      scores, state = score(params, x, state)
      return jnp.sum(scores), state

    # In the order of the authors: statistics and singular vectors move once in
    # each pass.
    deceived, state = score(jax.lax.stop_gradient(params), ours, state)
    ours = jax.lax.stop_gradient(ours)
    real, state = score(params, theirs, state)
    fake, state = score(params, ours, state)
    loss = adversarial.discriminator_loss(real, fake, self.game)
    terms = {'adversarial': -jnp.mean(deceived)}
    terms['teacher_score'] = jnp.mean(real)
    if self.game == 'wgan_gp':
      share = jnp.full(ours.shape[:1], 0.5, ours.dtype)
      if train:
        rng = self.make_rng('distill')
        share = jax.random.uniform(rng, share.shape, share.dtype)
      between = adversarial.mixed(theirs, ours, share)
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
