# SPDX-License-Identifier: Apache-2.0
"""Networks by name, and what a network of the user's is held to."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnfd_jax import losses, user_code
from attnfd_jax.config import default_config
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models import resizing
from attnfd_jax.training import step as steps

CODE = """
import flax.linen as nn

class Net(nn.Module):
  num_classes: int
  dtype: object = None
  width: int = 4

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Conv(self.num_classes, (1, 1))(image)
    return {'logits': x, 'features': {}}
"""


class Answer(nn.Module):
  """Logits resized in one of several ways, or wrong outputs."""

  num_classes: int
  kind: str = 'aligned'

  @nn.compact
  def __call__(self, image, *, train):
    del train
    b, h, w, _ = image.shape
    coarse = nn.Conv(self.num_classes, (4, 4), (4, 4))(image)
    features = {'map': coarse}
    if self.kind == 'half-pixel':
      logits = jax.image.resize(coarse, (b, h, w, self.num_classes), 'linear')
    else:
      logits = resizing.resize(coarse, h, w)
    out = {'logits': logits, 'coarse_logits': coarse, 'features': features}
    if self.kind == 'small':
      out['logits'] = coarse
    if self.kind == 'tuple':
      return logits, features
    if self.kind == 'vector':
      out['features'] = {'map': jnp.mean(coarse, (1, 2))}
    if self.kind == 'no map':
      out['features'] = None
    if self.kind == 'list':
      out['features'] = {'map': [coarse]}
    if self.kind == 'raises':
      raise ValueError('sides must be multiples of 5')
    if self.kind == 'typo':
      return self.logitz
    return out


def test_networks_of_ours_and_of_files(tmp_path):
  config = default_config()
  network = networks.make_network(config.student, 5)
  assert networks.is_ours(network) and network.backbone == 'resnet18'
  assert networks.describe(config.student) == 'resnet18'
  (tmp_path / 'net.py').write_text(CODE)
  config.student.network = f'{tmp_path}/net.py:Net'
  config.student.options = {'width': 8}
  network = networks.make_network(config.student, 5, aspp_dropout=0.0)
  assert (network.width, network.num_classes) == (8, 5)
  assert not networks.is_ours(network)
  assert networks.describe(config.student) == 'Net'
  # One class for one content, so that compiled programs are shared.
  assert network == networks.make_network(config.student, 5)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('unet', "network='unet' must be one of deeplabv3plus.* or 'file.py:Cla"),
    ('none.py:Net', 'there is no file none.py'),
    ('{}/net.py:Nat', 'net.py has no Nat'),
    ('{}/bad.py:Net', 'it raised NameError: .*see where with --debug'),
    ('no_package:Net', 'it raised ModuleNotFoundError'),
    ('{}/net.py:Net', "unexpected keyword argument 'wdth'"),
  ],
)
def test_what_cannot_be_built_is_refused(tmp_path, spec, message):
  (tmp_path / 'net.py').write_text(CODE)
  (tmp_path / 'bad.py').write_text('x = undefined')
  config = default_config()
  config.student.network = spec.format(tmp_path)
  config.student.options = {'wdth': 8}
  with pytest.raises(InputError, match=message):
    networks.make_network(config.student, 5)


def test_a_network_that_keeps_the_contract_passes():
  networks.check_network(Answer(3), 3, (32, 48))


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('half-pixel', "not the align-corners resize.*leave 'coarse_logits' out"),
    ('small', r'logits are \(2, 8, 12, 3\), expected \(2, 32, 48, 3\)'),
    ('tuple', "must return a dict with 'logits' and 'features'"),
    ('vector', r"map 'map' is \(2, 3\), not \[b, h, w, c\]"),
    ('no map', "must return a dict with 'logits' and 'features'"),
    ('list', r"map 'map' is \[.*\], not \[b, h, w, c\]"),
    ('raises', r'fails on images \(32, 48\): sides must be multiples of 5'),
    ('typo', 'fails on images .*: AttributeError .*logitz'),
  ],
)
def test_what_breaks_the_contract_is_named(kind, message):
  with pytest.raises(InputError, match=message):
    networks.check_network(Answer(3, kind), 3, (32, 48))


class WithoutCoarse(Answer):
  """Of the half-pixel kind, as the contract wants it."""

  @nn.compact
  def __call__(self, image, *, train):
    out = super().__call__(image, train=train)
    out.pop('coarse_logits')
    return out


def test_large_logits_of_another_upsampling_have_their_own_loss(monkeypatch):
  """Above LARGE_LOGITS the loss is taken in parts of the aligned resize, which
  these logits are not.
  """
  monkeypatch.setattr(steps, 'LARGE_LOGITS', 1)
  network = WithoutCoarse(3, 'half-pixel')
  generator = np.random.default_rng(0)
  image = generator.normal(size=(2, 32, 32, 3)).astype(np.float32)
  label = generator.integers(0, 3, (2, 32, 32)).astype(np.uint8)
  variables = network.init(jax.random.key(0), image, train=False)
  out = network.apply(variables, image, train=False)
  expected = losses.softmax_cross_entropy(out['logits'], label).value
  tx, mesh = optax.sgd(0.1), sharding.make_mesh(1)
  step = steps.make_train_step(
    network,
    tx,
    task_loss=lambda *x: {'ce': losses.softmax_cross_entropy(*x)},
    plain_cross_entropy=True,
    schedule=lambda step: 0.1,
    mesh=mesh,
  )
  state = steps.make_state({'student': variables}, tx, ema=False)
  batch = jax.device_put(
    {'image': image, 'label': label}, sharding.by_batch(mesh)
  )
  _, metrics = step(state, {}, batch, jax.random.key(0))
  np.testing.assert_allclose(metrics['ce'], expected, rtol=1e-5)


def test_the_bytes_that_were_hashed_are_run(tmp_path):
  """Python would take compiled code beside the file, unread, in their place."""
  path = tmp_path / 'net.py'
  path.write_text(CODE)
  spec = f'{path}:Net'
  first = user_code.load_object(spec, option='network')
  assert first is user_code.load_object(spec, option='network')
  assert [x.name for x in tmp_path.iterdir()] == ['net.py']
  path.write_text(CODE.replace('width: int = 4', 'width: int = 5'))
  assert user_code.load_object(spec, option='network')(2).width == 5
