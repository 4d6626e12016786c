"""Readers of other libraries' files of weights, which run nothing and trust nothing in them.

A pickle's calls are noted and not made. Memory is only taken for what a file really holds, and
whatever is wrong with a file, the answer is a ValueError.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pickle import Unpickler
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import numpy as np

Reader = Callable[[bytes], dict[str, Any]]


class _FileError(ValueError):
    """What is wrong, in words for the user."""


def _reader_of(what: str) -> Callable[[Reader], Reader]:
    """Turns whatever a reader raises into a ValueError."""

    def decorate(read: Reader) -> Reader:
        @functools.wraps(read)
        def reader(data: bytes) -> dict[str, Any]:
            try:
                return read(data)
            except _FileError as error:
                raise ValueError(str(error)) from error
            except Exception as error:  # A crafted file raises errors of every kind.
                raise ValueError(f"it is not a whole {what}") from error

        return reader

    return decorate


# Pickles.


class _Named(NamedTuple):
    """A class or function that a pickle names; calling it only notes the call."""

    name: str

    def __call__(self, *args: Any) -> _Call:
        return _Call(self.name, args)


class _Call:
    """A call that a pickle asks for, and the state that it gives the result."""

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(Unpickler):
    """Knows the given names, and refuses all others."""

    def __init__(self, file: BinaryIO, known: Collection[str]):
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in self._known:
            raise _FileError(f"it asks to run {full}, which a file of weights need not")
        return OrderedDict if full == "collections.OrderedDict" else _Named(full)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view) or type(count) is not int:
            raise _FileError("it has a tensor of an unknown kind")
        return _Storage(_STORAGES[dtype.name], key, count)


def _unpickle(file: BinaryIO, known: Collection[str]) -> Any:
    """The next pickle in the file."""
    start = file.tell()
    for operation, argument, _ in pickletools.genops(file):
        # The table of what was kept for later is made as large as its largest index.
        if operation.name.endswith("PUT") and argument > file.tell():
            raise _FileError("it is a pickle with a wrong index")
    file.seek(start)
    return _Unpickler(file, known).load()


def _sizes(values: Any) -> tuple[int, ...]:
    """Checked to be sizes or places: ints that are not negative."""
    if type(values) is not tuple or not all(type(n) is int and n >= 0 for n in values):
        raise _FileError("it has an array with sizes that are none")
    return values


def _text(name: Any) -> str:
    if type(name) is not str:
        raise _FileError("it has a name that is no text")
    return name


# PyTorch's files.


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


_REBUILD = "torch._utils._rebuild_tensor_v2"
_DTYPES = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4"}
_STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _DTYPES.items()}
_TORCH = {"collections.OrderedDict", _REBUILD, *_STORAGES}


@_reader_of("file of PyTorch tensors")
def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """name -> array of a state dict that `torch.save` wrote, in its zip format or the older one.

    Raises:
      ValueError: it is no such file, or holds anything but tensors.
    """
    tree, storages = _torch_zip(data) if data[:2] == b"PK" else _torch_legacy(data)
    return {_text(name): _torch_array(tensor, storages) for name, tensor in tree.items()}


def _torch_zip(data: bytes) -> tuple[Any, dict[str, bytes]]:
    with ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        members = {info.filename.partition("/")[2]: info for info in infos}
        # Of stored members that do not overlap, none is larger than the file.
        if any(info.compress_type != ZIP_STORED for info in infos):
            raise _FileError("it is compressed, as no file of torch.save is")
        if sum(info.file_size for info in infos) > len(data):
            raise _FileError("its members are larger than itself")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise _FileError("it was written on a big-endian machine")
        tree = _unpickle(io.BytesIO(archive.read(members["data.pkl"])), _TORCH)
        keys = {tensor.args[0].key for tensor in tree.values()}
        return tree, {key: archive.read(members[f"data/{key}"]) for key in keys}


def _torch_legacy(data: bytes) -> tuple[Any, dict[str, bytes]]:
    file = io.BytesIO(data)
    magic, version, machine, tree, keys = (_unpickle(file, _TORCH) for _ in range(5))
    if (magic, version, machine["little_endian"]) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise _FileError("it is of an unknown format")
    known = {tensor.args[0].key: tensor.args[0] for tensor in tree.values()}
    storages = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != known[key].count:
            raise _FileError("a tensor's storage is not whole")
        storages[key] = file.read(known[key].num_bytes)
    return tree, storages


def _torch_array(tensor: _Call, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = tensor.args[:4]
    buffer = storages[storage.key]
    if tensor.name != _REBUILD or len(buffer) != storage.num_bytes:
        raise _FileError("a tensor's storage is not whole")
    _sizes((offset, *_sizes(shape), *_sizes(strides)))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    repeats = any(n > 1 and stride == 0 for n, stride in zip(shape, strides, strict=True))
    if repeats or math.prod(shape) > storage.count or last >= storage.count:
        raise _FileError("a tensor reaches beyond its storage")
    flat = np.frombuffer(buffer, storage.dtype)
    strides = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False)


# TensorFlow's frozen graphs.

_MOST = 2**22  # Values for which one may stand; no layer of the network has as many.


@_reader_of("graph of TensorFlow")
def read_graph(data: bytes) -> dict[str, np.ndarray]:
    """name -> array of the float32 constants in a frozen graph of TensorFlow (a `GraphDef`).

    Raises:
      ValueError: it is no such file.
    """
    constants = {}
    for number, node in _fields(memoryview(data)):
        fields = [*_fields(node)] if number == 1 else []  # 1 name, 2 op, 5 attributes.
        if str(dict(fields).get(2, b""), "utf-8") != "Const":
            continue
        attributes = [dict(_fields(value)) for number, value in fields if number == 5]
        values = [dict(_fields(a[2])) for a in attributes if str(a[1], "utf-8") == "value"]
        array = _tensor_proto(values[0][8])
        if array is not None:
            constants[str(dict(fields)[1], "utf-8")] = array
    return constants


def _tensor_proto(data: memoryview) -> np.ndarray | None:
    """A TensorProto's array; None if it is not float32."""
    fields = [*_fields(data)]
    if dict(fields).get(1) != 1:
        return None
    dims = [dim for number, shape in fields if number == 2 for _, dim in _fields(shape)]
    shape = [dict(_fields(dim)).get(1, 0) for dim in dims]
    values = np.frombuffer(b"".join(value for number, value in fields if number in (4, 5)), "<f4")
    count = math.prod(shape)
    if values.size == 1 and count <= _MOST:  # One value stands for all.
        values = np.broadcast_to(values, count)
    if values.size != count:
        raise _FileError("it has a constant of another size than its shape")
    return values.reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields; values are ints or bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 0:
            value, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                length, position = _varint(data, position)
            if length is None or position + length > len(data):
                raise _FileError("it is not a whole protocol buffer")
            value = data[position : position + length]
            position += length
        yield tag >> 3, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise _FileError("it is not a whole protocol buffer")
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


# Pickles of NumPy arrays.

_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_NUMPY = {"numpy.ndarray", "numpy.dtype", *_RECONSTRUCT, *_FROM_BUFFER}
_NO_ARRAYS = "it is not nested dicts of float32 arrays"


@_reader_of("pickle of arrays")
def read_pickle(data: bytes) -> dict[str, Any]:
    """A pickle of nested dicts of NumPy's float32 arrays.

    Raises:
      ValueError: it holds anything else.
    """
    tree = _unpickle(io.BytesIO(data), _NUMPY)
    if type(tree) is not dict:
        raise _FileError(_NO_ARRAYS)
    return _arrays(tree, set())


def _arrays(tree: dict[str, Any], seen: set[int]) -> dict[str, Any]:
    if id(tree) in seen:  # Dicts in one another would unfold without end.
        raise _FileError("it has a dict in two places")
    seen.add(id(tree))
    return {
        _text(name): _arrays(value, seen) if type(value) is dict else _numpy_array(value)
        for name, value in tree.items()
    }


def _numpy_array(call: Any) -> np.ndarray:
    """The array that a pickle describes, over the pickle's own bytes."""
    if type(call) is not _Call or call.name not in _RECONSTRUCT | _FROM_BUFFER:
        raise _FileError(_NO_ARRAYS)
    if call.name in _RECONSTRUCT:
        _, shape, dtype, transposed, content = call.state
        order = "F" if transposed else "C"
    else:
        content, dtype, shape, order = call.args
    plain = type(dtype) is _Call and dtype.name == "numpy.dtype" and dtype.args[:1] == ("f4",)
    # The version, the byte order, and no fields, parts or flags.
    if not plain or dtype.state != (3, "<", None, None, None, -1, -1, 0):
        raise _FileError(_NO_ARRAYS)
    if type(content) not in (bytes, bytearray) or len(content) != 4 * math.prod(_sizes(shape)):
        raise _FileError("it has an array that is not whole")
    return np.frombuffer(content, "<f4").reshape(shape, order=order)
