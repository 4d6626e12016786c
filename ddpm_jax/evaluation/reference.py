"""Features of real images, computed once and kept with the protocol that they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import Statistics, statistics_of
from ddpm_jax.evaluation.manifest import differences
from ddpm_jax.parallel import Layout, first_hosts, from_host, to_host
from ddpm_jax.parts import collect

PROBES = 64  # Images whose bytes tell one version of a set from another.

Compute = Callable[[np.ndarray], dict[str, np.ndarray]]


class Reference(NamedTuple):
    """Real images' features, float32 [n, d], and what they are of."""

    features: np.ndarray
    statistics: Statistics
    protocol: dict[str, Any]


def evenly(total: int, count: int) -> np.ndarray:
    """int64 [count]: positions spread evenly over 0..total−1; all of them where count is 0.

    Raises:
      ValueError: count is more than total.
    """
    if count > total:
        raise ValueError(f"{count} images of {total}")
    count = count or total
    return np.arange(count, dtype=np.int64) * total // count


def data_protocol(source: Source, count: int) -> dict[str, Any]:
    """What tells a set of images from any other, and another version of it. JSON-able.

    `crc32` is that of PROBES images spread over the split.
    """
    probes = source.images(evenly(len(source), min(PROBES, len(source))))
    return {
        "data": source.name,
        "split": source.split,
        "images": count or len(source),
        "of": len(source),
        "shape": list(source.image_shape),
        "crc32": f"{zlib.crc32(np.ascontiguousarray(probes).tobytes()):08x}",
    }


def compile_extractor(extractor: Extractor, layout: Layout, batch: int) -> Compute:
    """`compute(images)`: an extractor over all devices, for uint8 [n, h, w, c], n ≤ batch.

    The batch is padded to its full size, a multiple of the devices, and the padding dropped.
    """
    one = layout.split(0)
    apply = jax.jit(extractor.apply, out_shardings=one)
    params = jax.device_put(extractor.params, layout.replicated)

    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        n = len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], batch - n, axis=0)])
        found = apply(params, from_host(padded, one))
        return {name: to_host(x)[:n] for name, x in found.items()}

    return compute


def load_reference(
    extractor: Extractor,
    compute: Compute,
    source: Source,
    count: int,
    mirror: bool,
    cache_dir: str,
    file: str,
    batch: int,
    say: Callable[[str], None],
) -> Reference:
    """The features of real images, from their file or computed and kept.

    Args:
      extractor, compute: see `compile_extractor`.
      source: the real images.
      count: how many, spread evenly; 0 for all.
      mirror: whether their mirror images are added.
      cache_dir: where files and unfinished pieces are kept.
      file: a file of another machine's cache, to be used instead; "" for none.
      batch: images at a time.
    Raises:
      RequestError: `file` is missing, damaged, or of another protocol.
    """
    positions = evenly(len(source), count)
    protocol = {
        **data_protocol(source, count),
        "mirror": mirror,
        "features": extractor.name,
        **extractor.identity,
    }
    text = json.dumps(protocol, sort_keys=True)
    title = f"{extractor.name}_{source.name}_{source.split}_{len(positions)}".replace("/", "_")
    stem = f"{title}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path = epath.Path(file or cache_dir).expanduser()
    path = path if file else path / f"{stem}.npz"
    total = len(positions) * (2 if mirror else 1)
    there = _from_first_host(path, protocol, file, (total, _width(extractor, source)))
    if there is not None:
        return there

    def piece(start: int, length: int) -> dict[str, np.ndarray]:
        index = np.arange(start, start + length)
        images = source.images(positions[index % len(positions)])
        flip = (index >= len(positions))[:, None, None, None]
        return {"features": compute(np.where(flip, images[:, :, ::-1], images))["features"]}

    say(f"{extractor.name}: features of {total:,} images of {source.name}/{source.split}")
    # A cache need not be shared by the hosts, as pieces on several would have to be.
    parts = path.parent / f"{stem}.parts" if jax.process_count() == 1 else None
    found = collect(total, batch, piece, "image", say, directory=parts, protocol=protocol)
    features = found["features"]
    reference = Reference(features, statistics_of(features), protocol)
    if jax.process_index() == 0:
        _save(path, reference)
    if parts is not None:
        parts.rmtree()
    return reference


_MISSING, _THERE, _REFUSED = range(3)


def _from_first_host(
    path: epath.Path, protocol: dict[str, Any], file: str, shape: tuple[int, int]
) -> Reference | None:
    """What the first host reads, on every host; None where it has no such file, or a damaged one.

    Args:
      file: the one asked for, which must be there and fit; "" where it is the cache's.
      shape: of the features.
    """
    state, features, error = _MISSING, np.zeros(shape, np.float32), None
    if jax.process_index() == 0:
        try:
            features, state = _load(path, protocol), _THERE
        except FileNotFoundError:
            error = "no such file"
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as reason:
            error = str(reason).splitlines()[0] if str(reason) else repr(reason)
            if not file:
                logging.getLogger(__name__).warning("%s is made again: %s", path, error)
        if file and error:
            state = _REFUSED
    state = int(first_hosts(np.array(state)))
    if state == _REFUSED:
        raise RequestError(f"config.evaluation.statistics={file}: {error or 'see the first host'}")
    if state == _MISSING:
        return None
    features = first_hosts(features)
    return Reference(features, statistics_of(features), protocol)


def _width(extractor: Extractor, source: Source) -> int:
    try:
        return extractor.num_features(source.image_shape)
    except ValueError as error:
        raise RequestError(f"config.evaluation.metrics: {error}") from error


def _save(path: epath.Path, reference: Reference) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=reference.features, protocol=json.dumps(reference.protocol))
    files.replace(path, buffer.getvalue())


def _load(path: epath.Path, protocol: dict[str, Any]) -> np.ndarray:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        there = json.loads(str(saved["protocol"]))
        differing = differences(there, json.loads(json.dumps(protocol)))
        if differing:
            key, (theirs, ours) = next(iter(differing.items()))
            raise ValueError(f"it holds features with {key}={theirs}, not {ours}")
        return saved["features"]
