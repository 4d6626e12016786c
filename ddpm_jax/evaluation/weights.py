"""The Inception network's weights: found where the user put them, verified, read, kept converted.

Nothing is downloaded, no checksum is skipped, and no file is parsed before its checksum is known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import numpy as np
from etils import epath
from safetensors import numpy as safetensors

from ddpm_jax import bounded, files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import inception
from ddpm_jax.evaluation.readers import read_graph, read_pickle, read_torch

MOST = 2**29  # Bytes; the accepted files have some 10^8.
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
      RequestError: no such file, it cannot be read, or it is not one of the accepted files.
    """
    accepted = ACCEPTED if accepted is None else accepted
    cache = epath.Path(cache_dir).expanduser()
    place = epath.Path(path).expanduser() if path else cache
    try:
        source = _find(place, accepted)
        data = bounded.read_bytes(source, MOST) if source else b""
    except ValueError as error:
        raise RequestError(
            f"config.evaluation.weights: {source} is another file: {error}"
        ) from error
    except OSError as error:
        raise RequestError(
            f"config.evaluation.weights: {error.filename or place} cannot be read "
            f"({error.strerror or error}); make it readable or name another file with "
            "--config.evaluation.weights=PATH"
        ) from error
    if source is None and not path and (kept := _any_converted(cache, accepted)) is not None:
        return kept
    if source is None:
        choices = " or ".join(f"{entry.names[0]} ({entry.checksum})" for entry in accepted)
        raise RequestError(
            f"config.evaluation.weights={path}: no weights of the Inception network "
            f"{'there' if path else f'in {cache}'}; get {choices}, and name the file with "
            "--config.evaluation.weights=PATH"
        )
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
    found = (_load_converted(path) for path in files.matching(cache, f"{_CONVERTED}-*.safetensors"))
    usable = [kept for kept in found if kept and known.get(kept.file_name) in ("", kept.sha256)]
    return max(usable, key=lambda kept: kept.has_logits, default=None)


def _load_converted(path: epath.Path) -> LoadedWeights | None:
    """What the file holds; None if it is missing, damaged, or not for our network."""
    try:
        state, metadata = bounded.read_tensors(path, MOST)
        has_logits = {"true": True, "false": False}[metadata["has_logits"]]
        whole = metadata["tensors_sha256"] == _digest(state)
        inception.check_shapes(state, has_logits)
        params = flax.traverse_util.unflatten_dict(state, sep="/")
        sha256, name = metadata["source_sha256"], metadata["source"]
        return LoadedWeights(params, sha256, name, has_logits) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(state: State) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {state[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(state[name]))
    return digest.hexdigest()


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
