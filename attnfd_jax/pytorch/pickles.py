# SPDX-License-Identifier: Apache-2.0
"""Runs the pickles of PyTorch checkpoints on a small machine of our own.

A pickle is a program. Here it runs over `pickletools.genops`: each opcode and
each global is on a list below, and everything else is refused by name.
`pickle.Unpickler` with a strict `find_class` is not enough: its BUILD sets
attributes on whatever is on the stack, one LONG_BINPUT can ask for gigabytes,
and a nested tuple as a dict key hashes for ever.
"""

import math
import pickletools

import ml_dtypes
import numpy as np

from attnfd_jax.errors import InputError

# Real pickles are under 1 MB; each byte can cost 100 bytes of memory.
MAX_PICKLE = 2**24
# A view may repeat elements (torch's expand); bounded, since copies grow.
_MAX_REPEATED = 2**20
# torch's name of a storage, the name in safetensors, the type.
_DTYPES = (
  ('DoubleStorage', 'F64', np.float64),
  ('FloatStorage', 'F32', np.float32),
  ('HalfStorage', 'F16', np.float16),
  ('BFloat16Storage', 'BF16', ml_dtypes.bfloat16),
  ('LongStorage', 'I64', np.int64),
  ('IntStorage', 'I32', np.int32),
  ('ShortStorage', 'I16', np.int16),
  ('CharStorage', 'I8', np.int8),
  ('ByteStorage', 'U8', np.uint8),
  ('BoolStorage', 'BOOL', np.bool_),
)
STORAGES = {name: np.dtype(dtype) for name, _, dtype in _DTYPES}
SAFETENSORS = {code: np.dtype(dtype) for _, code, dtype in _DTYPES}
WAY_OUT = 'get a file of tensors only, torch.save(model.state_dict(), ...)'


class TorchFileError(InputError):
  """A file that cannot be read or written; one line: file, fault, way out."""


def damaged(what):
  return TorchFileError(f'damaged: {what}; copy or download it again')


def _refused(name):
  return TorchFileError(
    f'refuses to load {name[:80]!r}: not a tensor file we trust; {WAY_OUT}'
  )


def as_text(value):
  """A text itself, of others their type: nested lists could print for ever."""
  return value if type(value) is str else type(value).__name__


def _set_items(target, items):
  if type(target) is not dict:
    raise _refused(f'items set on {type(target).__name__}')
  for key, value in items:
    # Tuples as keys could hash for ever: (a, a) of (b, b) of ...
    if not isinstance(key, (str, bytes, int, float, type(None))):
      raise _refused(f'a dict key of type {type(key).__name__}')
    target[key] = value
  return target


def _make_tensor(storage, offset, size, stride, *_):
  if type(storage) is not np.ndarray:
    raise _refused(f'a tensor on {type(storage).__name__}')
  numbers = (offset, *size, *stride)
  fits = len(size) == len(stride) <= 32
  if not fits or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
    raise damaged('a tensor with an invalid shape, stride or offset')
  count = math.prod(size)
  if not count:
    return np.empty(size, storage.dtype)
  reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if reach >= storage.size or count > max(storage.size, _MAX_REPEATED):
    raise damaged(f'a tensor {size} outside of its {storage.size} elements')
  # NumPy checks the bounds once more.
  width, data = storage.itemsize, storage.view(np.uint8)
  strides = [s * width for s in stride]
  return np.ndarray(size, storage.dtype, data, offset * width, strides)


def _make_dtype(code, *_):
  # Bool, int, uint, float only: object dtypes would hold pointers.
  if code not in 'b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8'.split():
    raise _refused(f'numpy.dtype({as_text(code)!r})')
  return np.dtype(code).newbyteorder('<')


def _make_scalar(dtype, data):
  data = data.encode('latin1') if isinstance(data, str) else data
  if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
    raise damaged('a NumPy scalar of the wrong size')
  return np.frombuffer(data, dtype).astype(dtype.newbyteorder('='))[0]


def _encode(text, encoding='latin1'):
  # How protocol 2 spells bytes.
  if encoding != 'latin1':
    raise _refused(f'_codecs.encode to {as_text(encoding)!r}')
  return str.encode(text, 'latin1')


# What a pickle can name: what REDUCE may call, and the dtypes of storages.
GLOBALS = {
  'collections OrderedDict': lambda items=(): _set_items({}, items),
  'torch._utils _rebuild_tensor': _make_tensor,  # Before 0.4.
  'torch._utils _rebuild_tensor_v2': _make_tensor,
  'torch._utils _rebuild_parameter': lambda data, *_: data,
  'torch Size': lambda size=(): tuple(size),
  'torch device': lambda kind, *_: as_text(kind),
  'numpy dtype': _make_dtype,
  'numpy.core.multiarray scalar': _make_scalar,
  'numpy._core.multiarray scalar': _make_scalar,
  '_codecs encode': _encode,
  **{f'torch {name}': dtype for name, dtype in STORAGES.items()},
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = set(
  'NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT'
  ' BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8'
  ' SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8'.split()
)


def _find(reference, storages, load):
  """The storage that a persistent id means, or a view of it."""
  kind, dtype, key, _, count, *view = reference
  if kind != 'storage' or not isinstance(dtype, np.dtype):
    raise _refused(f'persistent {as_text(kind)!r}')
  if not isinstance(key, str) or type(count) is not int or count < 0:
    raise damaged('a storage without a proper key and size')
  if key not in storages:
    storages[key] = load(key, dtype, count)
  storage = storages[key]
  if storage.dtype != dtype or storage.size != count:
    raise damaged(f'storage {key[:40]!r} is not {count} elements of {dtype}')
  if view and view[0] is not None:
    _, start, count = view[0]
    if not 0 <= start <= start + count <= storage.size:
      raise damaged('a view outside of its storage')
    storage = storage[start : start + count]
  return storage


def unpickle(data, storages, load=None):
  """The value of one pickle in bytes, or at the position of a stream of them.

  `storages` is {key: array} of what was loaded; more are added by `load`, (key,
  dtype, count) -> array [count]. Without it the pickle may not name storages.
  """
  stack, marks, memo = [], [], {}
  copied = 0
  for opcode, arg, _ in pickletools.genops(data):
    name, taken = opcode.name, opcode.stack_before
    start = len(stack) - len(taken)
    if pickletools.markobject in taken:
      start = marks.pop() - taken.index(pickletools.markobject)
    if start < 0:
      raise damaged('truncated')
    items = stack[start:]
    del stack[start:]
    match name:
      case 'PROTO' | 'FRAME':
        continue
      case 'MARK':
        marks.append(len(stack))
        continue
      case 'PUT' | 'BINPUT' | 'LONG_BINPUT' | 'MEMOIZE':
        value = items[0] if items else stack.pop()
        memo[len(memo) if name == 'MEMOIZE' else arg] = value
      case 'GET' | 'BINGET' | 'LONG_BINGET':
        value = memo[arg]
      case _ if name in _LITERALS:
        value = _CONSTANTS.get(name, arg)
      case 'EMPTY_TUPLE' | 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        value = tuple(items)
      case 'EMPTY_LIST' | 'LIST':
        value = items
      case 'APPEND' | 'APPENDS':
        value = items.pop(0)
        if type(value) is not list:
          raise _refused(f'items appended to {type(value).__name__}')
        value.extend(items)
      case 'EMPTY_DICT' | 'DICT' | 'SETITEM' | 'SETITEMS':
        value = {} if 'DICT' in name else items.pop(0)
        _set_items(value, zip(items[::2], items[1::2], strict=True))
      case 'GLOBAL' | 'STACK_GLOBAL':
        # An argument, or two texts on the stack.
        known = arg or ' '.join(map(as_text, items))
        if known not in GLOBALS:
          raise _refused(known.replace(' ', '.', 1))
        value = GLOBALS[known]
      case 'REDUCE':
        function, args = items
        # Nothing but what GLOBALS holds is callable on this stack.
        if not callable(function):
          raise _refused(f'a call of {type(function).__name__}')
        value = function(*args)
        # A few bytes can ask for one more copy of a list, table or text.
        if type(value) in (tuple, dict, bytes):
          copied += len(value)
        if copied > MAX_PICKLE:
          raise damaged('calls that fill the memory')
      case 'BUILD':
        # Versions of modules for an OrderedDict, byte order for a dtype.
        value, state = items
        known = isinstance(value, np.dtype) and state[1] in ('<', '|', '=')
        if not known and type(value) is not dict:
          raise _refused(f'state for {type(value).__name__}')
      case 'BINPERSID' if load:
        value = _find(items[0], storages, load)
      case 'STOP':
        return items[0]
      case _:
        raise _refused(f'pickle opcode {name}')
    stack.append(value)
  raise damaged('truncated')
