# SPDX-License-Identifier: Apache-2.0
"""The annotations are checked while tests run, and the examples are true."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re

import jax.numpy as jnp
import jaxtyping
import pytest

import attnfd_jax
from attnfd_jax import distill, losses, metrics
from attnfd_jax.config import default_config, resolve

METHODS = [
  f'attnfd_jax.distill.{module.name}'
  for module in pkgutil.iter_modules(distill.__path__)
]


def test_shapes_are_checked_in_tests():
  logits, labels = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2), int)
  losses.softmax_cross_entropy(logits, labels)
  for wrong in (logits[0], logits.astype(int), logits[:, :1]):
    with pytest.raises(jaxtyping.TypeCheckError):
      losses.softmax_cross_entropy(wrong, labels)


def test_without_checks_a_wrong_shape_is_our_error(no_type_checks):
  with pytest.raises(ValueError, match='does not fit'):
    losses.softmax_cross_entropy(jnp.zeros((1, 2, 1, 3)), jnp.zeros((1, 2, 2)))


@pytest.mark.parametrize(
  'name', ['attnfd_jax.losses', 'attnfd_jax.metrics', *METHODS]
)
def test_examples(name):
  flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
  found = doctest.testmod(importlib.import_module(name), optionflags=flags)
  assert found.failed == 0


def public_functions(module):
  return [
    function
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith('_')
  ]


@pytest.mark.parametrize('module', [losses, metrics])
def test_each_public_function_has_an_example(module):
  functions = public_functions(module)
  assert len(functions) > 4
  missing = [x.__name__ for x in functions if '>>>' not in (x.__doc__ or '')]
  assert not missing


@pytest.mark.parametrize('name', attnfd_jax.METHODS)
def test_each_method_shows_how_it_is_configured(name):
  """The keys and values of the example are those of a config."""
  docstring = attnfd_jax.METHODS[name].__doc__ or ''
  settings = re.findall(r'--config\.([\w.]+)=([^\s`]+)', docstring)
  methods = dict(settings).get('distill.method', '').split('+')
  assert name in methods
  config = default_config()
  for key, value in settings:
    config.update_from_flattened_dict({key: parse(value)})
  resolve(config)


def parse(text):
  try:
    return ast.literal_eval(text.strip('"'))
  except (SyntaxError, ValueError):
    return text
