"""Features of real images, computed once and kept with the protocol that they depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import bounded, files
from ddpm_jax.config import RequestError
from ddpm_jax.data import ArraySource, Source
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import Statistics, statistics_of
from ddpm_jax.evaluation.manifest import differences
from ddpm_jax.parallel import Layout, first_hosts, from_host, to_host
from ddpm_jax.parts import collect

PROBES = 1024  # Images whose bytes tell versions of a set apart that does not fit into memory.
CHUNK = 1024  # Images read at a time.

Compute = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images' features, float32 [n, d], and what they are of."""

    features: np.ndarray
    protocol: dict[str, Any]

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Their mean and covariance, computed when first asked for: [d, d] can be too large."""
        return statistics_of(self.features)


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

    `crc32` is that of all images of the split, or of PROBES of them where they are decoded one by
    one.
    """
    checked = evenly(
        len(source), 0 if isinstance(source, ArraySource) else min(PROBES, len(source))
    )
    crc = 0
    for start in range(0, len(checked), CHUNK):
        images = source.images(checked[start : start + CHUNK])
        crc = zlib.crc32(np.ascontiguousarray(images).tobytes(), crc)
    return {
        "data": source.name,
        "split": source.split,
        "images": count or len(source),
        "of": len(source),
        "shape": list(source.image_shape),
        "crc32": f"{crc:08x}",
    }


def compile_extractor(extractor: Extractor, layout: Layout, batch: int) -> Compute:
    """`compute(images)`: an extractor over all devices, for uint8 [n, h, w, c], n ≤ batch.

    The batch is padded to its full size, a multiple of the devices, and the padding dropped.
    """
    if extractor.on_host:
        return lambda images: {
            k: np.asarray(v) for k, v in extractor.apply(extractor.params, images).items()
        }
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
    stop: Callable[[], bool] | None = None,
) -> Reference:
    """The features of real images, from their file or computed and kept.

    Args:
      extractor, compute: see `compile_extractor`.
      source: the real images.
      count: how many, spread evenly; 0 for all.
      mirror: whether their mirror images are added.
      cache_dir: where files and unfinished pieces are kept.
      file: a file of another machine's cache, or the folder of all of them, to be used instead;
        "" for none.
      batch: images at a time.
      stop: see `parts.collect`.
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
    if not file or path.is_dir():
        path = path / f"{stem}.npz"
    total = len(positions) * (2 if mirror else 1)
    there = _from_first_host(
        path, protocol, file, (total, extractor.num_features(source.image_shape))
    )
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
    found = collect(total, batch, piece, "image", say, parts, protocol, stop)
    reference = Reference(found["features"], protocol)
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
            features, state = _load(path, protocol, shape), _THERE
        except FileNotFoundError:
            error = f"no file {path}"
        except (OSError, ValueError, TypeError) as reason:
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
    return Reference(features, protocol)


def _save(path: epath.Path, reference: Reference) -> None:
    arrays = {"features": reference.features, "protocol": json.dumps(reference.protocol)}
    files.replace_with(path, lambda file: np.savez(file, **arrays))


def _load(path: epath.Path, protocol: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    there = bounded.parse_json(str(bounded.read_arrays(path, ("protocol",))["protocol"]))
    differing = differences(dict(there), json.loads(json.dumps(protocol)))
    if differing:
        key, (theirs, ours) = next(iter(differing.items()))
        raise ValueError(f"it holds features with {key}={theirs}, not {ours}")
    features = bounded.read_arrays(path, ("features",))["features"]
    if features.shape != shape or features.dtype != np.float32:
        raise ValueError(f"it holds {features.dtype} {list(features.shape)}, not float32 {shape}")
    return features
