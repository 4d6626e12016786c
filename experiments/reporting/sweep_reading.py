"""What the report reads of a sweep's directory."""

from __future__ import annotations

import dataclasses
import datetime
import re
import shlex

import ml_collections
from etils import epath

from ddpm_jax import bounded, files
from ddpm_jax.config import RequestError
from ddpm_jax.runs import RunDirectory
from experiments.reporting.reading import Table, grid_paths, read_csv, read_png, read_records

TABLE = "results.csv"  # What makes a directory that of a sweep.
COMMAND = r"python -m experiments\.sweep .+"


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A line of results.csv with its run. config: None before its first start.

    starts: the entries of provenance.json. grid: PNG of its newest samples.
    """

    cell: str
    seed: str
    status: str
    directory: RunDirectory
    config: ml_collections.ConfigDict | None
    starts: list[dict]
    records: list[dict[str, float]]
    grid: bytes | None

    @property
    def label(self) -> str:
        """It in words."""
        return f"{self.cell}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class SweepData:
    """What a sweep's directory holds.

    table, written: of results.csv, and when that was. text: results.md. figure: results.png.
    """

    path: epath.Path
    shown: str
    table: Table
    written: str
    text: str
    figure: bytes | None
    runs: list[SweepRun]

    @property
    def cells(self) -> list[str]:
        """The cells' names, in the table's order."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    def command(self, more: str = "") -> str:
        """The sweep's own command, as results.md has it, and `more`."""
        found = re.search(f"^{COMMAND}$", self.text, re.MULTILINE)
        return f"{found[0] if found else sweep_command(self.shown)} {more}".strip()


def sweep_command(shown: str) -> str:
    """The command of the sweep in a directory, its file unknown."""
    return f"python -m experiments.sweep --sweep=FILE --workdir={shlex.quote(shown)}"


def is_sweep(shown: str) -> bool:
    """Whether the directory is a sweep's, and no run's."""
    directory = RunDirectory.of(shown)
    return (directory.path / TABLE).exists() and not directory.config.exists()


def read_sweep(shown: str) -> SweepData:
    """Everything of a sweep that the report shows.

    Raises:
      RequestError: no table of results, or a damaged file, which is named.
    """
    path = RunDirectory.of(shown).path
    file, text, figure = path / TABLE, path / "results.md", path / "results.png"
    again = f"{sweep_command(shown)} --mode=table makes it"
    if not file.exists():
        raise RequestError(f"{path}: no results of a sweep there (no {TABLE}); {again}")
    try:
        found = read_csv(bounded.read_text(file))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"{file} is damaged ({reason}); {again} again") from None
    if not {"cell", "seed", "status"} <= {*found.columns} or not found.rows:
        raise RequestError(f"{file} has no runs with cell, seed and status; {again}")
    try:
        markdown = bounded.read_text(text) if text.exists() else ""
    except ValueError:
        raise RequestError(f"{text} is damaged: it is not text; {again} again") from None
    place = [found.columns.index(name) for name in ("cell", "seed", "status")]
    written = datetime.datetime.fromtimestamp(files.mtime(file), datetime.UTC)
    return SweepData(
        path,
        shown,
        found,
        f"{written:%Y-%m-%d %H:%M} UTC",
        markdown,
        read_png(figure) if figure.exists() else None,
        [_read_run(path, *(row[k] for k in place)) for row in found.rows],
    )


def _read_run(path: epath.Path, cell: str, seed: str, status: str) -> SweepRun:
    directory = RunDirectory(path / cell / f"seed{seed}")
    grids = list(grid_paths(directory).values())
    return SweepRun(
        cell,
        seed,
        status,
        directory,
        directory.load_config() if directory.config.exists() else None,
        directory.load_starts(),
        read_records(directory),
        read_png(grids[-1]) if grids else None,
    )
