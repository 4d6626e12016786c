"""The report of a sweep: its table and figure, and its runs beside each other."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import urllib.parse

from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax.config import RequestError
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import metrics
from experiments.reporting.html import Html, data, el, join, picture, table
from experiments.reporting.plots import MOST_POINTS, Axis, Choice, Plot, Series, curve
from experiments.reporting.reading import Table, read_csv, read_grids, read_png
from experiments.reporting.run_page import Missing, Page, Section

TABLE = "results.csv"  # What makes a directory that of a sweep.
WIDE = 30  # A ratio of values from which on an axis begins logarithmic.
LABEL = 16  # Letters of a cell's name in a line.


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A line of results.csv with its run. grid: PNG of its newest samples."""

    cell: str
    seed: str
    status: str
    directory: RunDirectory
    records: list[dict]
    grid: bytes | None


@dataclasses.dataclass(frozen=True)
class SweepData:
    """What a sweep's directory holds. text: results.md; figure: results.png."""

    path: epath.Path
    shown: str
    table: Table
    text: str
    figure: bytes | None
    runs: list[SweepRun]

    @property
    def cells(self) -> list[str]:
        """The cells' names, in the table's order."""
        return list(dict.fromkeys(run.cell for run in self.runs))


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
    again = f"python -m experiments.sweep --sweep=FILE --workdir={shown} --mode=table makes it"
    if not (path / TABLE).exists():
        raise RequestError(f"{path}: no results of a sweep there (no {TABLE}); {again}")
    try:
        found = read_csv((path / TABLE).read_text())
    except ValueError:
        found = Table([], [])
    if not {"cell", "seed", "status"} <= {*found.columns} or not found.rows:
        raise RequestError(f"{path / TABLE} has no runs with cell, seed and status; {again}")
    text, figure = path / "results.md", path / "results.png"
    place = {name: found.columns.index(name) for name in ("cell", "seed", "status")}
    return SweepData(
        path,
        shown,
        found,
        text.read_text() if text.exists() else "",
        read_png(figure) if figure.exists() else None,
        [_read_run(path, *(row[place[n]] for n in place)) for row in found.rows],
    )


def _read_run(path: epath.Path, cell: str, seed: str, status: str) -> SweepRun:
    directory = RunDirectory(path / cell / f"seed{seed}")
    there = directory.metrics.exists()
    records = [r for r in metrics.read(directory.metrics) if "step" in r] if there else []
    grids = read_grids(directory)
    return SweepRun(
        cell, seed, status, directory, records, list(grids.values())[-1] if grids else None
    )


def sweep_page(sweep: SweepData, out: epath.Path) -> Page:
    """The report of a sweep. out: the report's own file, from where links start."""
    title = re.search(r"^# (.+)$", sweep.text, re.MULTILINE)
    states = [run.status.partition(":")[0] for run in sweep.runs]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    seeds = len({run.seed for run in sweep.runs})
    parts = [results(sweep), by_cell(sweep), curves(sweep), samples(sweep), runs(sweep, out)]
    return Page(
        title[1] if title else sweep.path.name,
        f"{sweep.path.name} · {len(sweep.cells)} cells, {seeds} seeds: {counts}",
        [("cells", str(len(sweep.cells))), ("runs", str(len(sweep.runs))), ("state", counts)],
        [part for part in parts if isinstance(part, Section)],
        [part for part in parts if isinstance(part, Missing)],
    )


def results(sweep: SweepData) -> Section | Missing:
    """results.md and the figure."""
    found = [markdown(sweep.text)] if sweep.text else []
    if sweep.figure:
        alt = "A panel for each result: the cells below each other, a dot a seed, a bar their mean"
        found.append(picture(sweep.figure, alt, "results.png"))
    if not found:
        what = f"python -m experiments.sweep --sweep=FILE --workdir={sweep.shown} --mode=table"
        return Missing("the table of means, and its figure", what)
    return Section("results", "Results", join(found))


def markdown(text: str) -> Html:
    """Tables, code and paragraphs of Markdown; a line in bold alone is the next table's name."""
    found, lines, name = [], text.splitlines(), "Results"
    while lines:
        line = lines.pop(0)
        if line.startswith("```"):
            code = []
            while lines and not lines[0].startswith("```"):
                code.append(lines.pop(0))
            del lines[:1]
            found.append(el("pre", el("code", "\n".join(code)), tabindex=0))
        elif line.startswith("|"):
            rows = [_cells(line)]
            while lines and lines[0].startswith("|"):
                rows.append(_cells(lines.pop(0)))
            found.append(table(rows[0], rows[2:], name))
        elif bold := re.fullmatch(r"\*\*(.+)\*\*", line):
            name = bold[1]
        elif line.strip() and not line.startswith("# "):
            found.append(el("p", line))
    return join(found)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def result_names(found: Table) -> list[str]:
    """The columns that are results: numbers, that neither name a run, override nor err."""
    names = []
    for name in found.columns:
        others = {"cell", "seed", "status", *config_lib.FIELDS}
        if name in others or name.removesuffix("_error") in {*found.columns} - {name}:
            continue
        if any(value is not None for value in found.column(name)):
            names.append(name)
    times = [n for n in names if n.endswith("_seconds")]
    return [n for n in names if n not in times] + times


def by_cell(sweep: SweepData) -> Section | Missing:
    """Each result over the cells: a point a seed, and their mean."""
    choices = []
    for name in result_names(sweep.table):
        values = sweep.table.column(name)
        seen = [(run, v) for run, v in zip(sweep.runs, values, strict=True) if v is not None]
        means = {
            cell: [v for run, v in seen if run.cell == cell]
            for cell in sweep.cells
            if any(run.cell == cell for run, _ in seen)
        }
        least, most = min(v for _, v in seen), max(v for _, v in seen)
        series = [
            Series(
                "one seed",
                [label(run.cell) for run, _ in seen],
                [v for _, v in seen],
                kind="points",
                faint=True,
                hover=[f"{run.cell}, seed {run.seed}" for run, _ in seen],
            ),
            Series(
                "mean, ± standard deviation",
                [label(cell) for cell in means],
                [statistics.fmean(own) for own in means.values()],
                [statistics.stdev(own) if len(own) > 1 else None for own in means.values()],
                kind="points",
                color=1,
            ),
        ]
        choices.append(Choice(name, Axis(name, least > 0 and most > WIDE * least), series))
    if not choices:
        return Missing("results by cell", f"python -m experiments.sweep --workdir={sweep.shown}")
    plot = Plot(
        "by-cell",
        "Results by cell",
        "A point a seed, and the mean of each cell's with the standard deviation over its seeds.",
        Axis("cell"),
        choices,
        flipped=True,
        choose="Result",
    )
    return Section("by-cell-section", "Each result", plot.html())


def label(cell: str) -> str:
    """The cell's name in lines short enough for an axis on a phone."""
    lines = [""]
    for word in re.findall(r"[^-,=_]+[-,=_]*|[-,=_]+", cell):
        if lines[-1] and len(lines[-1]) + len(word) > LABEL:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def curves(sweep: SweepData) -> Section | Missing:
    """The training curves of all runs, a colour a cell."""
    everything = [r for run in sweep.runs for r in run.records]
    keys = [k for k in dict.fromkeys(k for r in everything for k in r) if k != "step"]
    keys = [k for k in keys if not k.endswith("_error") and k != "images_per_second"]
    choices, most = [], max(100, MOST_POINTS * 4 // len(sweep.runs))
    for key in sorted(keys, key=lambda k: not k.startswith("loss")):
        series = []
        for run in sweep.runs:
            if any(key in r for r in run.records):
                name, color = f"{run.cell}, seed {run.seed}", sweep.cells.index(run.cell)
                kind = "both" if f"{key}_error" in {k for r in run.records for k in r} else "line"
                series.append(
                    curve(run.records, key, name, most, color=color, group=run.cell, kind=kind)
                )
        log = key.startswith("loss") and all(y > 0 for s in series for y in s.y)
        choices.append(Choice(key, Axis(key, log), series))
    if not choices:
        return Missing("curves", f"python -m experiments.sweep --workdir={sweep.shown}")
    plot = Plot(
        "curves",
        "All cells",
        f"{len(sweep.runs)} runs, a curve each; the cells have colours.",
        Axis("step"),
        choices,
        choose="Of",
        note="Losses of different objectives or predictions are in different units.",
    )
    return Section("training", "Training", plot.html())


def samples(sweep: SweepData) -> Section | Missing:
    """The newest samples of each cell's first run that has any."""
    shown = []
    for cell in sweep.cells:
        run = next((r for r in sweep.runs if r.cell == cell and r.grid), None)
        if run is not None:
            alt = f"Grid of samples of {cell}, seed {run.seed}"
            shown.append(picture(run.grid, alt, f"{cell}, seed {run.seed}", True))
    if not shown:
        return Missing("samples", f"python -m experiments.sweep --workdir={sweep.shown}")
    return Section("samples", "Samples", el("div", *shown, class_="grids"))


def runs(sweep: SweepData, out: epath.Path) -> Section:
    """Every run: its state, a link to its own report, and the line of results.csv."""
    rows = []
    without = False
    for run in sweep.runs:
        report = run.directory.path / "report.html"
        if report.exists():
            where = os.path.relpath(os.fspath(report), os.fspath(out.parent))
            link = el("a", "report", href=urllib.parse.quote(where))
        else:
            link, without = "", True
        rows.append((f"{run.cell}, seed {run.seed}", run.status, link))
    more = without and el(
        "p",
        "A run's own report: ",
        el("code", f"python -m experiments.report --run={sweep.shown}/CELL/seed0"),
        class_="note",
    )
    found = [table(("run", "state", "report"), rows, "Runs"), more]
    found.append(data(sweep.table, "Every run", TABLE, "results.csv"))
    return Section("runs", "Runs", join(found))
