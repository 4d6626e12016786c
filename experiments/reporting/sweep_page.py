"""The report of a sweep: its table and figure, and its runs beside each other."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import urllib.parse

from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation.names import BOUND_RESULTS
from experiments.reporting import tables
from experiments.reporting.html import Html, command, data, el, inline, join, picture, table
from experiments.reporting.plots import MOST_POINTS, Axis, Choice, Plot, Series, curve
from experiments.reporting.reading import Table
from experiments.reporting.sections import Missing, Page, Section
from experiments.reporting.sweep_reading import TABLE, SweepData

WIDE = 30  # A ratio of values from which on an axis begins logarithmic.


def sweep_page(sweep: SweepData, out: epath.Path) -> Page:
    """The report of a sweep. out: the report's own file, from where links start."""
    title = re.search(r"^# (.+)$", sweep.text, re.MULTILINE)
    states = [run.status.partition(":")[0] for run in sweep.runs]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    seeds = len({run.seed for run in sweep.runs})
    parts = [results(sweep), by_cell(sweep), curves(sweep), samples(sweep), runs(sweep, out)]
    parts += [*config(sweep), provenance(sweep)]
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
        return Missing("the table of means, and its figure", sweep.command("--mode=table"))
    again = command(sweep.command("--mode=table"))
    found.append(el("p", f"As of {sweep.written}. Anew, of what is there: ", again, class_="note"))
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
            found.append(el("p", inline(line)))
    return join(found)


def _cells(line: str) -> list[str]:
    return [inline(cell.strip()) for cell in line.strip().strip("|").split("|")]


def result_names(found: Table) -> list[str]:
    """The columns that are results: numbers, that neither name a run, override nor err.

    Those of the bound come first, of the test split before others; the programs' times come last.
    """
    names = []
    for name in found.columns:
        others = {"cell", "seed", "status", *config_lib.FIELDS}
        if name in others or name.removesuffix("_error") in {*found.columns} - {name}:
            continue
        if any(value is not None for value in found.column(name)):
            names.append(name)

    def order(name: str) -> tuple[bool, int, bool]:
        bound = [k for k, start in enumerate(BOUND_RESULTS) if name.startswith(f"{start}_")]
        of_bound = bound[0] if bound else len(BOUND_RESULTS)
        return name.endswith("_seconds"), of_bound, not name.endswith("_test")

    return sorted(names, key=order)


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
                [run.cell for run, _ in seen],
                [v for _, v in seen],
                kind="points",
                faint=True,
                hover=[run.label for run, _ in seen],
            ),
            Series(
                "mean, ± standard deviation",
                list(means),
                [statistics.fmean(own) for own in means.values()],
                [statistics.stdev(own) if len(own) > 1 else None for own in means.values()],
                kind="points",
                color=1,
            ),
        ]
        choices.append(Choice(name, Axis(name, least > 0 and most > WIDE * least), series))
    if not choices:
        return Missing("results by cell", sweep.command())
    plot = Plot(
        "by-cell",
        "Results by cell",
        "A point a seed, and the mean of each cell's with the standard deviation over its seeds, "
        "hollow where there is one seed.",
        Axis("cell"),
        choices,
        flipped=True,
        choose="Result",
    )
    return Section("by-cell-section", "Each result", plot.html())


def curves(sweep: SweepData) -> Section | Missing:
    """The training curves of all runs, a colour a cell."""
    everything = [r for run in sweep.runs for r in run.records]
    keys = [k for k in dict.fromkeys(k for r in everything for k in r) if k != "step"]
    keys = [k for k in keys if not k.endswith("_error") and k != "images_per_second"]
    keys = [k for k in keys if not k.startswith("time/")]
    choices, most = [], max(100, MOST_POINTS * 4 // len(sweep.runs))
    for key in sorted(keys, key=lambda k: not k.startswith("loss")):
        series = []
        for run in sweep.runs:
            if any(key in r for r in run.records):
                color = sweep.cells.index(run.cell)
                kind = "both" if f"{key}_error" in {k for r in run.records for k in r} else "line"
                series.append(
                    curve(run.records, key, run.label, most, color=color, group=run.cell, kind=kind)
                )
        log = key.startswith("loss") and all(y > 0 for s in series for y in s.y)
        choices.append(Choice(key, Axis(key, log), series))
    if not choices:
        return Missing("curves", sweep.command())
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
            alt = f"Grid of samples of {run.label}"
            shown.append(picture(run.grid, alt, run.label, True))
    if not shown:
        return Missing("samples", sweep.command())
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
        rows.append((run.label, run.status, link))
    more = without and el(
        "p",
        "A run's own report: ",
        command(f"python -m experiments.report --run={shlex.quote(f'{sweep.shown}/CELL/seed0')}"),
        class_="note",
    )
    found = [table(("run", "state", "report"), rows, "Runs"), more]
    found.append(data(sweep.table, "Every run", TABLE, "results.csv"))
    return Section("runs", "Runs", join(found))


def config(sweep: SweepData) -> list[Section]:
    """What the configs of all runs have in common; of what differs, the keys."""
    values = [tables.all_values(run.config) for run in sweep.runs if run.config]
    if not values:
        return []
    alike = {k: v for k, v in values[0].items() if all(other[k] == v for other in values)}
    apart = ", ".join(key for key in values[0] if key not in alike)
    note = f"Alike in all {len(values)} runs that were begun"
    note += f"; what differs between runs: {apart}." if apart else "."
    return [Section("config", "Config", join([el("p", note), tables.config(alike)]))]


def provenance(sweep: SweepData) -> Section:
    """What the trainings ran with, and which runs did."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in sweep.runs:
        for ran_with in dict.fromkeys(map(tables.ran_with, run.starts)):
            found.setdefault(ran_with, []).append(run.label)
    every = len(sweep.runs)
    rows = [
        (*ran_with, f"all {every}" if len(names) == every else "; ".join(names))
        for ran_with, names in found.items()
    ]
    lines = [f"Seeds {', '.join(dict.fromkeys(run.seed for run in sweep.runs))}."]
    if unknown := [run.label for run in sweep.runs if not run.starts]:
        lines.append(f"No start was noted of {'; '.join(unknown)}.")
    columns = ("commit", "devices", "versions", "runs")
    noted = table(columns, rows, "What the trainings ran with", "starts") if rows else None
    return Section("provenance", "Provenance", join([el("p", " ".join(lines)), noted]))
