# SPDX-License-Identifier: Apache-2.0
"""Golden files of torch, round trips, and files that mean harm."""

import collections
import io
import json
import pathlib
import pickle
import random
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import pickles

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'torch_files'
CONTAINERS = ('zip.pth', 'legacy.pth')


def make_zip(path, data, records=None, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', data)
    archive.writestr('archive/version', b'3\n')
    for key, record in (records or {}).items():
      archive.writestr(f'archive/data/{key}', record)
  return path


def make_tensor(offset=0, size=(2,), stride=(1,), count=4, storage='Float'):
  """Pickle of one tensor, with nothing checked."""

  def literal(value):
    return pickle.dumps(value, 2)[2:-1]

  return b''.join(
    [
      b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((',
      literal('storage') + f'ctorch\n{storage}Storage\n'.encode(),
      literal('0') + literal('cpu') + literal(count) + b'tQ',
      literal(offset) + literal(size) + literal(stride) + b'\x89NtR.',
    ]
  )


def assert_same(actual, expected):
  """Equal in dtype, shape and bits."""
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def assert_refused(path, match=None, read=torch_files.read_torch):
  with pytest.raises(torch_files.TorchFileError, match=match) as caught:
    read(path)
  message = str(caught.value)
  assert message.startswith(f'{path.name}: ')
  assert '\n' not in message


@pytest.mark.parametrize('name', CONTAINERS)
def test_reads_what_torch_wrote_bit_for_bit(name):
  checkpoint = torch_files.read_torch(GOLDEN / name)
  state_dict = torch_files.read_state_dict(GOLDEN / name)
  with np.load(GOLDEN / 'expected.npz') as expected:
    assert list(state_dict) == list(expected)
    for key, array in expected.items():
      if key == 'bfloat16':
        array = array.view(ml_dtypes.bfloat16)
      assert_same(state_dict[key], array)
      assert_same(checkpoint['state_dict'][key], array)
  assert checkpoint['epoch'] == 3
  assert checkpoint['best_pred'] == 0.7123
  assert checkpoint['shape'] == (4, 3)
  assert checkpoint['optimizer']['param_groups'][0]['nesterov'] is True
  momentum = checkpoint['optimizer']['state'][0]['momentum_buffer']
  assert np.shares_memory(momentum, checkpoint['state_dict']['conv.weight'])
  assert np.shares_memory(state_dict['view'], state_dict['shared'])


def test_never_imports_torch():
  code = (
    'import sys; from attnfd_jax.pytorch import files as t;'
    f't.read_state_dict({str(GOLDEN / "zip.pth")!r});'
    'assert "torch" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


def test_round_trip(tmp_path):
  generator = np.random.default_rng(0)
  arrays = {
    dtype.name: generator.integers(0, 2, (3, 4)).astype(dtype)
    for dtype in pickles.STORAGES.values()
  }
  arrays |= {
    'transposed': np.arange(6.0).reshape(2, 3).T,
    'reversed': np.arange(6)[::-2],
    'big_endian': np.arange(3, dtype='>f4'),
    'scalar': np.array(3.5, np.float32),
    'empty': np.zeros((0, 3), np.float32),
    'nan': np.array([np.nan, -0.0, np.inf], np.float32),
  }
  arrays['alias'] = arrays['float32']
  ordered = collections.OrderedDict([('b', 1), ('a', arrays['int64'])])
  literals = [None, True, -1, 2**70, 1.5, 'é\n', (1, ()), np.float64(0.5)]
  path = tmp_path / 'file.pth'
  torch_files.write_torch(path, {'w': arrays, 'l': literals, 3: ordered})
  read = torch_files.read_torch(path)
  for key, array in arrays.items():
    assert_same(read['w'][key], array.astype(array.dtype.newbyteorder('=')))
  assert read['l'] == literals
  assert list(read[3]) == ['b', 'a']
  assert np.shares_memory(read['w']['alias'], read['w']['float32'])
  assert np.shares_memory(read[3]['a'], read['w']['int64'])
  assert [p.name for p in tmp_path.iterdir()] == ['file.pth']
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      assert info.compress_type == zipfile.ZIP_STORED
      start = info.header_offset + 30 + len(info.filename) + len(info.extra)
      assert start % 64 == 0
  torch_files.write_torch(tmp_path / 'again.pth', read)
  torch_files.write_torch(tmp_path / 'third.pth', read)
  first = (tmp_path / 'again.pth').read_bytes()
  assert first == (tmp_path / 'third.pth').read_bytes()


def test_other_byte_order(tmp_path):
  data = np.arange(4, dtype='>f4').tobytes()
  path = make_zip(tmp_path / 'big.pth', make_tensor(size=(4,)), {0: data})
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('archive/byteorder', b'big')
  np.testing.assert_array_equal(torch_files.read_torch(path), np.arange(4))


@pytest.mark.parametrize(
  ('value', 'match'),
  [
    ({'a': {'b': object()}}, r"obj\['a'\]\['b'\], which is object"),
    ({'a': np.zeros(2, np.complex64)}, 'complex64'),
    ({'a': np.zeros(2, object)}, 'object'),
    ({(1, 2): 3}, 'key'),
    ([len], r'obj\[0\]'),
  ],
)
def test_writes_all_or_nothing(tmp_path, value, match):
  path = tmp_path / 'file.pth'
  path.write_bytes(b'before')
  with pytest.raises(torch_files.TorchFileError, match=match):
    torch_files.write_torch(path, value)
  loop = []
  loop.append(loop)
  with pytest.raises(torch_files.TorchFileError, match='RecursionError'):
    torch_files.write_torch(path, loop)
  assert path.read_bytes() == b'before'
  assert len(list(tmp_path.iterdir())) == 1


def test_safetensors(tmp_path):
  path = tmp_path / 'file.anything'
  arrays = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3).T,
    'b': np.array([1.5, 2], ml_dtypes.bfloat16),
    'c': np.array(True),
  }
  torch_files.write_safetensors(path, arrays, {'key': 'value'})
  checkpoint = torch_files.read_torch(path)
  read = checkpoint['state_dict']
  assert checkpoint['metadata'] == {'key': 'value'}
  assert set(read) == set(arrays)
  for key, array in arrays.items():
    assert_same(read[key], array)
    assert_same(torch_files.read_state_dict(path)[key], array)
  path.write_bytes(path.read_bytes()[:-3])
  assert_refused(path, 'truncated')
  assert_refused(path, 'truncated', torch_files.read_state_dict)
  with pytest.raises(torch_files.TorchFileError, match='cannot be written'):
    torch_files.write_safetensors(path, arrays, {'key': 1})


def wrap(tensors, keys):
  """{'a': {'b': tensors}} for 'a/b', with what a training loop adds."""
  optimizer = {
    'state': {0: {'exp_avg': np.ones(9), 'step': np.ones(())}},
    'param_groups': [{'lr': 0.1}],
  }
  for key in reversed(keys.split('/') if keys else ()):
    tensors = {
      'epoch': np.array(3),
      'optimizer_state_dict': {'base': {'a': np.ones(9), 'b': np.ones(9)}},
      'opt': optimizer,
      'lr_scheduler': {'last': np.ones(3)},
      key: tensors,
    }
  return tensors


@pytest.mark.parametrize(
  'keys',
  [
    *('', 'state_dict', 'model', 'net', 'model_state_dict', 'my weights'),
    *('ema', 'state_dict_ema', 'ema/module', 'state_dict/model', 'a/b/c/d'),
  ],
)
@pytest.mark.parametrize(
  'prefix',
  [
    *('', 'module.', 'model.', 'module.model.', '_orig_mod.'),
    *('module._orig_mod.', '_orig_mod.module.', '_orig_mod.model.'),
    'module._fsdp_wrapped_module.',
  ],
)
def test_state_dict_wrappers_and_prefixes(tmp_path, keys, prefix):
  path = tmp_path / 'file.pth'
  inner = {f'{prefix}a.weight': np.ones(2), f'{prefix}b': np.zeros(())}
  torch_files.write_torch(path, wrap(inner, keys))
  assert list(torch_files.read_state_dict(path)) == ['a.weight', 'b']


@pytest.mark.parametrize(
  ('key', 'others'),
  [
    ('model', ('ema', 'model_ema')),
    ('params', ('params_ema', 'averaged_model', 'swa')),
    ('state_dict', ('best_state_dict', 'model', 'teacher')),
    ('network', ('class_weights/loss', 'queue')),
  ],
)
def test_plain_weights_come_before_others(tmp_path, key, others):
  path = tmp_path / 'file.pth'
  value = {}
  for other in others:
    value |= wrap({'a.w': np.zeros(2)}, other)
  value |= {key: {'a.w': np.ones(2), 'b': np.ones(2)}, 'weights': np.ones(9)}
  torch_files.write_torch(path, value)
  assert torch_files.read_state_dict(path)['a.w'][0] == 1


def test_inserted_names_go_anywhere_and_never_hide_a_name(tmp_path):
  path = tmp_path / 'file.pth'
  names = ['a._orig_mod.b', 'c.module.d._checkpoint_wrapped_module.e']
  torch_files.write_torch(path, {name: np.ones(2) for name in names})
  assert list(torch_files.read_state_dict(path)) == ['a.b', 'c.d.e']
  names = ['module.a', 'a', 'submodule.a']
  torch_files.write_torch(path, {name: np.ones(2) for name in names})
  assert list(torch_files.read_state_dict(path)) == names


@pytest.mark.parametrize(
  'program',
  [
    b'}q\0U\1ah\0s.',  # A dict that holds itself.
    b'}' + b'(U\1a}' * 100_000 + b'u' * 100_000 + b'.',
    b'}q\0' + b'(U\1ah\0U\1bh\0dq\0' * 100 + b'.',
  ],
  ids=['loop', 'deep', 'shared'],
)
def test_dicts_without_end(tmp_path, program):
  path = make_zip(tmp_path / 'file.pth', b'\x80\x02' + program)
  assert_refused(path, 'no mapping of names', torch_files.read_state_dict)


def write_shards(folder, ending='safetensors', **changes):
  """An index of two parts beside them; returns its path and the tensors."""
  tensors = {'a.w': np.ones(2, np.float32), 'b.w': np.zeros(3, np.float32)}
  parts = {}
  for number, (name, array) in enumerate(tensors.items(), 1):
    parts[name] = f'model-0000{number}-of-00002.{ending}'
    if ending == 'safetensors':
      torch_files.write_safetensors(folder / parts[name], {name: array})
    else:
      torch_files.write_torch(folder / parts[name], {name: array})
  path = folder / f'model.{ending}.index.json'
  index = {'metadata': {'total_size': 20}, 'weight_map': parts} | changes
  path.write_text(json.dumps(index, indent=2))
  return path, tensors


@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_an_index_is_read_with_its_parts(tmp_path, ending):
  path, tensors = write_shards(tmp_path, ending)
  found = torch_files.read_state_dict(path)
  assert found.keys() == tensors.keys()
  for name, array in tensors.items():
    assert_same(found[name], array)
  path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  assert torch_files.read_state_dict(path).keys() == tensors.keys()
  part = next(tmp_path.glob('*00002-of*'))
  part.write_bytes(part.read_bytes()[:-2])
  assert_refused(path, f'{part.name}.*truncated')
  part.unlink()
  assert_refused(path, f"1 are missing: '{part.name}'; copy")


@pytest.mark.parametrize(
  ('part', 'match'),
  [
    *(('../a.safetensors', 'no file beside'), ('/etc/passwd', 'no file')),
    *(('..', 'missing'), ('', 'no file'), ('a\\b', 'no file')),
    *(('C:x', 'no file'), ('a\0', 'no file'), ('a\nb', 'missing')),
    *((None, 'missing'), (['a'] * 9, 'missing'), ('\ud800', 'missing')),
    *(('x' * 5000, 'File name too long'), ('a.json', 'missing')),
    *(('itself', '^itself: itself: a foreign'), ('lacking', 'lacks .*a.w')),
  ],
)
def test_an_index_opens_nothing_but_its_parts(tmp_path, part, match):
  outside = tmp_path / 'a.safetensors'
  torch_files.write_safetensors(outside, {'a.w': np.ones(2, np.float32)})
  folder = tmp_path / 'model'
  folder.mkdir()
  torch_files.write_torch(folder / 'lacking', {'b.w': np.ones(2)})
  path, _ = write_shards(folder, weight_map={'a.w': part})
  if part == 'itself':
    path = path.rename(folder / 'itself')
  assert_refused(path, match)


@pytest.mark.parametrize(
  'content',
  [
    *('{}', '[]', '{"a": 1}', '{"weight_map": []}', '{"weight_map": {}}'),
    *('{"weight_map": "a"}', '{"weight_map": {"a"', '[[]' + ', []' * 10**6),
    *('[' * 10**6, '{"a": ' * 10**5, '{"a": 1' + '0' * 10**5 + '}'),
    '{"categories": [], "images": []}' + ' ' * 10**7,
  ],
  ids=lambda content: content[:20],
)
def test_other_json(tmp_path, content):
  path = tmp_path / 'file.json'
  path.write_text(content)
  assert_refused(path, 'JSON, but no index of weights')


@pytest.mark.parametrize(
  'value',
  [{}, [np.ones(2)], np.ones(2), {'a': 1.0}, {'state_dict': {'a': 'b'}}],
)
def test_no_state_dict(tmp_path, value):
  path = tmp_path / 'file.pth'
  torch_files.write_torch(path, value)
  assert_refused(path, 'no mapping of names', torch_files.read_state_dict)


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    (b'', 'empty'),
    (b'\n<!DOCTYPE html><html>', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'git-lfs'),
    (b'storages'.ljust(257, b'\0') + b'ustar\0'.ljust(255, b'\0'), 'tar'),
    (b'\x1f\x8b\x08\0', 'foreign'),
    (pickle.dumps({'a': 1}, 2), 'bare pickle'),
    (b'PK\x03\x04 cut', 'truncated'),
  ],
)
def test_foreign_files(tmp_path, content, match):
  path = tmp_path / 'file.pth'
  path.write_bytes(content)
  assert_refused(path, match)
  assert_refused(path, match, torch_files.read_state_dict)


def test_other_zip_files(tmp_path):
  np.savez(tmp_path / 'a.npz', a=np.ones(2))
  assert_refused(tmp_path / 'a.npz', 'no data.pkl')
  path = make_zip(tmp_path / 'script.pt', b'N.')
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('archive/constants.pkl', b'N.')
  assert_refused(path, 'TorchScript')


def test_missing_file_is_an_os_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    torch_files.read_state_dict(tmp_path / 'none.pth')


# Pickles that touch a file if they run. `{}` is the path.
_TUPLE = b"(S'touch {}'\nt"
HOSTILE = {
  'reduce': (b'cposix\nsystem\n' + _TUPLE + b'R.', "'posix.system'"),
  'nested': (
    b'](}(U\x01ac__builtin__\neval\n' + _TUPLE + b'Rue.',
    "'__builtin__.eval'",
  ),
  'stack_global': (
    b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93' + _TUPLE + b'R.',
    "'builtins.eval'",
  ),
  'inst': (b"(S'touch {}'\niposix\nsystem\n.", 'opcode INST'),
  'inst_known': (b'(icollections\nOrderedDict\n.', 'opcode INST'),
  'obj': (b"(ccollections\nOrderedDict\nS'a'\no.", 'opcode OBJ'),
  'newobj': (b'ccollections\nOrderedDict\n)\x81.', 'opcode NEWOBJ'),
  'ext': (b'\x82\x01.', 'opcode EXT1'),
  'persid': (b'Pposix.system\n.', 'opcode PERSID'),
  'getattr': (b"c__builtin__\ngetattr\n(ctorch\nSize\nS'a'\ntR.", 'getattr'),
  'dotted': (b'\x80\x04\x8c\x05torch\x8c\x0bos.system.x\x93.', 'torch.os'),
  'call_of_data': (b"S'a'\n)R.", 'call of str'),
  'call_of_storage': (b'ctorch\nFloatStorage\n(I9\ntR.', 'call of'),
  'build_on_function': (b'ctorch\nSize\n}b.', 'state for function'),
  'build_on_list': (b']}b.', 'state for list'),
  'set_on_list': (b']I0\nI1\ns.', 'items set on list'),
  'append_to_dict': (b'}I0\na.', 'items appended'),
  'tuple_key': (b'})I1\ns.', 'key of type tuple'),
  'object_dtype': (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", 'numpy.dtype'),
  'record_dtype': (b"cnumpy\ndtype\n((S'f4'\nltR.", 'numpy.dtype'),
  'codec': (b"c_codecs\nencode\n(S'a'\nS'zip'\ntR.", '_codecs.encode'),
  'persistent': (b"((S'module'\nNNNNtQ.", "persistent 'module'"),
  'memo_bomb': (b'Nr\xff\xff\xff\xff.', None),
  'long_string': (b'X\xff\xff\xff\x7fabc.', 'truncated'),
  'underflow': (b'.', 'truncated'),
  'no_stop': (b'N', 'truncated'),
  'memo_miss': (b'h\x09.', 'truncated'),
  'deep': (b']' + b'\x85' * 200_000 + b'.', None),
  'deep_calls': (b'ctorch\nSize\n' * 9 + b'(' * 100_000 + b'.', None),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles(tmp_path, name):
  data, match = HOSTILE[name]
  victim = tmp_path / 'victim'
  data = data.replace(b'{}', str(victim).encode())
  path = make_zip(tmp_path / 'file.pth', data)
  before = dict(vars(pickles.GLOBALS['torch Size']))
  if match is None:
    torch_files.read_torch(path)  # Harmless here.
  else:
    assert_refused(path, match)
  assert not victim.exists()
  assert vars(pickles.GLOBALS['torch Size']) == before


@pytest.mark.parametrize(
  'kwargs',
  [
    {'size': (5,)},
    {'offset': 3},
    {'offset': -1},
    {'stride': (-1,)},
    {'stride': (4,)},
    {'size': (-2,)},
    {'size': (2, 2)},
    {'size': (2.0,)},
    {'size': (True,)},
    {'size': (10**12,), 'stride': (0,)},
    {'size': (2**62, 2**62), 'stride': (0, 0)},
    {'size': (10**400,)},
    {'size': (1,) * 33, 'stride': (1,) * 33},
    {'count': 2**40},
    {'count': 3},
    {'count': -4},
    {'count': 4.0},
    {'count': '4'},
    {'storage': 'Double'},
  ],
)
def test_tensors_outside_of_their_storage(tmp_path, kwargs):
  path = tmp_path / 'file.pth'
  make_zip(path, make_tensor(**kwargs), {0: bytes(16)})
  assert_refused(path, 'damaged')


def test_storage_records(tmp_path):
  path = tmp_path / 'file.pth'
  make_zip(path, make_tensor())
  assert_refused(path, 'no item named')
  bomb = bytes(2**22)
  data = make_tensor(count=2**20)
  make_zip(path, data, {0: bomb}, zipfile.ZIP_DEFLATED)
  assert_refused(path, 'compressed')
  make_zip(path, b'N' + b'0N' * 2**23 + b'.')
  assert_refused(path, 'bytes')
  # Same storage, two types.
  two = b'\x80\x02(' + b''.join(
    make_tensor(count=count, storage=kind)[2:-1]
    for count, kind in ((4, 'Float'), (2, 'Double'))
  )
  make_zip(path, two + b't.', {0: bytes(16)})
  assert_refused(path, 'storage')


def test_legacy_storages(tmp_path):
  """Sizes lie before any data are read, so nothing large is allocated."""
  head = b''.join(
    pickle.dumps(v, 2) for v in (torch_files.MAGIC, 1001, {'a': 1})
  )
  keys = pickle.dumps(['0'], 2)
  tail = (4).to_bytes(8, 'little') + np.arange(4, dtype='<f4').tobytes()
  path = tmp_path / 'file.pth'
  path.write_bytes(head + make_tensor() + keys + tail)
  np.testing.assert_array_equal(torch_files.read_torch(path), [0, 1])
  view = make_tensor(count=4).replace(b'tQ', b"(S'v'\nI1\nI3\nttQ")
  path.write_bytes(head + view + keys + tail)
  np.testing.assert_array_equal(torch_files.read_torch(path), [1, 2])
  for bad, match in [
    (make_tensor(count=2**40) + keys + tail, 'larger than the file'),
    (make_tensor() + pickle.dumps([], 2), 'list of storages'),
    (make_tensor() + pickle.dumps(['0', '1'], 2) + tail, 'list of storages'),
    (make_tensor() + keys + b'\5' + tail[1:], 'another size'),
    (make_tensor() + keys + tail[:-1], 'truncated'),
    (view.replace(b'I3', b'I4') + keys + tail, 'outside'),
    (view.replace(b'I1', b'I-1') + keys + tail, 'outside'),
  ]:
    path.write_bytes(head + bad)
    assert_refused(path, match)


@pytest.mark.parametrize('name', CONTAINERS)
def test_truncated_anywhere(tmp_path, name):
  data = (GOLDEN / name).read_bytes()
  path = tmp_path / 'file.pth'
  for cut in sorted({*range(0, len(data), 37), len(data) - 1}):
    path.write_bytes(data[:cut])
    assert_refused(path)


@pytest.mark.parametrize('name', CONTAINERS)
def test_mutations_fail_in_one_way_only(tmp_path, name):
  data = (GOLDEN / name).read_bytes()
  generator = random.Random(0)
  refused = 0
  # The pickle alone too: the zip's checksums would hide most of it.
  pickled = data
  if name == 'zip.pth':
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      pickled = archive.read('zip/data.pkl')
      records = {
        info.filename.rpartition('/')[2]: archive.read(info)
        for info in archive.infolist()
        if '/data/' in info.filename
      }
  path = tmp_path / 'file.pth'
  for round_ in range(400):
    source = bytearray(data if round_ % 2 else pickled)
    for _ in range(generator.choice((1, 1, 2, 8))):
      source[generator.randrange(len(source))] = generator.randrange(256)
    if name == 'zip.pth' and not round_ % 2:
      make_zip(path, source, records)
    else:
      path.write_bytes(source)
    try:
      torch_files.read_state_dict(path)
    except torch_files.TorchFileError:
      refused += 1
  assert refused > 50
