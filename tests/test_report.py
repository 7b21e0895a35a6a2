# SPDX-License-Identifier: Apache-2.0
"""The report: numbers, words and files, from run folders made up here."""

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from attnfd_jax.config import STAGES
from attnfd_jax.errors import InputError
from attnfd_jax.reporting import figures
from attnfd_jax.reporting.page import signed, write_report

NAMES = ('sky', 'road', 'sign <b>&', 'fence', 'car $x^2$')
PALETTE = np.arange(15, dtype=np.uint8).reshape(5, 3)
MIOU = {'teacher': 0.47, 'student': 0.412, 'distill': 0.4355}


def _write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  # The program writes sorted names; only class_names tells their order.
  path.write_text(json.dumps(content, sort_keys=True))


def make_run(folder, *, seed=0, miou=MIOU, stages=STAGES):
  """A finished run folder with seeded numbers and pictures."""
  rng = np.random.default_rng(seed)
  config = {'seed': seed, 'stages': STAGES}
  config['data'] = {'name': 'camvid', 'root': '<root>'}
  config['student'] = {'backbone': 'resnet18'}
  config['distill'] = {'attnfd': {'weight': 2.0}}
  _write_json(folder / 'config.json', config)
  image = rng.integers(0, 256, (3, 12, 16, 3), np.uint8)
  label = rng.integers(0, 5, (3, 12, 16), np.uint8)
  label[:, :2] = 255
  results = {}
  for stage in stages:
    ious = dict(zip(NAMES, rng.random(5), strict=True), fence=None)
    results[stage] = {
      'dataset': 'camvid',
      'split': 'val',
      'protocol': 'native',
      'miou': miou[stage],
      'iou_per_class': ious,
      'params': 59_339_000 if stage == 'teacher' else 16_610_000,
      'train_seconds': 3725.0,
      'test': {'miou': miou[stage] - 0.02},
      'pretrained': None,
    }
    if stage == 'distill':
      teacher = {'name': 'resnet50', 'miou': 0.47, 'source': 'stage <teacher>'}
      pictures = 'Where <features> are strong.'
      method = {'name': 'new+kd', 'title': 'New + KD', 'options': {}}
      results[stage]['method'] = method | {'pictures': pictures}
      results[stage]['teacher'] = teacher
    lines = []
    for step in range(20, 401, 20):
      terms = {'ce': 40 / step, 'grad_norm': 1e6}
      if stage == 'distill':
        terms['new'] = 1 / step
      lines.append({'kind': 'train', 'step': step, 'loss': 1.0, **terms})
      lines.append({'kind': 'eval', 'step': step, 'miou': miou[stage]})
    text = '\n'.join(map(json.dumps, lines)) + '\n{"kind": "tra'
    _write_json(folder / stage / 'config.json', {'class_names': NAMES})
    command = ['main.py', '--config=a b.py']
    _write_json(folder / stage / 'environment.json', {'command': command})
    (folder / stage / 'metrics.jsonl').write_text(text)
    arrays = {'image': image, 'label': label, 'palette': PALETTE}
    arrays['prediction'] = np.where(label == 255, 3, label)
    for name in ('low', 'map_<x>', 'deep') if stage == 'distill' else ():
      for role in ('teacher', 'student'):
        heat = rng.random((3, 3, 4)).astype(np.float16)
        arrays[f'map_{role}_{name}'] = heat
    np.savez_compressed(folder / stage / 'pictures.npz', **arrays)
  _write_json(folder / 'results.json', results)
  return folder


def _page(folders, output):
  write_report(folders, output)
  return output.read_text(encoding='utf-8')


def _words(page):
  """What a reader sees, on one line."""
  return ' '.join(html.unescape(re.sub('<[^>]*>', '', page)).split())


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  return _page([make_run(folder / 'a')], folder / 'report.html')


def test_page_has_the_numbers(page):
  text = _words(page)
  assert (
    'New + KD lifts the ResNet-18 student by +2.35 points of mIoU, '
    'from 41.20 % to 43.55 % (val, protocol native); '
    'that closes 41 % of the gap to the teacher (47.00 %). On the test split: '
    '+2.35 points. One seed'
  ) in text
  rows = re.findall(r'<tr>.*?</tr>', page, flags=re.S)
  for cell in ('Student with New + KD', '43.55', '+2.35', '41.55', '16.61'):
    assert cell in rows[3]
  assert '59.34' in rows[1] and '1:02:05' in rows[1]
  assert page.count('loading="lazy"') == 3 * (1 + 1 + 3) + 2 * 2 * (1 + 3)
  assert "python -m attnfd_jax.main '--config=a b.py'" in text
  assert page.count('total</text>') == 3 and page.count('>ce</text>') == 1
  assert '100.0 % correct' in text and '>Missing' not in page
  assert 'ResNet-50, 47.00 % mIoU, from stage <teacher>' in text


def test_class_names_stand_beside_their_colors(page):
  colors = re.findall(r'rgb\((\d+ \d+ \d+)\)"></i>([^<]*)', page)
  assert [html.unescape(name) for _, name in colors] == list(NAMES)
  assert [c for c, _ in colors] == [' '.join(map(str, c)) for c in PALETTE]


def test_a_marker_for_each_iou(page):
  chart = page[page.index('<h3>IoU per class') : page.index('<h3>Predictions')]
  rows = chart.split('class="name">')[1:]
  names = [html.unescape(row.split('</span>')[0]) for row in rows]
  assert names == list(NAMES)
  # One class is absent.
  assert [row.count('<i class="dot') for row in rows] == [3, 3, 3, 0, 3]
  assert '>–<' in rows[3] and rows[3].count('–') == 1
  ious = np.random.default_rng(0)
  ious.integers(0, 256, (3, 12, 16, 3), np.uint8)
  ious.integers(0, 5, (3, 12, 16), np.uint8)
  assert f'left:{100 * ious.random(5)[0]:.2f}%' in rows[0]


def test_maps_of_a_method(page):
  section = page[page.index('<h3>What the method compares') :]
  assert 'Where <features> are strong. From low to high.' in _words(section)
  names = re.findall(r'</i>(Teacher|Distilled): ([^<]*)<small>', section)
  order = ['low', 'map_&lt;x&gt;', 'deep']
  rows = [(role, x) for role in ('Teacher', 'Distilled') for x in order]
  assert names == rows * 2


def test_page_is_offline_and_escaped(page):
  loose = re.sub(r'xmlns(:xlink)?="[^"]*"', '', page)
  assert not re.search(r'https?:|<script|<link|@import|<\?xml', loose)
  links = re.findall(r'(?:src|href)="([^"]*)"', page)
  assert links and all(x.startswith(('data:image/', '#')) for x in links)
  assert 'sign &lt;b&gt;&amp;' in page and '&lt;root&gt;' in page
  for raw in ('<b>&', '<root>', '<x>', '<features>', '<teacher>'):
    assert raw not in page
  assert 'nan' not in re.sub(r'base64,[^"]*', '', page)


def test_same_run_same_page(page, tmp_path):
  again = _page([make_run(tmp_path / 'a')], tmp_path / 'report.html')
  folder = re.search('<dt>Folder</dt>\n<dd>(.*)</dd>', page)[1]
  assert again.replace(str(tmp_path / 'a'), folder) == page


@pytest.mark.parametrize(
  ('teacher', 'student', 'distill', 'words'),
  [
    (0.47, 0.41, 0.44, 'closes 50 % of the gap to the teacher (47.00 %)'),
    (0.47, 0.41, 0.48, 'passes the teacher (47.00 %)'),
    (0.40, 0.41, 0.42, 'the teacher (40.00 %) is no better than the student'),
    (0.47, 0.41, 0.40, 'does not help: the net student loses 1.00'),
    (0.47, 0.41, 0.40, '; the teacher has 47.00 %. '),
    (0.47, 0.41, 0.4102, 'makes no difference to the net student, from'),
    (None, 0.41, 0.44, 'from 41.00 % to 44.00 % (val, protocol native). '),
    (
      0.47,
      0.41,
      None,
      'distilled student has no score yet; finished: teacher 47.00 %',
    ),
  ],
)
def test_outcome(tmp_path, teacher, student, distill, words):
  values = zip(STAGES, (teacher, student, distill), strict=True)
  same = {'split': 'val', 'protocol': 'native'}
  results = {stage: same | {'miou': value} for stage, value in values if value}
  if distill:
    results['distill']['method'] = {'name': 'm'}
  results['student']['network'] = 'net'

  def written():
    _write_json(tmp_path / 'results.json', results)
    return _words(_page([tmp_path], tmp_path / 'report.html'))

  assert words in written()
  if student and distill:
    results['student']['protocol'] = 'reference'
    assert 'cannot be compared' in written()


def test_seeds_are_summarized(tmp_path):
  folders = []
  for i, (student, distill) in enumerate([(40, 43), (42, 44)]):
    miou = {'teacher': 0.47, 'student': student / 100, 'distill': distill / 100}
    folders.append(make_run(tmp_path / f'seed{i}', seed=i, miou=miou))
  page = _page(folders, tmp_path / 'new' / 'report.html')
  # The gain is paired by seed: 3 and 2 points.
  for text in ('47.00 ± 0.00', '41.00 ± 1.41', '43.50 ± 0.71', '+2.50 ± 0.71'):
    assert page.count(text) == (2 if text[0] == '+' else 1)  # And on test.
  assert 'Mean over 2 seeds: New + KD lifts' in _words(page)
  assert 'href="#run-2"' in page and 'differs in' not in page
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['report.html']

  # Runs with other settings are not averaged.
  config = json.loads((folders[1] / 'config.json').read_text())
  config['distill']['attnfd']['weight'] = 3.5
  _write_json(folders[1] / 'config.json', config)
  page = _page(folders, tmp_path / 'report.html')
  assert (
    'distill.attnfd.weight=3.5' in page and 'distill.attnfd.weight=2.0' in page
  )
  assert ' ± ' not in page


def test_incomplete_run_says_what_is_missing(tmp_path):
  folder = make_run(tmp_path / 'a', stages=('teacher', 'student'))
  (folder / 'student' / 'metrics.jsonl').unlink()
  (folder / 'student' / 'pictures.npz').unlink()
  (folder / 'teacher' / 'pictures.npz').write_bytes(b'PK not a file')
  page = _page([folder], tmp_path / 'report.html')
  missing = 'distill, student/metrics.jsonl, teacher/pictures.npz'
  assert f'Missing: {missing}, student/pictures.npz.' in page


def test_scores_that_are_absent(tmp_path):
  folder = make_run(tmp_path / 'a')
  results = json.loads((folder / 'results.json').read_text())
  for stage in STAGES:
    results[stage]['test'] = {'miou': None}
    results[stage]['pixel_accuracy'] = None
  results['teacher']['miou'] = None
  results['distill']['teacher']['miou'] = None
  results['student']['iou_per_class'] = dict.fromkeys(NAMES)
  _write_json(folder / 'results.json', results)
  with (folder / 'teacher' / 'metrics.jsonl').open('a') as file:
    file.write('\n{"kind": "eval", "step": 420, "miou": NaN}\n')
    file.write('{"kind": "train", "step": 420, "loss": Infinity}\n')
  for folders in ([folder], [folder, make_run(tmp_path / 'b', seed=1)]):
    page = _page(folders, tmp_path / 'report.html')
    text = _words(page)
    assert 'from 41.20 % to 43.55 % (val, protocol native).' in text
    assert 'ResNet-50, – mIoU' in text
    assert not re.search(r'\b(nan|inf|None)\b', text)
  row = re.search(r'</i>Teacher</td>.*?</tr>', page, flags=re.S)[0]
  assert '<td>–</td>' in row and '47' not in row


def test_a_teacher_from_elsewhere_has_its_name(tmp_path):
  folder = make_run(tmp_path / 'a', stages=('student', 'distill'))
  page = _page([folder], tmp_path / 'report.html')
  assert '<h1>camvid · ResNet-50 → ResNet-18 · New + KD</h1>' in page


@pytest.mark.parametrize(
  ('value', 'text'),
  [(1.5, '+1.50'), (-0.25, '−0.25'), (-0.001, '±0.00'), (None, '–')],
)
def test_signed(value, text):
  assert signed(value) == text


@pytest.mark.parametrize(
  'name',
  ['\u5929\u7a7a', '\u0633\u0645\u0627', '\u0938\u095c\u0915', '\U0001f697'],
  ids=['chinese', 'arabic', 'devanagari', 'emoji'],
)
def test_charts_have_names_in_any_script(name):
  """A warning would be an error here; browsers have the fonts."""
  curve = np.array([[0.0, 1.0], [2.0, 1.0]])
  terms = {'loss': curve, 'ce': curve, name: curve}
  assert name in figures.loss_chart(terms, 'student')


def test_a_failure_leaves_the_page_of_before(tmp_path):
  _write_json(tmp_path / 'results.json', {'student': {'miou': None}})
  page = _page([tmp_path], tmp_path / 'report.html')
  assert 'finished: nothing.' in _words(page)
  (tmp_path / 'results.json').write_text('{')
  with pytest.raises(InputError, match='results.json: not JSON'):
    write_report([tmp_path], tmp_path / 'report.html')
  assert (tmp_path / 'report.html').read_text(encoding='utf-8') == page


def test_command_line(tmp_path):
  _write_json(tmp_path / 'results.json', {})
  output = f'--output={tmp_path}/page.html'
  done, wrong = (
    subprocess.run(
      [sys.executable, '-m', 'attnfd_jax.report', folder, output],
      capture_output=True,
      text=True,
    )
    for folder in (tmp_path, tmp_path / 'other')
  )
  assert (done.returncode, wrong.returncode) == (0, 2), done.stderr
  assert wrong.stderr.count('\n') == 1
  assert 'other: no results.json there; give the --workdir' in wrong.stderr
