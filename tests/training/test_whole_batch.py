# SPDX-License-Identifier: Apache-2.0
"""A batch in parts has the loss and the gradient of the whole batch."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from attnfd_jax import distill
from attnfd_jax.config import default_config, resolve
from attnfd_jax.devices import sharding
from attnfd_jax.models import layers, resizing
from attnfd_jax.teachers.teacher import FrozenNetwork
from attnfd_jax.training import task_loss
from attnfd_jax.training.step import make_state, make_train_step

SIZE = (16, 16)


class Tiny(nn.Module):
  """Two maps and logits; with `norm` the statistics couple the images."""

  num_classes: int
  norm: bool = False
  dtype: None = None

  @nn.compact
  def __call__(self, image, *, train):
    x = layers.Conv(4, 3, 4, name='conv')(image)
    if self.norm:
      x = layers.BatchNorm(name='bn')(x, train=train)
    coarse = layers.Conv(self.num_classes, 1, name='classifier')(x)
    logits = resizing.resize(coarse, *image.shape[1:3])
    features = {'aspp': x, 'decoder': nn.relu(x)}
    return {'logits': logits, 'coarse_logits': coarse, 'features': features}


def make_batch(*, uneven=False, twice=False):
  """Eight images; with `twice` any two parts of the batch are the same."""
  generator = np.random.default_rng(0)
  image = generator.normal(size=(8, *SIZE, 3)).astype(np.float32)
  label = generator.integers(0, 3, (8, *SIZE)).astype(np.uint8)
  if uneven:  # Of images 0, 2, 4 and 6, the first of two parts.
    label[::2, 2:] = 255
  if twice:
    image, label = (np.repeat(x[:4], 2, 0) for x in (image, label))
  return {'image': image, 'label': label}


def one_step(recipe, method, batch, *, accumulate, norm=False, loss='ce'):
  """Metrics and updated params of one SGD step at rate 1."""
  config = default_config()
  config.recipe, config.distill.method, config.loss.name = recipe, method, loss
  config = resolve(config)
  student, other = Tiny(3, norm), Tiny(3, norm)
  image = batch['image'][:1]
  variables, teacher_variables = (
    x.init(jax.random.key(i), image, train=False)
    for i, x in enumerate((student, other))
  )
  teacher = FrozenNetwork(other, teacher_variables, 'tiny', ('a', 'b', 'c'))
  distiller = distill.make_distiller(
    config.distill.method, config.distill
  ).adapted(student, teacher)
  outputs = student.apply(variables, image, train=False)
  gates = distill.init_distiller(distiller, [outputs, outputs])
  tx = optax.sgd(1.0)
  mesh = sharding.make_mesh(2)
  step = make_train_step(
    student,
    tx,
    task_loss=task_loss.make_task_loss(config.loss),
    plain_cross_entropy=task_loss.is_plain(config.loss),
    teacher=teacher,
    distiller=distiller,
    schedule=lambda step: 1.0,
    mesh=mesh,
    ce_batch_division=config.distill.ce_batch_division,
    accumulate=accumulate,
  )
  state = make_state({'student': variables, 'distiller': gates}, tx, ema=False)
  batch = jax.device_put(batch, sharding.by_batch(mesh))
  state, metrics = step(state, teacher_variables, batch, jax.random.key(0))
  return jax.device_get(metrics), jax.device_get(state.params)


def assert_same(whole, parts):
  for name in whole[0]:
    np.testing.assert_allclose(
      parts[0][name], whole[0][name], rtol=1e-5, atol=1e-7, err_msg=name
    )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    parts[1],
    whole[1],
  )


@pytest.mark.parametrize('loss', ['ce', 'focal', 'ohem'])
@pytest.mark.parametrize('recipe', ['clean', 'reference'])
def test_uneven_ignored_pixels_weigh_the_same(recipe, loss):
  """Before, means of parts were averaged, each over its own pixels.

  OHEM with all pixels kept: which are hard is decided in each part.
  """
  batch = make_batch(uneven=True)
  whole, parts = (
    one_step(recipe, 'kd', batch, accumulate=n, loss=loss) for n in (1, 2)
  )
  if loss != 'ohem':
    assert_same(whole, parts)
  else:  # Counts depend on the logits here: only divided once.
    assert np.isfinite(parts[0]['loss'])
    ratio = parts[0]['loss'] / whole[0]['loss']
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize('accumulate', [2, 4])
@pytest.mark.parametrize('recipe', ['clean', 'reference'])
def test_equal_parts_are_the_whole_batch(recipe, accumulate):
  """Statistics and norms of a part are those of the batch here; before, the
  loss of the reference was multiplied by the number of parts.
  """
  batch = make_batch(twice=True)
  if accumulate == 4:
    batch = {name: np.repeat(x[::4], 4, 0) for name, x in batch.items()}
  whole, parts = (
    one_step(recipe, 'attnfd+kd', batch, accumulate=n, norm=True)
    for n in (1, accumulate)
  )
  assert_same(whole, parts)
