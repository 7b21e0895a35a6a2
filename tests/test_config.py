# SPDX-License-Identifier: Apache-2.0
"""Every config loads, resolves and builds; bad values are told in one line."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import small_run

from attnfd_jax.config import debug, default_config, RECIPES, resolve
from attnfd_jax.data import classes, synthetic
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import weights
from attnfd_jax.training import experiment
from attnfd_jax.training import stage as stages
from attnfd_jax.training.stage import make_network

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
VARIANTS = {
  'camvid': (None, 'debug', 'cpu', 'cpu_imagenet', 'imagenet'),
  'cityscapes': (None, 'debug', 'imagenet'),
  'coco': (None, 'debug'),
  'folder': (None, 'debug', 'imagenet'),
  'pascal_voc': (None, 'debug', 'imagenet'),
  'quickstart': (None, 'debug'),
}
FILES = [(name, arg) for name, args in VARIANTS.items() for arg in args]
NUM_CLASSES = {
  'camvid': len(classes.CAMVID),
  'cityscapes': len(classes.CITYSCAPES),
  'coco': len(classes.VOC),
  'folder': 2,
  'pascal_voc': len(classes.VOC),
  'quickstart': len(synthetic.CLASS_NAMES),
}
PUBLISHED = {
  'camvid': 11,
  'cityscapes': 19,
  'coco': 21,
  'folder': 2,
  'pascal_voc': 21,
  'quickstart': 9,
}


@functools.cache
def _module(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load(name, arg=None):
  return _module(name).get_config(arg)


def leaves(config, prefix=''):
  """{'group.key': value}, placeholders included."""
  found = {}
  for key, value in config.items():
    if hasattr(value, 'items'):
      found |= leaves(value, f'{prefix}{key}.')
    else:
      found[prefix + key] = value
  return found


def identify(value):
  return 'full' if value is None else str(value)


every_config = pytest.mark.parametrize(('name', 'arg'), FILES, ids=identify)


def test_all_files_are_listed():
  assert {path.stem for path in CONFIGS.glob('*.py')} == set(VARIANTS)


@every_config
def test_loads_locks_and_serializes(name, arg):
  config = load(name, arg)
  assert set(leaves(config)) == set(leaves(default_config()))
  with pytest.raises(AttributeError, match='Did you mean.*lr'):
    config.optim.lrr = 1.0
  resolved = resolve(config)
  for group in (resolved, resolved.data, resolved.distill, resolved.student):
    assert group.is_locked
  with pytest.raises(AttributeError):
    resolved.distill.teacher_bm = 'batch'
  stored = json.loads(resolved.to_json_best_effort())
  assert set(leaves(stored)) == set(leaves(resolved))
  for key, value in leaves(stored).items():
    ours = leaves(resolved)[key]
    assert value == (list(ours) if isinstance(ours, tuple) else ours), key


@every_config
def test_says_its_own_command(name, arg):
  text = _module(name).__doc__
  assert f'--config=configs/{name}.py' in text
  assert arg is None or arg in text


@every_config
def test_is_resolved_but_for_what_may_be_absent(name, arg):
  missing = {
    k for k, v in leaves(resolve(load(name, arg))).items() if v is None
  }
  assert missing == {'optim.clip_norm'}


@pytest.mark.parametrize('name', sorted(VARIANTS))
def test_unknown_variants_are_refused(name):
  with pytest.raises(ValueError, match="Unknown variant 'degub'; use .*debug"):
    load(name, 'degub')


# The full networks of the paper's data sets are the same but for their classes.
@pytest.mark.parametrize(
  ('name', 'arg'),
  [(n, a) for n, a in FILES if a or n in ('cityscapes', 'quickstart')],
  ids=identify,
)
def test_networks_build(name, arg):
  config = resolve(load(name, arg))
  assert NUM_CLASSES[name] == PUBLISHED[name]
  built = (
    networks.make_network(config.teacher, NUM_CLASSES[name]),
    make_network('distill', config, NUM_CLASSES[name]),
  )
  assert built[1].aspp_dropout == config.distill.aspp_dropout
  for network, options in zip(
    built, (config.teacher, config.student), strict=True
  ):
    variables = networks.abstract_variables(network)
    kernel = variables['params']['classifier']['kernel']
    width = options.decoder_channels
    assert kernel.shape == (1, 1, width, PUBLISHED[name])


@pytest.mark.parametrize(
  ('name', 'arg'), [x for x in FILES if 'imagenet' in str(x[1])], ids=identify
)
def test_what_starts_from_imagenet_has_weights(name, arg):
  config = resolve(load(name, arg))
  roles = config.teacher, config.student
  started = [x for x in roles if x.pretrained]
  assert started and {x.pretrained for x in started} == {weights.NAME}
  for options in started:
    assert options.backbone in weights.IMAGENET
    assert options.width_multiplier == 1
    # New layers learn faster than what is fine-tuned.
    assert options.head_lr_scale > 1
  for options in roles:
    if not options.pretrained:
      assert options.head_lr_scale == 1


def test_each_role_has_its_rate_of_the_head():
  config = load('camvid', 'cpu_imagenet')
  config.student.head_lr_scale = 3.0
  config = resolve(config)
  params = {'student': {'backbone': {'x': 1.0}, 'classifier': {'x': 1.0}}}
  for name, expected in (('teacher', 4.0), ('student', 3.0)):
    stage = stages.Stage(name, config, None, None, None, num_steps=10)
    tx = stage.make_optimizer()
    with jax.numpy_dtype_promotion('standard'):
      params = jax.tree.map(jnp.float32, params)
      updates, _ = tx.update(params, tx.init(params), params)
    moved = updates['student']
    ratio = moved['classifier']['x'] / moved['backbone']['x']
    assert ratio == pytest.approx(expected)


def test_outputs_have_the_size_of_the_crop():
  config = resolve(load('pascal_voc', 'debug'))
  network = networks.make_network(config.student, 21)
  height, width = config.data.crop_size
  image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
  out = jax.eval_shape(
    functools.partial(network.apply, train=False),
    networks.abstract_variables(network),
    image,
  )
  assert out['logits'].shape == (2, 513, 513, 21)


@pytest.mark.parametrize('recipe', sorted(RECIPES))
def test_a_recipe_fills_what_is_none_and_nothing_else(recipe):
  config = default_config()
  config.recipe = recipe
  before, after = leaves(config), leaves(resolve(config))
  empty = {key for key, value in before.items() if value is None}
  inherited = {
    f'{role}.{key}'
    for role in ('teacher', 'student')
    for key in ('num_epochs', 'lr', 'head_lr_scale')
  }
  assert empty == set(RECIPES[recipe]) | inherited | {'optim.clip_norm'}
  changed = {key for key in before if before[key] != after[key]}
  assert changed == empty - {'optim.clip_norm'}
  derived = {'data.label_pad', 'distill.aspp_dropout'}
  for key in RECIPES[recipe].keys() - derived:
    assert after[key] == RECIPES[recipe][key], key
  # The config itself stays open: flags may still change it.
  assert leaves(config) == before


def test_recipes_have_the_same_keys():
  assert set(RECIPES['clean']) == set(RECIPES['reference'])


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('distill.teacher_bn', 'batch'),
    ('distill.ce_batch_division', True),
    ('distill.aspp_dropout', 0.0),
    ('distill.attnfd.teacher_attention', 'none'),
    ('distill.kd.weight', 0.5),
    ('data.label_pad', 'background'),
    ('eval.protocol', 'reference'),
    ('student.lr', 0.5),
    ('teacher.num_epochs', 3.0),
  ],
)
def test_overrides_win(key, value):
  config = default_config()
  plain = leaves(resolve(config))
  assert plain[key] != value
  config.update_from_flattened_dict({key: value})
  changed = leaves(resolve(config))
  assert {k for k in plain if plain[k] != changed[k]} == {key}
  assert changed[key] == value


@pytest.mark.parametrize('key', ['mesh.spatial', 'batch_size', 'data.limit'])
def test_a_bool_is_no_number(key):
  config = default_config()
  with config.ignore_type():
    config.update_from_flattened_dict({key: True})
  with pytest.raises(InputError, match=f'config.{key}=True must not be True'):
    resolve(config)


@pytest.mark.parametrize(
  ('name', 'pad'),
  [
    ('pascal_voc', 'background'),
    ('coco', 'background'),
    ('cityscapes', 'ignore'),
    ('camvid', 'ignore'),
  ],
)
def test_label_pad_of_the_reference(name, pad):
  config = load(name)
  config.recipe = 'reference'
  assert resolve(config).data.label_pad == pad
  config.recipe = 'clean'
  assert resolve(config).data.label_pad == 'ignore'


def test_networks_inherit_rate_and_epochs():
  config = default_config()
  config.optim.lr, config.num_epochs, config.student.lr = 0.25, 7.0, 0.5
  config = resolve(config)
  assert (config.teacher.lr, config.student.lr) == (0.25, 0.5)
  assert (config.teacher.num_epochs, config.student.num_epochs) == (7.0, 7.0)


@pytest.mark.parametrize(
  ('recipe', 'dropped'), [('clean', 0.25), ('reference', 0.0)]
)
def test_aspp_dropout_while_distilling(recipe, dropped):
  config = default_config()
  config.recipe, config.student.aspp_dropout = recipe, 0.25
  assert resolve(config).distill.aspp_dropout == dropped


@pytest.mark.parametrize(
  'key',
  [
    *('data.root', 'data.prepared', 'data.sbd_root', 'data.decoded_cache'),
    *('teacher.checkpoint', 'student.pretrained', 'student.network'),
    *('teacher.factory', 'distill.method'),
  ],
)
def test_home_in_a_config(monkeypatch, key):
  monkeypatch.setenv('HOME', '/home/me')
  config = default_config()
  config.update_from_flattened_dict({key: '~/a b/x.py:Y'})
  plain, found = leaves(resolve(default_config())), leaves(resolve(config))
  assert {k: v for k, v in found.items() if v != plain[k]} == {
    key: '/home/me/a b/x.py:Y'
  }


def test_home_in_options_of_a_class(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  config = default_config()
  config.student.network = 'net.py:Net'
  config.student.options = {'weights': '~/w', 'width': 8, 'tilde': 'a~'}
  expected = {'weights': '/home/me/w', 'width': 8, 'tilde': 'a~'}
  assert resolve(config).student.options.to_dict() == expected


def test_debug_is_small():
  config = resolve(debug(default_config()))
  assert config.data.limit == 12
  for network in (config.teacher, config.student):
    assert network.width_multiplier <= 0.125
    assert network.num_epochs == 1.0


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('recipe', 'refrence', "='refrence' must be one of reference, clean."),
    ('data.label_pad', 'zero', "='zero' must be one of ignore, background."),
    ('eval.protocol', 'pixel', "='pixel' must be one of native, reference."),
    ('optim.dtype', 'float16', "='float16' must be one of float32, bfloat16."),
    ('optim.name', 'adam', "='adam' must be one of sgd, adamw."),
    ('distill.teacher_bn', 'both', "='both' must be one of batch, running."),
    ('loss.name', 'lovasz', "='lovasz' must be one of ce, ohem, focal, dice,"),
    ('loss.focal_gamma', -1.0, '=-1.0 must be 0 or more.'),
    (
      'stages',
      ('teacher', 'distil'),
      "=('teacher', 'distil') must be chosen from teacher, student, distill.",
    ),
    ('stages', (), '=() must be chosen from'),
    ('num_epochs', 0.0, '=0.0 must be from 1e-09 to 10000.'),
    ('optim.lr', float('nan'), '=nan must be from'),
    ('optim.lr', 0.0, '=0.0 must be 1e-30 or more.'),
    ('optim.power', -1.0, '=-1.0 must be from 0 to 100.'),
    ('eval.batch_size', 0, '=0 must be 1 or more.'),
    ('data.threads', 0, '=0 must be from 1 to 1024.'),
    ('optim.accumulate', 0, '=0 must be 1 or more.'),
    ('data.crop_size', (31, 64), '=(31, 64) must be (height, width)'),
    ('data.crop_size', (64,), '=(64,) must be (height, width)'),
    ('distill.kd.weight', -1.0, '=-1.0 must be from 0 to 1e+30.'),
    ('distill.attnfd.weight', float('inf'), '=inf must be from'),
    ('distill.kd.weight_schedule', 'cosine', "='cosine' must be one of const"),
    ('distill.aspp_dropout', 2.0, '=2.0 must be from 0 to 1.'),
  ],
  ids=str,
)
def test_bad_values(tmp_path, key, value, message):
  text = refusal(tmp_path / 'run', **{key: value})
  assert text.startswith(f'config.{key}{message}')


@pytest.mark.parametrize(
  ('group', 'key', 'value', 'message'),
  [
    ('student', 'aspp_channels', -1, 'must be from 1 to 65536'),
    ('student', 'head_dropout', 2.0, 'must be from 0 to 1'),
    ('student', 'aspp_dropout', 2.0, 'must be from 0 to 1'),
    ('teacher', 'aspp_dropout', -0.5, 'must be from 0 to 1'),
    ('teacher', 'width_multiplier', 0.0, 'must be from 0.001 to 64'),
    ('teacher', 'output_stride', 12, 'must be 8 or 16'),
    ('distill.kd', 'temperature', 0.0, 'must be from 0.001 to 1e+06'),
    ('distill.attnfd', 'norm_scope', 'row', 'must be one of batch, image'),
    ('distill.attnfd', 'connector_schedule', 'never', 'must be one of always'),
  ],
  ids=str,
)
def test_bad_values_of_networks_and_methods(
  tmp_path, group, key, value, message
):
  """Whoever uses them refuses them, chosen or not; the config has the group."""
  text = refusal(tmp_path / 'run', **{f'{group}.{key}': value})
  assert text.startswith(f'config.{group}')
  assert f'{key}={value!r} {message}' in text


@pytest.mark.parametrize('group', ['student', 'teacher'])
def test_unknown_backbones_and_networks(tmp_path, group):
  text = refusal(tmp_path / 'run', **{f'{group}.backbone': 'resnet19'})
  assert text.startswith(f'config.{group}.network=')
  assert "Unknown backbone 'resnet19'. Did you mean 'resnet1" in text
  text = refusal(tmp_path / 'run', **{f'{group}.network': 'unet'})
  assert text.startswith(f"config.{group}.network='unet' must be one of deep")


@pytest.mark.parametrize('parts', [3, 4])
def test_a_part_of_a_batch_has_two_images(tmp_path, parts):
  text = refusal(tmp_path / 'run', **{'optim.accumulate': parts})
  start = f'config.batch_size=4 over optim.accumulate={parts} must leave at'
  assert text.startswith(start)


def test_short_side_excludes_padding(tmp_path):
  changes = {'eval.short_side': 64, 'eval.size_multiple': 32}
  text = refusal(tmp_path / 'run', **changes)
  assert 'short_side needs size_multiple=1' in text


def refusal(workdir, **changes):
  """The line with which a run refuses a config before it writes anything."""
  config = small_run.make_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    experiment.train(config, workdir)
  assert '\n' not in str(error.value)
  assert not workdir.exists()
  return str(error.value)
