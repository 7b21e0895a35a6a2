# SPDX-License-Identifier: Apache-2.0
"""Reads and writes PyTorch checkpoints and safetensors without PyTorch.

Nothing in a file is executed, see pickles.py. As in torch, arrays are views of
their storage: tensors that share a storage share memory. bfloat16 is read and
written as `ml_dtypes.bfloat16`, without conversion.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import pickle
import re
import struct
import sys
from typing import Any, BinaryIO, TypeAlias
import zipfile

import numpy as np
import safetensors
import safetensors.numpy

from attnfd_jax import paths
from attnfd_jax.pytorch import pickles
from attnfd_jax.pytorch.pickles import damaged, TorchFileError
from attnfd_jax.types import StrPath

# Values are usually arrays; those of a user may be torch tensors.
Tensors: TypeAlias = dict[str, Any]
# {'key/key/': tensors at that nesting}, see `groups`.
Groups: TypeAlias = dict[str, Tensors]
_Reader: TypeAlias = Callable[[BinaryIO, int], Any]

# What a legacy file of torch.save starts with.
MAGIC = 0x1950A86A20F9469CFC6C
# Bytes of a JSON index; those of real networks are far smaller.
_MAX_INDEX = 2**22
# Of several networks in a file, the one below the first of these keys is used.
_USUAL = 'state_dict model model_state net model_state_dict network'.split()
# Keys of mappings without weights, and of moving averages of weights.
_NO_WEIGHTS = re.compile(r'^opt(_|$)|optim|sched|scaler', re.I)
_AVERAGED = re.compile(
  r'ema(?![a-z])|(?<![a-z])(ema|swa|avg|averaged?|shadow|momentum|encoder_k)'
  r'(?![a-z])',
  re.I,
)
# What torch.compile, DDP, FSDP and activation checkpointing insert into names.
_INSERTED = re.compile(
  r'(?<![^./])(?:module|_orig_mod|_(?:fsdp|checkpoint)_wrapped_module)\.'
)


@contextlib.contextmanager
def _errors(
  path: StrPath, hint: str = 'truncated or damaged, copy or download it again'
) -> Iterator[None]:
  """Turns any error into a TorchFileError of one line that names the file."""
  try:
    yield
  except Exception as error:  # Hostile bytes reach zipfile, struct, numpy.
    text = ' '.join(str(error).split())[:300]
    if not isinstance(error, TorchFileError):
      text = f'{hint} ({type(error).__name__}: {text})'
    raise TorchFileError(f'{pathlib.Path(path).name}: {text}') from error


def _read_zip(file: BinaryIO, size: int) -> Any:
  archive = zipfile.ZipFile(file)
  names = archive.namelist()
  tops = [n[:-8] for n in names if re.fullmatch(r'[^/]*/data\.pkl', n)]
  if len(tops) != 1:
    raise TorchFileError(
      'a zip file, but not of torch.save (no data.pkl); give the checkpoint'
    )
  if f'{tops[0]}constants.pkl' in names:
    raise TorchFileError(f'a TorchScript program; {pickles.WAY_OUT}')

  def read(name: str, limit: int) -> bytes:
    nonlocal size
    info = archive.getinfo(tops[0] + name)
    # Records that overlap would yield more bytes than the file has.
    size -= info.file_size
    if info.compress_type != zipfile.ZIP_STORED or size < 0:
      raise TorchFileError(
        f'record {name[:40]!r} is compressed; write it again with torch.save'
      )
    if info.file_size > limit:
      raise damaged(f'record {name[:40]!r} is larger than {limit} bytes')
    return archive.read(info)

  order = 'little'
  if f'{tops[0]}byteorder' in names:
    order = read('byteorder', 16).decode('ascii')

  def load(key: str, dtype: np.dtype, count: int) -> np.ndarray:
    data = read(f'data/{key}', count * dtype.itemsize)
    # Any str: NumPy checks it.
    stored = dtype.newbyteorder(order)  # pyright: ignore[reportArgumentType]
    return np.frombuffer(data, stored).astype(dtype)

  program = read('data.pkl', pickles.MAX_PICKLE)
  return pickles.unpickle(program, {}, load)


def _read_legacy(file: BinaryIO, size: int) -> Any:
  stream = io.BytesIO(file.read(pickles.MAX_PICKLE))
  storages: pickles.Storages = {}
  run = functools.partial(pickles.unpickle, stream, storages)

  def reserve(_: str, dtype: np.dtype, count: int) -> np.ndarray:
    nonlocal size
    size -= count * dtype.itemsize
    if size < 0:
      raise damaged('storages are larger than the file')
    return np.empty(count, dtype)  # Filled below: the data come last.

  if run() != MAGIC:
    raise TorchFileError(f'a bare pickle; {pickles.WAY_OUT}')
  if (protocol := run()) != 1001:
    raise TorchFileError(
      f'unknown protocol {pickles.as_text(protocol):.20}; save it again'
    )
  run()  # About the machine that wrote it.
  value = run(reserve)
  keys = [pickles.as_text(key) for key in run()]
  if sorted(keys) != sorted(storages):
    raise damaged('its list of storages is wrong')
  file.seek(stream.tell())
  for key in keys:
    storage = storages[key]
    # Compared as bytes: a truncated size must not read as a smaller one.
    if file.read(8) != storage.size.to_bytes(8, 'little'):
      raise damaged(f'storage {key[:40]!r} has another size')
    # torch writes little-endian storages on any machine.
    data, dtype = file.read(storage.nbytes), storage.dtype.newbyteorder('<')
    storage[:] = np.frombuffer(data, dtype, storage.size)
  return value


def _read_safetensors(file: BinaryIO, size: int) -> dict[str, Any]:
  data = file.read(size)
  tensors = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in pickles.SAFETENSORS:
      raise TorchFileError(
        f'{name[:80]!r} is {tensor["dtype"]}, not supported here; convert it'
      )
    # Not safetensors.numpy, which does not know bfloat16.
    array = np.frombuffer(tensor['data'], pickles.SAFETENSORS[tensor['dtype']])
    tensors[name] = array.reshape(tensor['shape'])
  (length,) = struct.unpack('<Q', data[:8])
  metadata = json.loads(data[8 : 8 + length]).get('__metadata__') or {}
  return {'state_dict': tensors, 'metadata': metadata}


def _read_index(file: BinaryIO, size: int) -> dict[str, Any]:
  content, tensors = None, {}
  if size <= _MAX_INDEX:
    with contextlib.suppress(ValueError, RecursionError):
      content = json.loads(file.read(size))
  parts = content.get('weight_map') if type(content) is dict else None
  if type(parts) is not dict or not parts:
    raise TorchFileError(
      'JSON, but no index of weights (no weight_map); give the weights'
    )
  for part in map(pickles.as_text, parts.values()):
    # A plain name: nothing outside of the folder is opened.
    if not re.fullmatch(r'[^/\\:\0]+', part):
      raise TorchFileError(
        f'an index that names {part[:60]!r}, no file beside it; download it'
        ' again'
      )
  folder = pathlib.Path(file.name).parent
  names = sorted({*map(pickles.as_text, parts.values())})
  if missing := [x for x in names if not (folder / x).is_file()]:
    shown = ', '.join(f'{x!r:.60}' for x in missing[:3])
    raise TorchFileError(
      f'an index of weights in {len(names)} files, of which {len(missing)} are '
      f'missing: {shown}; copy all of them beside it'
    )
  for part in names:
    (in_part, *_) = groups(_read(folder / part, _PARTS)).values()
    listed = [name for name, x in parts.items() if x == part]
    if missing := [name for name in listed if name not in in_part]:
      raise damaged(f'{part!r:.60} lacks {missing[0]!r:.60} of the index')
    tensors |= {name: in_part[name] for name in listed}
  return {'state_dict': tensors, 'metadata': {}}


# How a file starts, as a regular expression: its reader, or why it has none.
# Safetensors start with a length, which has a zero among its 8 bytes.
_STARTS: dict[bytes, _Reader | str] = {
  rb'PK\x03\x04': _read_zip,
  rb'\x80': _read_legacy,
  rb'(\xef\xbb\xbf)?\s*[{\[]([^\0]{7}|[^\0]*\Z)': _read_index,
  rb'.{8}\{': _read_safetensors,
  rb'\Z': 'an empty file; copy or download it again',
  rb'version https://git-lfs': 'a git-lfs pointer; run git lfs pull',
  rb'\s*<': 'a web page, not a checkpoint; download the file itself',
  rb'.{257}ustar': 'a tar file, as of PyTorch before 0.1.10; unpack it, take a'
  ' newer copy of the same weights, or torch.load and torch.save it once',
  rb'': 'a foreign format (starts with {!r}); give a file of torch.save or'
  ' safetensors',
}
_PARTS = {start: x for start, x in _STARTS.items() if x is not _read_index}


def _read(path: StrPath, starts: Mapping[bytes, _Reader | str]) -> Any:
  with open(path, 'rb') as file, _errors(path):
    head = file.read(512)
    file.seek(0)
    rows = starts.items()
    reader = next(x for start, x in rows if re.match(start, head, re.S))
    if not isinstance(reader, str):
      return reader(file, os.fstat(file.fileno()).st_size)
    raise TorchFileError(reader.format(head[:4]))


def read_torch(path: StrPath) -> Any:
  """Returns the object in a checkpoint, without torch and without executing it.

  Reads both formats of torch.save (0.1.10 and later), safetensors, and the JSON
  index of weights in several files beside it; the content decides, not the file
  extension. Safetensors and an index give {'state_dict': tensors, 'metadata':
  {str: str}}. Tensors and parameters become arrays, an OrderedDict becomes a
  dict. Arrays of torch.save are writable.

  Raises:
    TorchFileError: if the file is damaged, or holds anything but plain Python
      objects, NumPy scalars and tensors.
    OSError: if the file cannot be opened.
  """
  return _read(path, _STARTS)


def groups(value: Any) -> Groups:
  """Arrays of nested dicts as {'key/key/': {name: array}}; '' is the outermost.

  Lists, and the state of optimizers and schedulers, are skipped.

  Raises:
    TorchFileError: if there is no array.
  """
  arrays: Groups = {}
  seen, queue = set(), [('', value)]
  for path, inner in queue:
    # param_groups: an optimizer's. Dicts can contain themselves.
    if type(inner) is not dict or id(inner) in seen or 'param_groups' in inner:
      continue
    seen.add(id(inner))
    for key, x in inner.items():
      if type(key) is str and isinstance(x, np.ndarray):
        arrays.setdefault(path, {})[key] = x
      # Bounded: paths are joined from keys.
      elif type(key) is str and len(path) < 300 and len(key) < 100:
        if not _NO_WEIGHTS.search(key):
          queue.append((f'{path}{key}/', x))
  if not arrays:
    keys = value if type(value) is dict else ()
    shown = ', '.join(f'{pickles.as_text(key):.30}' for key in [*keys][:6])
    raise TorchFileError(
      f'no mapping of names to tensors, but {type(value).__name__} [{shown}]; '
      'save model.state_dict()'
    )
  return arrays


def read_groups(path: StrPath) -> Groups:
  """`groups` of a file; raises as read_torch does."""
  value = read_torch(path)
  with _errors(path):
    return groups(value)


def preference(path: str) -> tuple[bool, int]:
  """Sort key for paths and prefixes of networks, the most likely one first."""
  key = path.partition('/')[0]
  usual = _USUAL.index(key) if key in _USUAL else len(_USUAL)
  return is_averaged(path), usual


def is_averaged(path: str) -> bool:
  """Whether a path, a prefix or a key names a moving average of weights."""
  return bool(_AVERAGED.search(path))


def plain_names(tensors: Tensors) -> tuple[Tensors, list[str]]:
  """Removes `_orig_mod.`, `module.` and the like from names.

  Nothing is removed if two names would become the same.

  Returns:
    The tensors by their new names, and the parts that were removed.
  """
  plain = {_INSERTED.sub('', name): x for name, x in tensors.items()}
  if len(plain) < len(tensors):
    return tensors, []
  return plain, sorted({x for name in tensors for x in _INSERTED.findall(name)})


def choose(found: Groups) -> Tensors:
  """Picks the group that most likely holds the weights of the network.

  Prefers plain to averaged weights, then the usual keys, then the most tensors.
  Removes `_orig_mod.` and `module.` from names, and 'model.' if all names start
  with it.
  """

  def rank(path: str) -> tuple:
    # Without a dot: a loss, or class weights, beside the state dict.
    stray = not any('.' in name for name in found[path])
    return stray, *preference(path), -len(found[path])

  best = min(found, key=rank)
  tensors, _ = plain_names(found[best])
  if all(name.startswith('model.') for name in tensors):
    tensors = {k.removeprefix('model.'): x for k, x in tensors.items()}
  return tensors


def read_state_dict(path: StrPath) -> Tensors:
  """Arrays by name of any checkpoint; of nested dicts, those of `choose`.

  Raises as read_torch does, and TorchFileError if there is no array.
  """
  return choose(read_groups(path))


def _plain(array: np.ndarray) -> np.ndarray:
  # Safetensors silently writes wrong values of another byte order. Unlike
  # np.ascontiguousarray, this keeps a scalar a scalar.
  return np.asarray(array, array.dtype.newbyteorder('='), order='C')


def write_safetensors(
  path: StrPath,
  tensors: Mapping[str, np.ndarray],
  metadata: dict[str, str] | None = None,
) -> None:
  """Writes a safetensors file atomically.

  Raises:
    TorchFileError: if the format does not support a name, a dtype or the
      metadata.
  """
  with _errors(path, 'cannot be written'):
    plain = {name: _plain(array) for name, array in tensors.items()}
    data = safetensors.numpy.save(plain, metadata)
  with paths.replacing(path) as file:
    file.write(data)


def _literal(value: Any) -> bytes:
  return pickle.dumps(value, 2)[2:-1]  # Without PROTO and STOP.


_EMPTY_ORDERED = b'ccollections\nOrderedDict\n)R'


def _emit(
  value: Any, arrays: dict[int, tuple[int, np.ndarray]], where: str
) -> bytes:
  """Protocol 2 opcodes of `value`; adds its arrays to {id: (index, array)}."""
  if isinstance(value, np.generic):
    value = value.item()
  if value is None or type(value) in (bool, int, float, str):
    return _literal(value)
  if type(value) in (list, tuple):
    items = [_emit(x, arrays, f'{where}[{i}]') for i, x in enumerate(value)]
    first, last = (b'](', b'e') if type(value) is list else (b'(', b't')
    return first + b''.join(items) + last
  if type(value) in (dict, collections.OrderedDict):
    items = []
    for key, item in value.items():
      if type(key) not in (str, int):
        raise TorchFileError(f'cannot write key {key!r} in {where}; use str')
      items += [_literal(key), _emit(item, arrays, f'{where}[{key!r}]')]
    first = b'}' if type(value) is dict else _EMPTY_ORDERED
    return first + b'(' + b''.join(items) + b'u'
  names = {dtype.name: name for name, dtype in pickles.STORAGES.items()}
  if not isinstance(value, np.ndarray) or value.dtype.name not in names:
    kind = getattr(value, 'dtype', type(value).__name__)
    raise TorchFileError(
      f'cannot write {where}, which is {kind}; convert it to a NumPy array of'
      f' {", ".join(names)}, or leave it out'
    )
  index, _ = arrays.setdefault(id(value), (len(arrays), value))
  shape = value.shape
  strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
  storage = f'ctorch\n{names[value.dtype.name]}\n'.encode()
  parts = (
    b'ctorch._utils\n_rebuild_tensor_v2\n((' + _literal('storage') + storage,
    *map(_literal, (str(index), 'cpu', value.size)),
    b'tQ',
    *map(_literal, (0, shape, strides, False)),
    _EMPTY_ORDERED + b'tR',  # The backward hooks.
  )
  return b''.join(parts)


def write_torch(path: StrPath, obj: Any) -> None:
  """Writes a file for torch.load, also with weights_only=True; atomically.

  An array that appears twice is stored once, and torch shares its memory.

  Args:
    path: of the file.
    obj: nested dict, OrderedDict (keys str or int), list and tuple of str,
      bool, int, float, None, NumPy scalars (written as Python numbers) and
      arrays.

  Raises:
    TorchFileError: if `obj` holds anything else; nothing is written.
  """
  arrays: dict[int, tuple[int, np.ndarray]] = {}
  with _errors(path, 'cannot be written'):
    data = b'\x80\x02' + _emit(obj, arrays, 'obj') + b'.'
  records: dict[str, Any] = {
    'data.pkl': data,
    'byteorder': sys.byteorder.encode(),
  }
  for index, array in arrays.values():
    records[f'data/{index}'] = _plain(array).reshape(-1).view(np.uint8).data
  records['version'] = b'3\n'
  with paths.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
    for name, record in records.items():
      # ZipInfo has a fixed date, so that equal contents give equal files.
      info = zipfile.ZipInfo(f'archive/{name}')
      # As torch does, for memory mapping: data start at multiples of 64.
      padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
      info.extra = struct.pack('<HH', 0x4246, padding) + bytes(padding)
      archive.writestr(info, record)
