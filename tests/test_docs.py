# SPDX-License-Identifier: Apache-2.0
"""What the pages say is so: their Python runs, and what they name exists."""

import importlib.util
import json
import pathlib
import pkgutil
import re

import jax
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.config import default_config

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'experiments').glob('*.ipynb'))
PAGES = [
  *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
  *sorted((ROOT / 'docs').glob('*.md')),
  *sorted((ROOT / 'experiments').glob('*/README.md')),
  *NOTEBOOKS,
]
each_page = pytest.mark.parametrize(
  'page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
each_notebook = pytest.mark.parametrize(
  'notebook', NOTEBOOKS, ids=lambda page: page.name
)


@pytest.fixture(autouse=True)
def quick_compilation():
  """Programs that run a few times are not worth optimizing."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def read(page):
  """Text of a page; of a notebook that of its cells."""
  if page not in NOTEBOOKS:
    return page.read_text()
  cells = json.loads(page.read_text())['cells']
  return '\n\n'.join(''.join(cell['source']) for cell in cells)


def python_blocks(name):
  text = (ROOT / name).read_text()
  return re.findall(r'^```python\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def run(block):
  namespace = {}
  exec(compile(block, 'block', 'exec'), namespace)
  return namespace


def test_readme_loss():
  (block,) = python_blocks('README.md')
  found = run(block)
  # 2 - 2 cos of maps that have nothing in common.
  assert 1.5 < found['loss'] < 2.5
  grads, student_grads = found['gradients']
  assert np.any(student_grads['last'])
  assert grads.keys() == found['params'].keys()
  assert found['state'].keys() == found['aux']['state'].keys()


def test_example_of_the_functional_api_learns():
  example, *_ = python_blocks('docs/functional_api.md')
  losses = run(example)['losses']
  assert np.all(np.isfinite(losses))
  assert losses[-1] < 0.8 * losses[0]


def test_methods_networks_and_metrics_of_the_functional_api():
  _, *blocks = python_blocks('docs/functional_api.md')
  assert len(blocks) == 2
  for block in blocks:
    run(block)  # It asserts by itself.


@pytest.mark.parametrize(
  'command',
  [
    'pip install -e . && python -m attnfd_jax.main '
    '--config=configs/quickstart.py',
    "pip install -e '.[test]' && pytest",
  ],
  ids=['main', 'tests'],
)
def test_readme_has_the_commands_of_ci_once(command):
  lines = (ROOT / 'README.md').read_text().splitlines()
  assert lines.count(command) == 1
  # CI takes the first line that starts so.
  assert sum(line.startswith('pip install -e') for line in lines) == 2


@each_page
def test_links_lead_to_files(page):
  targets = re.findall(r'\]\(([^)\s]+)\)', read(page))
  local = [target for target in targets if '://' not in target]
  missing = [t for t in local if not (page.parent / t.split('#')[0]).exists()]
  assert not missing


@each_page
def test_commands_and_configs_exist(page):
  # What a diff adds, test_extending.py has.
  text = re.sub(r'^```diff.*?^```$', '', read(page), flags=re.S | re.M)
  # In notebooks attnfd('main', ...), and attnfd( at the end of a line.
  verbs = re.findall(r"(?:python -m attnfd_jax\.|attnfd\(\s*')(\w+)", text)
  for verb in verbs:
    assert (ROOT / 'attnfd_jax' / f'{verb}.py').is_file(), verb
  for name, variant in re.findall(r'\bconfigs/(\w+)\.py(?::(\w+))?', text):
    path = ROOT / 'configs' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_config(variant or None)


@each_page
def test_keys_exist(page):
  config, text = default_config(), read(page)
  groups = '|'.join(key for key in config if hasattr(config[key], 'keys'))
  keys = re.findall(r'--config\.([\w.]*\w)', text)
  # `teacher.py` and `student.onnx` are files.
  keys += re.findall(rf'`((?:{groups})(?:\.(?!py`|onnx`)\w+)+)`', text)
  for key in keys:
    value = config
    for part in key.split('.'):
      assert part in value, key
      value = value[part]


@each_notebook
def test_notebooks_are_stripped_and_compile(notebook):
  """tests_notebooks/ executes them; here without Jupyter."""
  content = json.loads(notebook.read_text())
  assert (content['nbformat'], content['nbformat_minor']) == (4, 5)
  assert content['metadata']['kernelspec']['name'] == 'python3'
  assert (
    'SPDX-License-Identifier: Apache-2.0' in content['cells'][0]['source'][0]
  )
  ids = [cell['id'] for cell in content['cells']]
  assert len(set(ids)) == len(ids)
  code = [cell for cell in content['cells'] if cell['cell_type'] == 'code']
  for cell in code:
    assert cell['outputs'] == [] and cell['execution_count'] is None
    compile(''.join(cell['source']), cell['id'], 'exec')
  # The cell after which a test puts its own values.
  assert code[0]['metadata'] == {'tags': ['parameters']}


def test_every_page_is_in_the_site():
  # mkdocs tells the reverse, and dead links to headings.
  text = (ROOT / 'mkdocs.yml').read_text()
  listed = re.findall(r': (\w+\.md)$', text, re.MULTILINE)
  pages = {path.name for path in (ROOT / 'docs').glob('*.md')}
  assert {*listed} == pages | {'index.md', 'contributing.md', 'changelog.md'}


def test_api_has_all_that_the_package_exports():
  text = (ROOT / 'docs' / 'api.md').read_text()
  names = re.findall(r'^::: ([\w.]+)$', text, re.MULTILINE)
  # A name that does not exist fails here.
  documented = [pkgutil.resolve_name(name) for name in names]
  for name in attnfd_jax.__all__:
    exported = getattr(attnfd_jax, name)
    assert any(exported is found for found in documented), name
