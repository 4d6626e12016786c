"""What the report reads of a run's directory; nothing is computed, and no program is compiled."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import parts
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import metrics

PATH_STUDY = "progressive_generation"  # Its arrays are x̂_0 over time.
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


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
    """A study of figures/, see `experiments.common.Study.save`: its picture and its table."""

    name: str
    title: str
    notes: list[str]
    figure: bytes
    table: Table
    content: dict[str, Any]  # All of its JSON.


@dataclasses.dataclass(frozen=True)
class Frames:
    """x̂_0 over the reverse process. frames: uint8 [times, samples, h, w, c]. times: [times]."""

    frames: np.ndarray
    times: list[int]


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run's directory holds.

    Attributes:
      shown: the directory as the user named it, for commands.
      starts: the entries of provenance.json.
      records: the lines of metrics.jsonl.
      grids: {step: PNG} of the samples drawn during training, steps ascending.
      drawn: the newest grid of --mode=sample or --mode=evaluate: its name and PNG.
      results: the newest manifest of each name.
      bounds: {split: the arrays of evaluation.bound.Bound}, of the newest bits/dim.
      pictures: {name of a result: PNG} kept beside it.
      training: figures/training.png.
      path: None where the experiment has not been made.
    """

    directory: RunDirectory
    shown: str
    config: ml_collections.ConfigDict
    starts: list[dict[str, Any]]
    records: list[dict[str, Any]]
    grids: dict[int, bytes]
    drawn: tuple[str, bytes] | None
    results: dict[str, Manifest]
    bounds: dict[str, dict[str, np.ndarray]]
    pictures: dict[str, bytes]
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
    studies = _studies(directory, shown)
    drawn = sorted(
        directory.samples.glob("*_grid_*0.png"),
        key=lambda path: (path.stat().mtime, path.name.replace("_grid_0", "_grid_")),
    )
    first = drawn and drawn[-1].parent / re.sub(r"_grid_\d+", "_grid_00000", drawn[-1].name)
    if first and not first.exists():
        first = drawn[-1]
    results, bounds, pictures = _results(directory, shown)
    training = directory.figures / "training.png"
    return RunData(
        directory,
        shown,
        config,
        directory.load_starts(),
        records,
        read_grids(directory),
        (first.stem, read_png(first)) if first else None,
        results,
        bounds,
        pictures,
        studies,
        read_png(training) if training.exists() else None,
        _frames(directory, shown, studies.get(PATH_STUDY)),
    )


def read_records(directory: RunDirectory) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    Raises:
      RequestError: there are none yet.
    """
    try:
        records = metrics.read(directory.metrics) if directory.metrics.exists() else []
    except UnicodeDecodeError:
        raise RequestError(f"{directory.metrics} is damaged: it is not text") from None
    records = [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]
    if not any("loss" in record for record in records):
        raise RequestError(
            f"{directory.path}: no metrics yet (metrics.jsonl has no line of a loss); train the "
            "run on, with ddpm_jax.main and the same --workdir"
        )
    return records


def read_grids(directory: RunDirectory) -> dict[int, bytes]:
    """{step: PNG} of the samples drawn during training, steps ascending."""
    found = {}
    for path in sorted(directory.samples.glob("step_*.png")):
        if match := re.fullmatch(r"step_(\d+)", path.stem):
            found[int(match[1])] = read_png(path)
    return found


def read_png(path: epath.Path) -> bytes:
    """The bytes of a PNG file.

    Raises:
      RequestError: it is not a whole one.
    """
    data = path.read_bytes()
    if not data.startswith(PNG_START) or not data.endswith(PNG_END):
        raise RequestError(f"{path} is damaged: not a whole PNG; delete it, or make it again")
    return data


def read_csv(text: str) -> Table:
    """The table in the text of a CSV file, rows filled up or cut to its header's length."""
    header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    width = len(header)
    return Table(header, [(row + [""] * width)[:width] for row in rows if row])


def number(text: Any) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _studies(directory: RunDirectory, shown: str) -> dict[str, Study]:
    found = {}
    for path in sorted(directory.figures.glob("*.json")):
        again = f"make it again with python -m experiments.{path.stem} --run={shown}, or delete it"
        try:
            content = json.loads(path.read_text())
            figure, table = (directory.figures / content[key] for key in ("figure", "table"))
            found[path.stem] = Study(
                str(content["name"]),
                str(content["title"]),
                [str(note) for note in content["notes"]],
                read_png(figure),
                read_csv(table.read_text()),
                content,
            )
        except RequestError:
            raise RequestError(f"{figure} is damaged: not a whole PNG; {again}") from None
        except FileNotFoundError as error:
            raise RequestError(f"{path} names {error.filename}, which is gone; {again}") from None
        except (ValueError, KeyError, TypeError, csv.Error):
            raise RequestError(f"{path} is not a study's file; {again}") from None
    return found


def _frames(directory: RunDirectory, shown: str, study: Study | None) -> Frames | None:
    if study is None or not study.content.get("arrays"):
        return None
    path = directory.evaluation / study.content["arrays"]
    arrays = parts.read(path, ("frames", "times")) if path.exists() else None
    if arrays is None:
        raise RequestError(
            f"{path} is missing or damaged; make it again with "
            f"python -m experiments.{PATH_STUDY} --run={shown}"
        )
    order = np.argsort(-arrays["times"], kind="stable")
    return Frames(arrays["frames"][order], arrays["times"][order].tolist())


def _results(
    directory: RunDirectory, shown: str
) -> tuple[dict[str, Manifest], dict[str, dict[str, np.ndarray]], dict[str, bytes]]:
    """The newest manifests, by the names' last word; the arrays of bits/dim; pictures."""
    again = f"run ddpm_jax.main --mode=evaluate --workdir={shown} again"
    found = []
    for path in directory.evaluation.glob("step*.json"):
        try:
            found.append((manifest.load(path), path))
        except ValueError:
            raise RequestError(
                f"{path} is not a result's manifest; delete it, or {again}"
            ) from None
    found.sort(key=lambda entry: (entry[0].subject["checkpoint"], entry[0].provenance["time"]))
    newest = {m.name: (m, path) for m, path in found}
    names = sorted(newest, key=lambda name: (name.split("_")[-1], name))
    bounds, pictures = {}, {}
    for name in names:
        m, path = newest[name]
        picture = path.with_suffix(".png")
        if picture.exists():
            pictures[name] = read_png(picture)
        arrays = m.measured.details.get("arrays")
        if name.startswith("bits_per_dim_") and arrays:
            there = directory.evaluation / arrays
            read = parts.read(there) if there.exists() else None
            if read is None or "terms" not in read:
                raise RequestError(f"{there} is missing or damaged; {again}")
            bounds[name.removeprefix("bits_per_dim_")] = read
    return {name: newest[name][0] for name in names}, bounds, pictures
