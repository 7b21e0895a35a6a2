# SPDX-License-Identifier: Apache-2.0
"""Unpickles PyTorch checkpoints without executing anything in them.

A pickle is a program for a stack machine. This interpreter iterates over
`pickletools.genops` and allows only the opcodes and globals listed below.
`pickle.Unpickler` with a strict `find_class` is not enough: its BUILD sets
attributes on anything on the stack, a single LONG_BINPUT can ask for gigabytes,
and hashing a nested tuple as a dict key can take forever.
"""

from collections.abc import Callable, Iterable
import io
import math
import pickletools
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from attnfd_jax.errors import InputError

Storages: TypeAlias = dict[str, np.ndarray]
LoadStorage: TypeAlias = Callable[[str, np.dtype, int], np.ndarray]

# Real pickles are under 1 MB; each byte can cost 100 bytes of memory.
MAX_PICKLE = 2**24
# A view may repeat elements (as of torch's expand), and a copy of it is larger;
# this many elements at most.
_MAX_REPEATED = 2**20
# torch's name of a storage, the name in safetensors, the dtype.
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
  """A file cannot be read or written: one line with file, cause and remedy."""


def damaged(what: str) -> TorchFileError:
  """The error for a file whose content is inconsistent."""
  return TorchFileError(f'damaged: {what}; copy or download it again')


def _refused(name: str) -> TorchFileError:
  return TorchFileError(
    f'refuses to load {name[:80]!r}: not allowed in a tensor file; {WAY_OUT}'
  )


def as_text(value: object) -> str:
  """A string as it is; of other values, which may be huge, the type."""
  return value if type(value) is str else type(value).__name__


def _set_items(target: Any, items: Iterable[tuple[Any, Any]]) -> dict:
  if type(target) is not dict:
    raise _refused(f'items set on {type(target).__name__}')
  for key, value in items:
    # Nested tuples, (a, a) of (b, b) of ..., could take forever to hash.
    if not isinstance(key, (str, bytes, int, float, type(None))):
      raise _refused(f'a dict key of type {type(key).__name__}')
    target[key] = value
  return target


def _make_tensor(
  storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> np.ndarray:
  if type(storage) is not np.ndarray:
    raise _refused(f'a tensor on {type(storage).__name__}')
  numbers = (offset, *size, *stride)
  fits = len(size) == len(stride) <= 32
  if not fits or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
    raise damaged('a tensor with an invalid shape, stride or offset')
  count = math.prod(size)
  if not count:
    return np.empty(size, storage.dtype)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if last >= storage.size or count > max(storage.size, _MAX_REPEATED):
    raise damaged(f'a tensor {size} outside of its {storage.size} elements')
  # NumPy checks the bounds again.
  width, data = storage.itemsize, storage.view(np.uint8)
  strides = [s * width for s in stride]
  return np.ndarray(size, storage.dtype, data, offset * width, strides)


def _make_dtype(code: Any, *_: Any) -> np.dtype:
  # Bool, int, uint, float only: object dtypes would hold pointers.
  if code not in 'b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8'.split():
    raise _refused(f'numpy.dtype({as_text(code)!r})')
  return np.dtype(code).newbyteorder('<')


def _make_scalar(dtype: Any, data: Any) -> np.generic:
  data = data.encode('latin1') if isinstance(data, str) else data
  if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
    raise damaged('a NumPy scalar of the wrong size')
  return np.frombuffer(data, dtype).astype(dtype.newbyteorder('='))[0]


def _encode(text: Any, encoding: Any = 'latin1') -> bytes:
  # Protocol 2 writes bytes this way.
  if encoding != 'latin1':
    raise _refused(f'_codecs.encode to {as_text(encoding)!r}')
  return str.encode(text, 'latin1')


# The globals that a pickle may name: functions for REDUCE to call, and the
# dtypes of storages.
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


def _find(reference: Any, storages: Storages, load: LoadStorage) -> np.ndarray:
  """The storage that a persistent id refers to, or a view of it."""
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


def unpickle(
  data: bytes | io.BytesIO, storages: Storages, load: LoadStorage | None = None
) -> Any:
  """Returns the value of one pickle.

  Args:
    data: the pickle, or a stream whose position is at its start.
    storages: those loaded so far; new ones are added.
    load: (key, dtype, count) -> a 1-D array. Without it, a pickle with
      references to storages is refused.

  Raises:
    TorchFileError: if the pickle is damaged or holds anything but plain values
      and tensors. Hostile data can raise other exceptions, too.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[Any, Any] = {}
  copied = 0
  for opcode, arg, _ in pickletools.genops(data):
    name, operands = opcode.name, opcode.stack_before
    start = len(stack) - len(operands)
    if pickletools.markobject in operands:
      start = marks.pop() - operands.index(pickletools.markobject)
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
        # An argument, or two strings on the stack.
        path = arg or ' '.join(map(as_text, items))
        if path not in GLOBALS:
          raise _refused(path.replace(' ', '.', 1))
        value = GLOBALS[path]
      case 'REDUCE':
        function, args = items
        # The only callables on this stack are those of GLOBALS.
        if not callable(function):
          raise _refused(f'a call of {type(function).__name__}')
        value = function(*args)
        # A few bytes of the pickle can ask for another copy of a large value.
        if isinstance(value, (tuple, dict, bytes)):
          copied += len(value)
        if copied > MAX_PICKLE:
          raise damaged('calls that fill the memory')
      case 'BUILD':
        # An OrderedDict has module versions as its state, a dtype its byte
        # order.
        value, state = items
        is_dtype = isinstance(value, np.dtype) and state[1] in ('<', '|', '=')
        if not is_dtype and type(value) is not dict:
          raise _refused(f'state for {type(value).__name__}')
      case 'BINPERSID' if load:
        value = _find(items[0], storages, load)
      case 'STOP':
        return items[0]
      case _:
        raise _refused(f'pickle opcode {name}')
    stack.append(value)
  raise damaged('truncated')
