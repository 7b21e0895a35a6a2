# SPDX-License-Identifier: Apache-2.0
"""The README is the front page of the site, and links lead where they can.

Pages are written for a clone: they link to files beside docs/, which a site
does not have. Such a link becomes the path of the file; a notebook opens in
Colab, if the repository has an address.
"""

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

# Pages of the repository's root -> their place in the site.
FRONT = {
  'README.md': 'index.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CHANGELOG.md': 'changelog.md',
}
# 'owner/name', set by GitHub's runners.
REPOSITORY = os.environ.get('GITHUB_REPOSITORY')
COLAB = 'https://colab.research.google.com/github'
_LINK = re.compile(r'\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)')


def on_files(files, config):
  """Adds the pages of the root."""
  root = pathlib.Path(config.config_file_path).parent
  for name, place in FRONT.items():
    text = (root / name).read_text()
    files.append(File.generated(config, place, content=text))
  return files


def on_page_markdown(markdown, page, **_):
  """Rewrites links to files from where the page lies in the repository."""
  folder = '' if page.file.src_uri in FRONT.values() else 'docs'

  def rewrite(match):
    text, target, anchor = match[1], match[2], match[3] or ''
    if '://' in target:
      return match[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    place = FRONT.get(path)
    if path.startswith('docs/'):
      place = path.removeprefix('docs/')
    if place:
      return f'[{text}]({place}{anchor})'
    if path.endswith('.ipynb') and REPOSITORY:
      return f'[{text}]({COLAB}/{REPOSITORY}/blob/main/{path})'
    name = text.strip('`')
    return text if name in path and '/' in name else f'{text} (`{path}`)'

  return _LINK.sub(rewrite, markdown)
