"""What the report reads of a run's directory; nothing is computed, and no program is compiled."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
import shlex
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import bounded, files, parts
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import metrics

PATH_STUDY = "progressive_generation"  # Its arrays are x̂_0 over time.
PNG_END = b"IEND\xaeB`\x82"
MOST_PICTURE = 2**28  # Bytes.
MOST_GRIDS = 40  # Of those drawn during training.
BOUND_ARRAYS = ("terms", "x0_mse", "eps_mse", "rate")  # And their errors.


@dataclasses.dataclass(frozen=True)
class Table:
    """Text in rows, all as long as `columns`."""

    columns: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[float | None]:
        """The numbers of a column; None where there is none."""
        place = self.columns.index(name)
        return [number(row[place]) for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study of figures/, see `experiments.common.Study.save`: its picture and its table.

    subject: whose it is. arrays: the file of those behind it, if they are kept.
    """

    name: str
    title: str
    notes: list[str]
    figure: bytes
    table: Table
    protocol: dict[str, Any]
    subject: dict[str, Any]
    arrays: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result; of bits/dim, the arrays of evaluation.bound.Bound; the picture kept beside it."""

    manifest: Manifest
    bound: dict[str, np.ndarray] | None
    picture: bytes | None

    @property
    def name(self) -> str:
        """The name of what was measured."""
        return self.manifest.name

    @property
    def step(self) -> int:
        """The checkpoint's."""
        return self.manifest.subject["checkpoint"]


@dataclasses.dataclass(frozen=True)
class Frames:
    """x̂_0 over the reverse process. frames: uint8 [times, samples, h, w, c]. times: [times]."""

    frames: np.ndarray
    times: list[int]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples of --mode=sample or --mode=evaluate: file, PNG, and how they were drawn if known."""

    name: str
    png: bytes
    protocol: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run's directory holds.

    Attributes:
      shown: the directory as the user named it, for commands.
      starts: the entries of provenance.json.
      records: the lines of metrics.jsonl.
      grids: {step: PNG} of the samples drawn during training, steps ascending; at most MOST_GRIDS.
      grids_there: how many there are in all.
      drawn: the grid of the newest samples drawn after training.
      results: the newest of each name and protocol.
      training: figures/training.png.
      path: None where the experiment has not been made.
    """

    directory: RunDirectory
    shown: str
    config: ml_collections.ConfigDict
    starts: list[dict[str, Any]]
    records: list[dict[str, float]]
    grids: dict[int, bytes]
    grids_there: int
    drawn: Drawn | None
    results: list[Result]
    studies: dict[str, Study]
    training: bytes | None
    path: Frames | None

    @property
    def step(self) -> int:
        """The last step of which there are metrics."""
        return self.records[-1]["step"]


def read_run(shown: str) -> RunData:
    """Everything of a run that the report shows.

    Raises:
      RequestError: no run, one without metrics, or a damaged file, which is named.
    """
    directory = RunDirectory.of(shown)
    config = directory.load_config()
    records = read_records(directory)
    if not any("loss" in record for record in records):
        raise RequestError(
            f"{directory.path}: no metrics yet (metrics.jsonl has no line of a loss); train the "
            "run on, with ddpm_jax.main and the same --workdir"
        )
    studies = _studies(directory, shown)
    grids = grid_paths(directory)
    training = directory.figures / "training.png"
    return RunData(
        directory,
        shown,
        config,
        directory.load_starts(),
        records,
        {step: read_png(grids[step]) for step in _spread(list(grids), MOST_GRIDS)},
        len(grids),
        _drawn(directory, config),
        _results(directory, shown),
        studies,
        read_png(training) if training.exists() else None,
        _frames(directory, shown, studies.get(PATH_STUDY)),
    )


def read_records(directory: RunDirectory) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that have a step, and of each what is a finite number.

    Raises:
      RequestError: there is no such line, as it is not text.
    """
    file = directory.metrics
    found = metrics.read(file) if file.exists() else []
    try:
        if not found and file.exists():
            bounded.read_text(file)
    except ValueError:
        raise RequestError(f"{file} is damaged: it is not text") from None
    return [
        {k: v for k, v in r.items() if not isinstance(v, str) and number(v) is not None}
        for r in found
        if isinstance(r, dict) and isinstance(r.get("step"), int)
    ]


def grid_paths(directory: RunDirectory) -> dict[int, epath.Path]:
    """{step: file} of the samples drawn during training, steps ascending."""
    found = {}
    for path in files.matching(directory.samples, "step_*.png"):
        if match := re.fullmatch(r"step_(\d+)", path.stem):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly chosen, with the first and the last."""
    places = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
    return [steps[k] for k in places]


def read_png(path: epath.Path) -> bytes:
    """The bytes of a PNG file.

    Raises:
      RequestError: it is not a whole one.
    """
    data = b""
    with contextlib.suppress(ValueError):
        data = bounded.read_bytes(path, MOST_PICTURE)
    try:
        with bounded.open_image(io.BytesIO(data), ("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        data = b""
    if not data.endswith(PNG_END):
        raise RequestError(f"{path} is damaged: not a whole PNG; delete it, or make it again")
    return data


def read_csv(text: str) -> Table:
    """The table in the text of a CSV file.

    Raises:
      ValueError: it was cut short, or is none.
    """
    try:
        header, *rows = csv.reader(io.StringIO(text), strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if not text.endswith("\n") or any(len(row) != len(header) for row in rows):
        raise ValueError("cut short")
    return Table(header, rows)


def number(text: Any) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if np.isfinite(value) else None


def _studies(directory: RunDirectory, shown: str) -> dict[str, Study]:
    found = {}
    for path in files.matching(directory.figures, "*.json"):
        again = (
            f"make it again with python -m experiments.{path.stem} --run={shlex.quote(shown)}, or "
            "delete it"
        )
        try:
            content = bounded.read_json(path)
            figure, table = (directory.figures / content[key] for key in ("figure", "table"))
            arrays = content.get("arrays")
            found[path.stem] = Study(
                str(content["name"]),
                str(content["title"]),
                [str(note) for note in content["notes"]],
                read_png(figure),
                read_csv(bounded.read_text(table)),
                dict(content["protocol"]),
                dict(content["subject"]),
                None if arrays is None else str(arrays),
            )
        except RequestError:
            raise RequestError(f"{figure} is damaged: not a whole PNG; {again}") from None
        except FileNotFoundError as error:
            raise RequestError(f"{path} names {error.filename}, which is gone; {again}") from None
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{path} or its table is damaged; {again}") from None
    return found


def _frames(directory: RunDirectory, shown: str, study: Study | None) -> Frames | None:
    if study is None or not study.arrays:
        return None
    path = directory.evaluation / study.arrays
    arrays = parts.read(path, ("frames", "times")) if path.exists() else None
    if arrays is None or not _are_frames(**arrays):
        raise RequestError(
            f"{path} is missing or damaged; make it again with "
            f"python -m experiments.{PATH_STUDY} --run={shlex.quote(shown)}"
        )
    order = np.argsort(-arrays["times"], kind="stable")
    return Frames(arrays["frames"][order], arrays["times"][order].tolist())


def _are_frames(frames: np.ndarray, times: np.ndarray) -> bool:
    alike = frames.ndim == 5 and frames.size and frames.shape[-1] in (1, 3)
    of_types = frames.dtype == np.uint8 and np.issubdtype(times.dtype, np.integer)
    return bool(alike and of_types and times.shape == frames.shape[:1])


def _drawn(directory: RunDirectory, config: ml_collections.ConfigDict) -> Drawn | None:
    """Of the newest checkpoint's samples those drawn as the config says, or else the last drawn."""
    how = config.sample
    asked = {
        "sampler": how.method,
        "steps": how.steps or config.diffusion.num_steps,
        "eta": how.eta,
        "clip": how.clip,
        "seed": config.seed,
    }
    steps: dict[int, list[epath.Path]] = {}
    for path in files.matching(directory.samples, "step*_grid_00000.png"):
        if match := re.match(r"step(\d+)_", path.name):
            steps.setdefault(int(match[1]), []).append(path)
    if not steps:
        return None
    found = []
    for path in steps[max(steps)]:
        name = path.name.removesuffix("_grid_00000.png")
        protocol = _protocol(path.parent / f"{name}.npz")
        order = asked.items() <= protocol.items(), files.mtime(path), name
        found.append((order, path, protocol))
    (_, _, name), path, protocol = max(found, key=lambda one: one[0])
    return Drawn(name, read_png(path), protocol)


def _protocol(samples: epath.Path) -> dict[str, Any]:
    """How the samples in a file were drawn; {} where that cannot be read."""
    arrays = parts.read(samples, ("protocol",)) if samples.exists() else None
    try:
        return dict(bounded.parse_json(str(arrays["protocol"]))) if arrays else {}
    except (ValueError, TypeError):
        return {}


def _results(directory: RunDirectory, shown: str) -> list[Result]:
    """The newest results of each name and protocol, by the names' last word."""
    again = f"run ddpm_jax.main --mode=evaluate --workdir={shlex.quote(shown)} again"
    found = []
    for path in files.matching(directory.evaluation, "step*.json"):
        try:
            found.append((manifest.load(path), path))
        except ValueError:
            raise RequestError(
                f"{path} is not a result's manifest; delete it, or {again}"
            ) from None
    found.sort(key=lambda entry: (entry[0].subject["checkpoint"], entry[0].provenance["time"]))
    newest = {(m.name, manifest.digest(m.measured.protocol)): (m, path) for m, path in found}
    results = []
    for name, protocol in sorted(newest, key=lambda key: (key[0].split("_")[-1], key)):
        m, path = newest[name, protocol]
        picture, bound = path.with_suffix(".png"), None
        arrays = m.measured.details.get("arrays")
        if name.startswith("bits_per_dim_") and arrays:
            there = directory.evaluation / str(arrays)
            bound = parts.read(there) if there.exists() else None
            if bound is None or not _are_bound(bound):
                raise RequestError(f"{there} is missing or damaged; {again}")
        results.append(Result(m, bound, read_png(picture) if picture.exists() else None))
    return results


def _are_bound(arrays: dict[str, np.ndarray]) -> bool:
    every = [arrays.get(n) for name in BOUND_ARRAYS for n in (name, f"{name}_error")]
    shapes = {None if a is None or a.dtype.kind != "f" else a.shape for a in every}
    return len(shapes) == 1 and None not in shapes and len(*shapes) == 1
