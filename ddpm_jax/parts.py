"""Long work in pieces: shown, interruptible, and kept until all of it is there."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.parallel import wait_for_all
from ddpm_jax.progress import Progress

Arrays = dict[str, np.ndarray]


def collect(
    count: int,
    batch: int,
    compute: Callable[[int, int], Arrays],
    unit: str,
    say: Callable[[str], None],
    directory: epath.Path | None = None,
    protocol: dict[str, Any] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Arrays:
    """compute(start, length) over 0..count in pieces of at most `batch`, joined along axis 0.

    With a directory each piece is kept there as soon as it is computed, and the same call goes on
    after the pieces that are there. Whoever calls removes the directory when the whole is saved.

    Args:
      compute: gives arrays [length, ...] (or of any length: they are joined in order), the same on
        every host.
      unit: what is counted, in the singular.
      say: prints a line.
      directory: of the pieces, on a disk that all hosts share; None keeps nothing.
      protocol: JSON-able: what the pieces depend on.
      stop: whether to stop, instead of asking for SIGINT and SIGTERM here.
    Raises:
      RequestError: the pieces there were made under another protocol, or cannot be read.
      Interrupted: `stop` said so, or a signal came; after the current piece.
    """
    pieces: dict[int, tuple[int, Arrays]] = {}
    first_host = jax.process_index() == 0
    if directory is not None:
        _check_protocol(directory, protocol)
        pieces = {start: (length, _read(path)) for start, length, path in _kept(directory)}
        wait_for_all(f"parts of {directory}")  # Nobody writes before all have listed.
        if first_host:
            files.replace(directory / "protocol.json", json.dumps(protocol))
    progress = Progress(0, count, first_host, say, unit)
    with contextlib.nullcontext() if stop else Watch() as watch:
        asked = stop or watch.asked
        for start, length in missing({s: n for s, (n, _) in pieces.items()}, count, batch):
            if asked():
                progress.close()
                done = sum(n for n, _ in pieces.values())
                where = f" are in {directory}; the same command goes on" if directory else " done"
                raise Interrupted(f"{done} of {count} {unit}s{where}")
            arrays = compute(start, length)
            if directory is not None and first_host:
                files.replace(directory / f"{start:08d}_{length}.npz", _to_bytes(arrays))
            pieces[start] = (length, arrays)
            progress.update(start + length)
    progress.close()
    ordered = [pieces[start][1] for start in sorted(pieces)]
    return {name: np.concatenate([arrays[name] for arrays in ordered]) for name in ordered[0]}


def missing(there: dict[int, int], count: int, batch: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces still to compute, around those there: {start: length}."""
    gaps, start = [], 0
    while start < count:
        if start not in there:
            end = min([start + batch, count, *(s for s in there if s > start)])
            gaps.append((start, end - start))
            start = end
        else:
            start += there[start]
    return gaps


def _kept(directory: epath.Path) -> list[tuple[int, int, epath.Path]]:
    found = sorted(directory.glob("*.npz"), key=lambda path: path.name)
    return [(*map(int, path.stem.split("_")), path) for path in found]


def _check_protocol(directory: epath.Path, protocol: dict[str, Any]) -> None:
    file = directory / "protocol.json"
    if not file.exists():
        return
    before, now = json.loads(file.read_text()), json.loads(json.dumps(protocol))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise RequestError(
                f"{directory} was begun with {key}={before.get(key)}, not {now.get(key)}; "
                "delete the directory to start again"
            )


def _to_bytes(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read(path: epath.Path) -> Arrays:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            return dict(saved)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path} cannot be read ({error}); delete it and go on") from error
