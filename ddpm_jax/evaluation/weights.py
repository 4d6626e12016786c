"""The Inception network's weights: found where the user put them, verified, read, kept converted.

Nothing is downloaded, no checksum is skipped, and no file is parsed before its checksum is known.
PyTorch's files and pickles are read without running any code of theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pickle import Unpickler, UnpicklingError
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile

import flax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import inception

State = dict[str, np.ndarray]  # "module/…/leaf" -> array, named as in our network.


class LoadedWeights(NamedTuple):
    """A network's parameters and where they are from.

    params: nested dicts of float32 arrays, for `Inception(with_logits=has_logits)`.
    sha256: of the user's file.
    file_name: the name by which that file is known.
    has_logits: whether the layer of the 1008 classes is among them.
    """

    params: dict[str, Any]
    sha256: str
    file_name: str
    has_logits: bool


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A published file of the weights.

    names: the file's names, the usual one first.
    to_state: reads its bytes, by then verified.
    sha256, md5: its checksum; md5 together with `size` where no SHA-256 was ever published.
    size: in bytes, where known.
    has_logits: whether it has the layer of the 1008 classes.
    """

    names: tuple[str, ...]
    to_state: Callable[[bytes], State]
    sha256: str = ""
    md5: str = ""
    size: int = 0
    has_logits: bool = True

    @property
    def checksum(self) -> str:
        return f"sha256 {self.sha256}" if self.sha256 else f"md5 {self.md5}"


def load_inception(
    path: str, cache_dir: str, accepted: tuple[Accepted, ...] | None = None
) -> LoadedWeights:
    """The weights in the user's file, converted once into `cache_dir`.

    Args:
      path: one of the accepted files, under whatever name; or a directory that holds one under its
        own name; or "", which is `cache_dir`, where the converted file alone is enough.
      cache_dir: made if needed. Where nothing can be written, a warning says so.
      accepted: the table of known files, by default ACCEPTED.
    Raises:
      RequestError: no such file, or not one of the accepted files.
    """
    accepted = ACCEPTED if accepted is None else accepted
    cache = epath.Path(cache_dir).expanduser()
    source = _find(epath.Path(path).expanduser() if path else cache, accepted)
    if source is None and not path and (kept := _any_converted(cache, accepted)) is not None:
        return kept
    if source is None:
        choices = " or ".join(f"{entry.names[0]} ({entry.checksum})" for entry in accepted)
        raise RequestError(
            f"config.evaluation.weights={path}: no weights of the Inception network "
            f"{'there' if path else f'in {cache}'}; get {choices}, and name the file with "
            "--config.evaluation.weights=PATH"
        )
    data = source.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    entry = _identify(source, data, sha256, accepted)
    converted = cache / f"{_CONVERTED}-{sha256[:16]}.safetensors"
    kept = _load_converted(converted)
    if kept is not None and kept.sha256 == sha256:
        return kept
    try:
        state = entry.to_state(data)
        inception.check_shapes(state, entry.has_logits)
    except ValueError as error:
        raise RequestError(
            f"config.evaluation.weights: {source} cannot be used: {error}"
        ) from error
    _save_converted(converted, state, sha256, entry)
    params = flax.traverse_util.unflatten_dict(state, sep="/")
    return LoadedWeights(params, sha256, entry.names[0], entry.has_logits)


def _find(place: epath.Path, accepted: tuple[Accepted, ...]) -> epath.Path | None:
    if place.exists() and not place.is_dir():
        return place
    names = (place / name for entry in accepted for name in entry.names)
    return next((name for name in names if name.exists()), None)


def _identify(
    path: epath.Path, data: bytes, sha256: str, accepted: tuple[Accepted, ...]
) -> Accepted:
    """Which of the accepted files this is, by its bytes alone."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    for entry in accepted:
        same = entry.sha256 == sha256 if entry.sha256 else entry.md5 == md5
        if same and entry.size in (0, len(data)):
            return entry
    namesakes = [entry for entry in accepted if path.name in entry.names]
    expected = " or ".join(
        f"{entry.names[0]} ({f'{entry.size:,} bytes, ' if entry.size else ''}{entry.checksum})"
        for entry in namesakes or accepted
    )
    raise RequestError(
        f"config.evaluation.weights: {path} is damaged or another file: it has {len(data):,} "
        f"bytes, sha256 {sha256}, md5 {md5}; expected is {expected}; get that file again"
    )


# The converted file.

_CONVERTED = "inception-2015-12-05"


def _save_converted(path: epath.Path, state: State, sha256: str, entry: Accepted) -> None:
    metadata = {
        "source": entry.names[0],
        "source_sha256": sha256,
        "has_logits": json.dumps(entry.has_logits),
        "tensors_sha256": _digest(state),
    }
    try:
        files.replace(path, safetensors.save(state, metadata))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: cannot keep the converted weights there (%s); converting them each time",
            path.parent,
            error.strerror or error,
        )


def _any_converted(cache: epath.Path, accepted: tuple[Accepted, ...]) -> LoadedWeights | None:
    known = {entry.names[0]: entry.sha256 for entry in accepted}
    found = (_load_converted(path) for path in sorted(cache.glob(f"{_CONVERTED}-*.safetensors")))
    usable = [kept for kept in found if kept and known.get(kept.file_name) in ("", kept.sha256)]
    return max(usable, key=lambda kept: kept.has_logits, default=None)


def _load_converted(path: epath.Path) -> LoadedWeights | None:
    """What the file holds; None if it is missing, damaged, or not for our network."""
    try:
        data = path.read_bytes()
        state = safetensors.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        has_logits = json.loads(metadata["has_logits"])
        whole = metadata["tensors_sha256"] == _digest(state)
        inception.check_shapes(state, has_logits)
        params = flax.traverse_util.unflatten_dict(state, sep="/")
        sha256, name = metadata["source_sha256"], metadata["source"]
        return LoadedWeights(params, sha256, name, has_logits) if whole else None
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _digest(state: State) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {state[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(state[name]))
    return digest.hexdigest()


# The readers.


class _Unpickler(Unpickler):
    """Knows the given classes and functions, and refuses all others."""

    def __init__(self, file: BinaryIO, known: Mapping[str, Any]):
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._known:
            raise ValueError(f"it asks to run {module}.{name}, which a file of weights need not")
        return self._known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise ValueError("it has a tensor of an unknown kind")
        return _Storage(dtype, key, count)


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_STORAGES = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4"}
_TORCH = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": lambda *args: _Tensor(*args[:4]),
    **{f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


_BROKEN = (AttributeError, EOFError, KeyError, UnpicklingError, struct.error, BadZipFile)


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """name -> array of a state dict that `torch.save` wrote, in its zip format or the older one.

    Raises:
      ValueError: it is no such file, or holds anything but tensors.
    """
    try:
        tree, storages = _torch_zip(data) if data[:2] == b"PK" else _torch_legacy(data)
        return {name: _torch_array(tensor, storages) for name, tensor in tree.items()}
    except _BROKEN as error:
        raise ValueError("it is not a whole file of PyTorch tensors") from error


def _torch_zip(data: bytes) -> tuple[Any, dict[str, bytes]]:
    with ZipFile(io.BytesIO(data)) as archive:
        contents = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    if contents.get("byteorder", b"little") != b"little":
        raise ValueError("it was written on a big-endian machine")
    tree = _Unpickler(io.BytesIO(contents["data.pkl"]), _TORCH).load()
    return tree, {name.removeprefix("data/"): content for name, content in contents.items()}


def _torch_legacy(data: bytes) -> tuple[Any, dict[str, bytes]]:
    file = io.BytesIO(data)
    magic, version, machine, tree, keys = (_Unpickler(file, _TORCH).load() for _ in range(5))
    if (magic, version, machine["little_endian"]) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise ValueError("it is of an unknown format")
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tree.values()}
    storages = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storages[key] = file.read(count * sizes[key])
    return tree, storages


def _torch_array(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = tensor
    buffer = storages[storage.key]
    if len(buffer) != storage.count * storage.dtype.itemsize:
        raise ValueError("a tensor's storage is not whole")
    flat = np.frombuffer(buffer, storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(offset, 0, *strides) < 0 or last >= len(flat):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False)


def read_graph(data: bytes) -> dict[str, np.ndarray]:
    """name -> array of the float32 constants in a frozen graph of TensorFlow (a `GraphDef`).

    Raises:
      ValueError: it is no such file.
    """
    constants = {}
    for number, node in _fields(memoryview(data)):
        fields = [*_fields(node)] if number == 1 else []  # 1 name, 2 op, 5 attributes.
        if bytes(dict(fields).get(2, b"")) != b"Const":
            continue
        attributes = [dict(_fields(value)) for number, value in fields if number == 5]
        values = [dict(_fields(a[2])) for a in attributes if bytes(a[1]) == b"value"]
        array = _tensor_proto(values[0][8])
        if array is not None:
            constants[bytes(dict(fields)[1]).decode()] = array
    return constants


def _tensor_proto(data: memoryview) -> np.ndarray | None:
    """A TensorProto's array; None if it is not float32."""
    fields = [*_fields(data)]
    if dict(fields).get(1) != 1:
        return None
    dims = [dim for number, shape in fields if number == 2 for _, dim in _fields(shape)]
    shape = [dict(_fields(dim)).get(1, 0) for dim in dims]
    content = b"".join(bytes(value) for number, value in fields if number in (4, 5))
    values = np.frombuffer(content, "<f4")
    if values.size == 1:  # One value stands for all.
        values = np.broadcast_to(values, int(np.prod(shape)))
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
                raise ValueError("it is not a whole protocol buffer")
            value = data[position : position + length]
            position += length
        yield tag >> 3, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("it is not a whole protocol buffer")
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


_RECONSTRUCT, _FROM_BUFFER = (np.empty(0).__reduce_ex__(protocol)[0] for protocol in (4, 5))
_NUMPY = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _FROM_BUFFER,
    "numpy._core.numeric._frombuffer": _FROM_BUFFER,
}


def read_pickle(data: bytes) -> dict[str, Any]:
    """A pickle of nested dicts of NumPy arrays.

    Raises:
      ValueError: it holds anything else.
    """
    tree = _Unpickler(io.BytesIO(data), _NUMPY).load()
    arrays = flax.traverse_util.flatten_dict(tree).values() if isinstance(tree, dict) else [None]
    if not all(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in arrays):
        raise ValueError("it is not nested dicts of float32 arrays")
    return tree


ACCEPTED = (
    Accepted(
        names=(
            "pt_inception-2015-12-05-6726825d.pth",
            "weights-inception-2015-12-05-6726825d.pth",
        ),
        to_state=lambda data: inception.from_torch_state(read_torch(data)),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
    ),
    Accepted(
        names=("classify_image_graph_def.pb",),
        to_state=lambda data: inception.from_tf_constants(read_graph(data)),
        md5="e6bb154e85f5d4331c22abcddb5dcf31",
        size=95_673_916,
    ),
    Accepted(
        names=("inception_v3_weights_fid.pickle",),
        to_state=lambda data: inception.from_jax_fid(read_pickle(data)),
        sha256="4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77",
        has_logits=False,
    ),
)
