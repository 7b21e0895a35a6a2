# SPDX-License-Identifier: Apache-2.0
"""Reads and writes PyTorch checkpoints without PyTorch.

A checkpoint is a pickle, and a pickle is a program. Here it runs on a machine
of our own over `pickletools.genops`: each opcode and each global is on a list
below, and everything else is refused by name. `pickle.Unpickler` with a
strict `find_class` is not enough: its BUILD sets attributes on whatever is on
the stack, one LONG_BINPUT can ask for gigabytes, and a nested tuple as a dict
key hashes for ever.

Arrays are views of their storage, as in torch: tensors that share a storage
share memory, and a copy is the caller's choice. bfloat16 is
`ml_dtypes.bfloat16`, so that no bit changes on the way in and out.
"""

import collections
import contextlib
import math
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from attnfd_jax.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
# Real pickles are under 1 MB; each byte can cost 100 bytes of memory.
_MAX_PICKLE = 2**24
# A view may repeat elements (torch's expand); bounded, since copies grow.
_MAX_REPEATED = 2**20

_STORAGES = {
  'DoubleStorage': np.dtype('float64'),
  'FloatStorage': np.dtype('float32'),
  'HalfStorage': np.dtype('float16'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('int64'),
  'IntStorage': np.dtype('int32'),
  'ShortStorage': np.dtype('int16'),
  'CharStorage': np.dtype('int8'),
  'ByteStorage': np.dtype('uint8'),
  'BoolStorage': np.dtype('bool'),
}
_WRAPPERS = ('state_dict', 'model', 'model_state', 'net')
_SAFE = 'get a file of tensors only, torch.save(model.state_dict(), ...)'


class TorchFileError(InputError):
  """A file that cannot be read or written; one line: file, fault, way out."""


@contextlib.contextmanager
def _errors(path, hint='truncated or damaged, copy or download it again'):
  """Turns whatever goes wrong inside into one line about `path`."""
  try:
    yield
  except Exception as error:  # Hostile bytes reach zipfile, struct, numpy.
    text = ' '.join(str(error).split())[:300]
    if not isinstance(error, TorchFileError):
      text = f'{hint} ({type(error).__name__}: {text})'
    name = pathlib.Path(path).name
    raise TorchFileError(f'{name}: {text}') from error


def _refuse(name):
  return TorchFileError(
    f'refuses to load {name[:80]!r}: not a tensor file we trust; {_SAFE}'
  )


def _text(value):
  """A text itself, of others their type: nested lists could print for ever."""
  return value if type(value) is str else type(value).__name__


def _damaged(what):
  return TorchFileError(f'damaged: {what}; copy or download it again')


# What a pickle can name. All are inert; the machine compares types.


class _Storage:
  """uint8 [bytes] and the dtype they hold."""

  def __init__(self, data, dtype):
    self.data, self.dtype = data, dtype


class _DType:
  """A NumPy dtype in the making: BUILD tells the byte order later."""

  def __init__(self, code, *_):
    # Bool, int, uint, float only: object dtypes would hold pointers.
    if code not in 'b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8'.split():
      raise _refuse(f'numpy.dtype({_text(code)!r})')
    self.dtype = np.dtype(code)

  def build(self, state):
    self.dtype = self.dtype.newbyteorder(state[1])


class _Global:
  """A known name of a pickle; `call` is what REDUCE may run, or None."""

  def __init__(self, call=None, dtype=None):
    self.call, self.dtype = call, dtype


def _make_dict(pairs=()):
  result = {}
  for key, value in pairs:
    _set(result, key, value)
  return result


def _set(target, key, value):
  if type(target) is not dict:
    raise _refuse(f'items set on {type(target).__name__}')
  # Tuples as keys could hash for ever: (a, a) of (b, b) of ...
  if not isinstance(key, (str, bytes, int, float, type(None))):
    raise _refuse(f'a dict key of type {type(key).__name__}')
  target[key] = value


def _make_tensor(storage, offset, size, stride, *_):
  if type(storage) is not _Storage:
    raise _refuse(f'a tensor on {type(storage).__name__}')
  numbers = (offset, *size, *stride)
  fits = len(size) == len(stride) <= 32
  if not fits or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
    raise _damaged('a tensor with an invalid shape, stride or offset')
  held = storage.data.size // storage.dtype.itemsize
  count = math.prod(size)
  reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if count and (reach >= held or count > max(held, _MAX_REPEATED)):
    raise _damaged(f'a tensor {size} outside of its {held} stored elements')
  if not count:
    return np.empty(size, storage.dtype)
  # Strides in bytes; NumPy checks the bounds once more.
  width = storage.dtype.itemsize
  strides = [s * width for s in stride]
  return np.ndarray(size, storage.dtype, storage.data, offset * width, strides)


def _make_scalar(kind, data):
  data = data.encode('latin1') if isinstance(data, str) else data
  if type(kind) is not _DType or len(data) != kind.dtype.itemsize:
    raise _damaged('a NumPy scalar of the wrong size')
  return np.frombuffer(data, kind.dtype).astype(kind.dtype.newbyteorder('='))[0]


def _encode(text, encoding='latin1'):
  # How protocol 2 spells bytes.
  if encoding != 'latin1':
    raise _refuse(f'_codecs.encode to {_text(encoding)!r}')
  return str.encode(text, 'latin1')


_GLOBALS = {
  'collections OrderedDict': _Global(_make_dict),
  'torch._utils _rebuild_tensor': _Global(_make_tensor),  # Before 0.4.
  'torch._utils _rebuild_tensor_v2': _Global(_make_tensor),
  'torch._utils _rebuild_parameter': _Global(lambda data, *_: data),
  'torch Size': _Global(lambda size=(): tuple(size)),
  'torch device': _Global(lambda kind, *_: _text(kind)),
  'numpy dtype': _Global(_DType),
  'numpy.core.multiarray scalar': _Global(_make_scalar),
  'numpy._core.multiarray scalar': _Global(_make_scalar),
  '_codecs encode': _Global(_encode),
  **{f'torch {k}': _Global(dtype=v) for k, v in _STORAGES.items()},
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = set(
  'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING'
  ' SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES'
  ' SHORT_BINBYTES BINBYTES8'.split()
)


def _unpickle(data, find_storage=None):
  """Runs one pickle; returns its value and its length in bytes.

  Args:
    data: bytes; what follows the pickle is left alone.
    find_storage: (key, dtype, elements) -> `_Storage`, or None where a
      pickle has no business with storages.
  """
  stack, marks, memo = [], [], {}
  copied = 0

  def pop_mark():
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  for opcode, arg, position in pickletools.genops(data):
    name = opcode.name
    if name in _LITERALS:
      stack.append(arg)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
      memo[len(memo) if name == 'MEMOIZE' else arg] = stack[-1]
    elif name in ('GET', 'BINGET', 'LONG_BINGET'):
      stack.append(memo[arg])
    elif name == 'MARK':
      marks.append(len(stack))
    elif name in ('EMPTY_TUPLE', 'EMPTY_LIST', 'EMPTY_DICT'):
      stack.append({'T': (), 'L': [], 'D': {}}[name[6]])
    elif name in ('TUPLE', 'LIST'):
      items = pop_mark()
      stack.append(tuple(items) if name == 'TUPLE' else items)
    elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
      count = int(name[5])
      stack[-count:] = [tuple(stack[-count:])]
    elif name in ('APPEND', 'APPENDS'):
      items = pop_mark() if name == 'APPENDS' else [stack.pop()]
      if type(stack[-1]) is not list:
        raise _refuse(f'items appended to {type(stack[-1]).__name__}')
      stack[-1].extend(items)
    elif name in ('DICT', 'SETITEM', 'SETITEMS'):
      items = [stack.pop(-2), stack.pop()] if name == 'SETITEM' else pop_mark()
      if name == 'DICT':
        stack.append({})
      for key, value in zip(items[::2], items[1::2], strict=True):
        _set(stack[-1], key, value)
    elif name in ('GLOBAL', 'STACK_GLOBAL', 'INST'):
      if name == 'STACK_GLOBAL':
        arg = f'{_text(stack.pop(-2))} {_text(stack.pop())}'
      if name == 'INST' or arg not in _GLOBALS:
        raise _refuse(arg.replace(' ', '.', 1))
      stack.append(_GLOBALS[arg])
    elif name == 'REDUCE':
      function, args = stack.pop(-2), stack.pop()
      if type(function) is not _Global or not function.call:
        raise _refuse(f'a call of {type(function).__name__}')
      stack.append(function.call(*args))
      # A few bytes can ask for one more copy of a list, table or text.
      if type(stack[-1]) in (tuple, dict, bytes):
        copied += len(stack[-1])
      if copied > _MAX_PICKLE:
        raise _damaged('calls that fill the memory')
    elif name == 'BUILD':
      state = stack.pop()
      if type(stack[-1]) is _DType:
        stack[-1].build(state)
      # An OrderedDict brings `_metadata`, module versions: not needed.
      elif type(stack[-1]) is not dict:
        raise _refuse(f'state for {type(stack[-1]).__name__}')
    elif name == 'BINPERSID' and find_storage:
      kind, storage_type, key, _, count, *view = stack.pop()
      if kind != 'storage' or getattr(storage_type, 'dtype', None) is None:
        raise _refuse(f'persistent {_text(kind)!r}')
      storage = find_storage(key, storage_type.dtype, count)
      if view and view[0] is not None:
        _, start, count = view[0]
        width = storage.dtype.itemsize
        if not 0 <= start <= start + count <= storage.data.size // width:
          raise _damaged('a view outside of its storage')
        view = storage.data[start * width : (start + count) * width]
        storage = _Storage(view, storage.dtype)
      stack.append(storage)
    elif name == 'STOP':
      return stack.pop(), position + 1
    elif name not in ('PROTO', 'FRAME'):
      raise _refuse(f'pickle opcode {name}')
  raise _damaged('truncated')


def _make_finder(load):
  """Returns find_storage and its table; `load` is (key, bytes) -> uint8."""
  table = {}

  def find_storage(key, dtype, count):
    if not isinstance(key, str) or type(count) is not int or count < 0:
      raise _damaged('a storage without a proper key and size')
    size = count * dtype.itemsize
    if key not in table:
      table[key] = _Storage(load(key, size), dtype)
    if table[key].dtype != dtype or table[key].data.size != size:
      raise _damaged(f'storage {key[:40]!r} is not {size} bytes of {dtype}')
    return table[key]

  return find_storage, table


def _swap(table, order):
  """Turns storages of a machine with the other byte order, in place."""
  for storage in table.values() if order != sys.byteorder else ():
    storage.data.view(f'u{storage.dtype.itemsize}').byteswap(inplace=True)


def _read_zip(file, size):
  archive = zipfile.ZipFile(file)
  names = archive.namelist()
  tops = [
    n[:-8] for n in names if n.count('/') == 1 and n.endswith('/data.pkl')
  ]
  if len(tops) != 1:
    raise TorchFileError(
      'a zip file, but not one of torch.save (no data.pkl in it); give the'
      ' checkpoint itself'
    )
  if f'{tops[0]}constants.pkl' in names:
    raise TorchFileError(f'a TorchScript program, not a checkpoint; {_SAFE}')

  def load(name, limit):
    nonlocal size
    info = archive.getinfo(tops[0] + name)
    # Overlapping records would give more bytes than the file has.
    size -= info.file_size
    if info.compress_type != zipfile.ZIP_STORED or size < 0:
      raise TorchFileError(
        f'record {name[:40]!r} is compressed, which torch.save never does;'
        ' write it again with torch.save'
      )
    if info.file_size > limit:
      raise _damaged(f'record {name[:40]!r} is larger than {limit} bytes')
    return archive.read(info)

  order = 'little'
  if f'{tops[0]}byteorder' in names:
    order = load('byteorder', 16).decode('ascii')
  find_storage, table = _make_finder(
    lambda key, size: np.frombuffer(bytearray(load(f'data/{key}', size)), 'u1')
  )
  value, _ = _unpickle(load('data.pkl', _MAX_PICKLE), find_storage)
  _swap(table, order)
  return value


def _read_legacy(file, size):
  position = 0

  def run(find_storage=None):
    nonlocal position
    file.seek(position)
    value, length = _unpickle(file.read(_MAX_PICKLE), find_storage)
    position += length
    return value

  def load(_, wanted):
    nonlocal size
    size -= wanted
    if size < 0:
      raise _damaged('storages are larger than the file')
    return np.empty(wanted, np.uint8)  # Filled below; the data come last.

  if run() != _MAGIC:
    raise TorchFileError(f'a bare pickle, not a file of torch.save; {_SAFE}')
  if (protocol := run()) != 1001:
    raise TorchFileError(
      f'unknown protocol {_text(protocol):.20}; save it again'
    )
  run()  # sys_info; torch writes little-endian storages on any machine.
  find_storage, table = _make_finder(load)
  value = run(find_storage)
  keys = [_text(key) for key in run()]
  if set(keys) != set(table) or len(keys) != len(table):
    raise _damaged('its list of storages is wrong')
  file.seek(position)
  for key in keys:
    storage = table[key]
    # Compared as bytes: a cut count must not read as a smaller one.
    count = storage.data.size // storage.dtype.itemsize
    if file.read(8) != count.to_bytes(8, 'little'):
      raise _damaged(f'storage {key[:40]!r} has another size')
    if file.readinto(storage.data) != storage.data.size:
      raise _damaged('truncated')
  _swap(table, 'little')
  return value


def _identify(file, size):
  """'zip', 'legacy' or 'safetensors', from the first bytes."""
  head = file.read(512)
  file.seek(0)
  if head.startswith(b'PK\x03\x04'):
    return 'zip'
  if head.startswith(b'\x80'):
    return 'legacy'
  if head[8:9] == b'{':
    return 'safetensors'
  if not size:
    raise TorchFileError('an empty file; copy or download it again')
  if head.startswith(b'version https://git-lfs'):
    raise TorchFileError('a git-lfs pointer, not the file; run git lfs pull')
  if head.lstrip()[:1] == b'<':
    raise TorchFileError(
      'a web page, not a checkpoint; open the link in a browser and download'
      ' the file itself'
    )
  if head[257:262] == b'ustar':
    raise TorchFileError(
      'a tar file, or the tar container of PyTorch before 0.1.10, which is not'
      ' read; unpack it, or take a newer copy of the same weights'
      ' (resnet18-5c106cde is resnet18-f37072fd, resnet101-5d3b4d8f is'
      ' resnet101-63fe2227), or torch.load and torch.save it once'
    )
  raise TorchFileError(
    f'a foreign format (starts with {head[:4]!r}); give a file of torch.save'
    ' or safetensors'
  )


def read_torch(path):
  """The object in a file of torch.save, without torch and without running it.

  Args:
    path: a zip container (PyTorch 1.6 and later) or a legacy one (0.1.10 and
      later); the ending of the name does not matter.

  Returns:
    dict (also for OrderedDict), list, tuple, str, numbers, None, NumPy scalars,
    and an array for each tensor or parameter. Arrays can be written to; those
    that share a storage share memory. bfloat16 is `ml_dtypes.bfloat16`.

  Raises:
    TorchFileError: for anything else, in one line.
    OSError: if the file cannot be opened.
  """
  with open(path, 'rb') as file, _errors(path):
    size = os.fstat(file.fileno()).st_size
    kind = _identify(file, size)
    if kind == 'safetensors':
      raise TorchFileError('a safetensors file; use read_safetensors')
    return (_read_zip if kind == 'zip' else _read_legacy)(file, size)


def read_state_dict(path):
  """The {name: array} of any checkpoint; content decides, not the ending.

  A mapping below 'state_dict', 'model', 'model_state' or 'net' (the first that
  holds only arrays) is unwrapped. The prefixes 'module.' and 'model.' go when
  all names have them.

  Raises:
    TorchFileError: also if there is no such mapping.
    OSError: if the file cannot be opened.
  """
  with open(path, 'rb') as file, _errors(path):
    kind = _identify(file, os.fstat(file.fileno()).st_size)
  is_safetensors = kind == 'safetensors'
  found = read_safetensors(path)[0] if is_safetensors else read_torch(path)

  def is_state_dict(value):
    return (
      type(value) is dict
      and value
      and all(
        isinstance(k, str) and isinstance(v, np.ndarray)
        for k, v in value.items()
      )
    )

  inner = found if type(found) is dict else {}
  choices = [found, *(inner.get(key) for key in _WRAPPERS)]
  tensors = next(filter(is_state_dict, choices), None)
  if tensors is None:
    with _errors(path):
      held = [f'{_text(k):.30} ({type(v).__name__})' for k, v in inner.items()]
      held = held[:6]
      raise TorchFileError(
        f'no mapping of names to tensors, but {type(found).__name__}'
        f' [{", ".join(held)}]; save model.state_dict()'
      )
  for prefix in ('module.', 'model.', 'module.'):
    if all(name.startswith(prefix) for name in tensors):
      tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
  return tensors


def read_safetensors(path):
  """(tensors, metadata) of a safetensors file; metadata is dict of str.

  Raises:
    TorchFileError: if the file is damaged or holds another dtype than ours.
    OSError: if the file cannot be opened.
  """
  with open(path, 'rb') as file, _errors(path):
    size = os.fstat(file.fileno()).st_size
    if (kind := _identify(file, size)) != 'safetensors':
      raise TorchFileError(f'a {kind} file of torch.save; use read_torch')
    with safetensors.safe_open(path, 'np') as header:
      metadata = header.metadata() or {}
    # Not safe_open's get_tensor: it does not know bfloat16.
    codes = 'F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL'.split()
    dtypes = dict(zip(codes, _STORAGES.values(), strict=True))
    tensors = {}
    for name, tensor in safetensors.deserialize(file.read()):
      if tensor['dtype'] not in dtypes:
        raise TorchFileError(
          f'{name[:80]!r} is {tensor["dtype"]}, which is not read; convert it'
        )
      data = np.frombuffer(tensor['data'], dtypes[tensor['dtype']])
      tensors[name] = data.reshape(tensor['shape'])
    return tensors, metadata


def _plain(array):
  # C order (safetensors writes wrong values without a word otherwise) and
  # the byte order of this machine; a scalar stays a scalar.
  return np.asarray(array, array.dtype.newbyteorder('='), order='C')


@contextlib.contextmanager
def _replacing(path):
  """A file that becomes `path` at the end, or leaves no trace."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_safetensors(path, tensors, metadata=None):
  """Writes {name: array} and {str: str} atomically.

  Raises:
    TorchFileError: for names, dtypes or metadata that the format lacks.
    OSError: if the file cannot be written.
  """
  with _errors(path, 'cannot be written'):
    plain = {name: _plain(array) for name, array in tensors.items()}
    data = safetensors.numpy.save(plain, metadata)
  with _replacing(path) as file:
    file.write(data)


def _emit(value, arrays, where):
  """Protocol 2 opcodes of `value`; adds its arrays to {id: (index, array)}."""

  def literal(value):
    return pickle.dumps(value, 2)[2:-1]  # Without PROTO and STOP.

  if isinstance(value, np.generic):
    value = value.item()
  if type(value) in (type(None), bool, int, float, str):
    return literal(value)
  if type(value) in (list, tuple):
    items = [_emit(v, arrays, f'{where}[{i}]') for i, v in enumerate(value)]
    first, last = (b'](', b'e') if type(value) is list else (b'(', b't')
    return first + b''.join(items) + last
  empty_ordered = b'ccollections\nOrderedDict\n)R'
  if type(value) in (dict, collections.OrderedDict):
    items = []
    for key, item in value.items():
      if type(key) not in (str, int):
        raise TorchFileError(
          f'cannot write the key {key!r} in {where}; use str'
        )
      items += [literal(key), _emit(item, arrays, f'{where}[{key!r}]')]
    first = b'}' if type(value) is dict else empty_ordered
    return first + b'(' + b''.join(items) + b'u'
  names = {dtype.name: name for name, dtype in _STORAGES.items()}
  if not isinstance(value, np.ndarray) or value.dtype.name not in names:
    kind = getattr(value, 'dtype', type(value).__name__)
    raise TorchFileError(
      f'cannot write {where}, which is {kind}; convert it to a NumPy array of'
      f' {", ".join(names)}, or leave it out'
    )
  index, _ = arrays.setdefault(id(value), (len(arrays), value))
  strides = [
    math.prod(max(n, 1) for n in value.shape[i + 1 :])
    for i in range(value.ndim)
  ]
  return b''.join(
    [
      b'ctorch._utils\n_rebuild_tensor_v2\n((',
      literal('storage') + f'ctorch\n{names[value.dtype.name]}\n'.encode(),
      literal(str(index)) + literal('cpu') + literal(value.size) + b'tQ',
      literal(0) + literal(value.shape) + literal(tuple(strides)),
      literal(False) + empty_ordered + b'tR',
    ]
  )


def write_torch(path, obj):
  """Writes what torch.load reads, also with weights_only=True; atomically.

  Args:
    path: where to; replaced in one step.
    obj: dict, OrderedDict (keys str or int), list, tuple, str, bool, int,
      float, None, NumPy scalars (written as Python numbers) and arrays. An
      array that appears twice is stored once, and torch shares its memory.

  Raises:
    TorchFileError: if `obj` holds anything else; nothing is written then.
    OSError: if the file cannot be written.
  """
  arrays = {}
  with _errors(path, 'cannot be written'):
    data = b'\x80\x02' + _emit(obj, arrays, 'obj') + b'.'
  records = {'data.pkl': data, 'byteorder': sys.byteorder.encode()}
  records |= {f'data/{index}': array for index, array in arrays.values()}
  records |= {'version': b'3\n'}
  with _replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
    for name, record in records.items():
      # ZipInfo's fixed date makes equal contents equal files.
      info = zipfile.ZipInfo(f'archive/{name}')
      # torch maps files into memory: data start at multiples of 64.
      padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
      info.extra = struct.pack('<HH', 0x4246, padding) + bytes(padding)
      if isinstance(record, np.ndarray):
        record = memoryview(_plain(record).reshape(-1).view(np.uint8))
      archive.writestr(info, record)
