"""Long work in pieces: shown, interruptible, and kept until all of it is there."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import bounded, files, session
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.parallel import wait_for_all
from ddpm_jax.progress import Progress, duration

LONG_SECONDS = 90  # What takes longer is announced.

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
    after the whole pieces that are there. Whoever calls removes the directory when all is saved.

    Args:
      compute: gives arrays [length, ...] (or of any length: they are joined in order), the same on
        every host.
      unit: what is counted, in the singular.
      say: prints a line.
      directory: of the pieces, on a disk that all hosts share; None keeps nothing.
      protocol: JSON-able: what the pieces depend on.
      stop: whether to stop, instead of asking for SIGINT and SIGTERM here.
    Raises:
      RequestError: the pieces there were made under another protocol.
      Interrupted: `stop` said so, or a signal came; after the current piece.
    """
    pieces: dict[int, tuple[int, Arrays]] = {}
    first_host = jax.process_index() == 0
    if directory is not None:
        _check_protocol(directory, protocol)
        pieces = _agreed(directory, _kept(directory))
        wait_for_all(f"parts of {directory}")  # Nobody writes before all have listed.
        if first_host:
            files.replace(directory / "protocol.json", json.dumps(protocol))
    done, computed = sum(length for length, _ in pieces.values()), 0
    progress = Progress(done, count, first_host, say, unit)
    with contextlib.nullcontext() if stop else Watch() as watch:
        asked = stop or watch.asked
        for start, length in missing({s: n for s, (n, _) in pieces.items()}, count, batch):
            if asked():
                progress.close()
                where = f" are in {directory}; the same command goes on" if directory else " done"
                raise Interrupted(f"{done} of {count} {unit}s{where}")
            began = time.monotonic()
            arrays = compute(start, length)
            if directory is not None and first_host:
                path = directory / f"{start:08d}_{length}.npz"
                files.replace_with(path, lambda file, arrays=arrays: np.savez(file, **arrays))
            pieces[start] = (length, arrays)
            done, computed = done + length, computed + 1
            if computed == 2:  # The first one was compiled as well.
                left = (time.monotonic() - began) * (count - done) / length
                if left > LONG_SECONDS:
                    say(f"{count - done:,} {unit}s more: about {duration(left)}")
            progress.update(done)
    progress.close()
    ordered = [pieces.pop(start)[1] for start in sorted(pieces)]
    return {
        name: np.concatenate([arrays.pop(name) for arrays in ordered]) for name in [*ordered[0]]
    }


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


def read(path: epath.Path, names: Sequence[str] = ()) -> Arrays | None:
    """The arrays of an .npz file, or those named; None, with a warning, where it is damaged."""
    try:
        return bounded.read_arrays(path, names)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        logging.getLogger(__name__).warning("%s cannot be read: %s", path, reason)
        return None


def _kept(directory: epath.Path) -> dict[int, tuple[int, Arrays]]:
    """The whole pieces there, none over another: {start: (length, arrays)}."""
    kept, end = {}, 0
    for path in files.matching(directory, "*.npz"):
        name = re.fullmatch(r"(\d{8})_(\d+)", path.stem)
        if name is None or int(name[1]) < end:
            continue
        arrays = read(path)
        if arrays is not None:
            kept[int(name[1])] = int(name[2]), arrays
            end = int(name[1]) + int(name[2])
    return kept


def _agreed(
    directory: epath.Path, kept: dict[int, tuple[int, Arrays]]
) -> dict[int, tuple[int, Arrays]]:
    """The pieces that the first host has: all hosts must compute the same ones.

    Raises:
      RequestError: this host cannot read one of them.
    """
    found = session.gather("listing pieces", [[s, n] for s, (n, _) in kept.items()])[0]
    for start, length in found:
        if start not in kept or kept[start][0] != length:
            raise RequestError(
                f"piece {start} in {directory} cannot be read on every host; delete the directory"
            )
    return {start: kept[start] for start, _ in found}


def _check_protocol(directory: epath.Path, protocol: dict[str, Any]) -> None:
    file = directory / "protocol.json"
    try:
        before = dict(bounded.read_json(file)) if file.exists() else protocol
    except (TypeError, ValueError):
        before = {}
    now = json.loads(json.dumps(protocol))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise RequestError(
                f"{directory} was begun with {key}={before.get(key)}, not {now.get(key)}; "
                "delete the directory to start again"
            )
