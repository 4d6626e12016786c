"""The table of a sweep: a line a run in results.csv, means over seeds in results.md, a figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddpm_jax import files, parts
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.progress import duration
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import metrics
from experiments.common import to_csv, to_png
from experiments.sweeping.cells import Cell, Stage
from experiments.sweeping.plan import DIVERGED, DONE, Plan, RunPlan, read

Row = dict[str, Any]
WIDE = 30  # A ratio of values from which on an axis is logarithmic.


def write(plan: Plan, command: str, say: Callable[[str], None]) -> None:
    """Writes results.csv, results.md and results.png of what is there, each whole.

    Raises:
      RequestError: nothing is there yet.
    """
    found = {run.label: run.results() for run in plan.runs}
    rows = [row(run, found[run.label]) for run in plan.runs]
    columns = columns_of(plan, rows)
    if not any(value is not None for r in rows for value in _values(r, columns)):
        raise RequestError(f"{plan.directory}: no run has results yet")
    keys = list(dict.fromkeys(key for r in rows for key in r))
    directory = RunDirectory.of(plan.directory).path
    files.replace(directory / "results.csv", to_csv([{k: r.get(k) for k in keys} for r in rows]))
    machines = "; ".join(
        dict.fromkeys(
            f"measured on {m.provenance['devices']}, jax {m.provenance['versions']['jax']}"
            for results in found.values()
            for m in results.values()
        )
    )
    text = markdown(plan, rows, columns, command, machines, unlike(found))
    files.replace(directory / "results.md", text)
    files.replace(directory / "results.png", figure(plan, rows, columns))
    say(text)
    say(f"{directory / 'results.csv'}, results.md, results.png")


def row(run: RunPlan, found: Mapping[str, Manifest]) -> Row:
    """A run's line: cell, seed, status, seconds, overrides, results and errors, stability."""
    record = read(run.record)
    line: Row = {"cell": run.cell.name, "seed": run.seed, "status": run.outcome()}
    for stage in run.stages:
        line[f"{stage.name}_seconds"] = record.get(stage.name, {}).get("seconds")
    line |= {key: _plain(value) for key, value in run.overrides.items() if key != "seed"}
    for name, m in found.items():
        line[name] = float(m.measured)
        line[f"{name}_error"] = m.measured.standard_error
        if "outside" in m.measured.details:
            line["outside"] = float(m.measured.details["outside"])
    for stage in run.stages:
        if stage.mode == "sample":
            line[f"outside_{stage.name}"] = drawn_outside(run, stage)
    return line | stability(run)


def drawn_outside(run: RunPlan, stage: Stage) -> float | None:
    """The share of values out of range among the samples of a stage, if they are there."""
    config = run.config(stage)
    how = config.sample
    asked = {
        "checkpoint": run.steps,
        "sampler": how.method,
        "steps": how.steps or config.diffusion.num_steps,
        "eta": how.eta,
        "clip": how.clip,
        "count": how.count,
    }
    for path in files.matching(RunDirectory.of(run.path).samples, "*.npz"):
        arrays = parts.read(path, ("outside", "protocol"))
        protocol = json.loads(str(arrays["protocol"])) if arrays else {}
        if asked.items() <= protocol.items():
            return float(arrays["outside"].mean())
    return None


def stability(run: RunPlan) -> Row:
    """Of training: whether it diverged, and the largest gradient norm after the warm-up.

    The norm is the largest mean over train.log_every steps, before clipping.
    """
    path = RunDirectory.of(run.path).metrics
    if not path.exists() or not (run.trained() or run.outcome().startswith(DIVERGED)):
        return {}
    warm = run.config(run.stages[0]).train.warmup_steps
    norms = [r["grad_norm"] for r in metrics.read(path) if "grad_norm" in r and r["step"] > warm]
    diverged = run.outcome().startswith(DIVERGED)
    return {"diverged": int(diverged), "grad_norm_max": max(norms, default=None)}


def unlike(found: Mapping[str, Mapping[str, Manifest]]) -> list[str]:
    """What was not measured alike in all runs: a line a result, naming the protocol's keys."""
    lines = []
    for name in dict.fromkeys(n for results in found.values() for n in results):
        protocols = [r[name].measured.protocol for r in found.values() if name in r]
        keys = {key for p in protocols for key in manifest.differences(protocols[0], p)}
        if keys:
            lines.append(f"{name} was not measured alike: {', '.join(sorted(keys))} differ.")
    return lines


def columns_of(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """{result: heading}: those of the sweep's that a run has, or every result that one has."""
    own = {
        name: heading
        for name, heading in plan.sweep.columns.items()
        if any(r.get(name) is not None for r in rows)
    }
    if own:
        return own
    names = dict.fromkeys(k.removesuffix("_error") for r in rows for k in r if k.endswith("_error"))
    return {name: name for name in [*names, "outside", "grad_norm_max"]}


def _values(line: Row, columns: Mapping[str, str]) -> list[float | None]:
    return [line.get(name) for name in columns]


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; of one seed the value alone."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "not finite"
    deviation = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return Measured(mean, deviation).text() if deviation else f"{mean:.4g}"


def markdown(
    plan: Plan,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    command: str,
    machines: str,
    notes: Sequence[str],
) -> str:
    """results.md: a table a group, the paper's numbers beside, and what was run on what."""
    paper = list(dict.fromkeys(key for cell in plan.sweep.cells for key in cell.paper))
    head = ["cell", "seeds", *columns.values(), *(f"paper: {key}" for key in paper)]
    lines = [f"# {plan.sweep.title}", "", "```", command, "```", ""]
    for group, cells in plan.sweep.groups.items():
        lines += [f"**{group}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [_line(plan, cell, rows, columns, paper) for cell in cells]
        lines.append("")
    seeds = (
        f"Mean ± standard deviation over {len(plan.seeds)} seeds"
        if len(plan.seeds) > 1
        else ("One seed")
    )
    lines.append(
        f"{seeds}; results.csv has every run with its standard errors. Out of range: the share of "
        "sampled values more than half a level beyond [−1, 1], before rounding. Largest gradient "
        "norm: of the means over train.log_every steps after the warm-up, before clipping."
    )
    stages = [stage.name for stage in plan.sweep.stages]
    spent = [sum(r.get(f"{stage}_seconds") or 0 for r in rows) for stage in stages]
    each = ", ".join(f"{s} {duration(t)}" for s, t in zip(stages, spent, strict=True))
    lines.append(f"Programs' time: {duration(sum(spent))} ({each}); {machines}.")
    lines += [*plan.sweep.notes, *notes]
    return "\n".join(lines) + "\n"


def _line(
    plan: Plan,
    cell: Cell,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    paper: Sequence[str],
) -> str:
    own = [r for r in rows if r["cell"] == cell.name]
    good = [r for r in own if r["status"] == DONE]
    beside = [cell.paper.get(key, "") for key in paper]
    if cell.skip:
        entries = [f"skipped: {cell.skip}", *[""] * (len(columns) - 1)]
        return f"| {cell.name} | 0 | {' | '.join([*entries, *beside])} |"
    entries = [spread([r[name] for r in own if r.get(name) is not None]) for name in columns]
    bad = {r["status"].partition(":")[0] for r in own} - {DONE}
    count = f"{len(good)}" if not bad else f"{len(good)} of {len(own)} ({', '.join(sorted(bad))})"
    return f"| {cell.name} | {count} | {' | '.join([*entries, *beside])} |"


def figure(plan: Plan, rows: Sequence[Row], columns: Mapping[str, str]) -> bytes:
    """A panel a result: the cells below each other, a dot a seed, a bar at their mean."""
    from matplotlib.figure import Figure

    cells = [cell.name for cell in plan.sweep.cells if not cell.skip]
    names = [n for n in columns if any(r.get(n) is not None for r in rows)]
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    size = (3.4 * across + 2.2, (0.32 * len(cells) + 1.1) * down)
    whole = Figure(figsize=size, layout="constrained")
    panels = whole.subplots(down, across, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        values = [r[name] for r in rows if r.get(name) is not None]
        for y, cell in enumerate(cells):
            own = [r[name] for r in rows if r["cell"] == cell and r.get(name) is not None]
            if own:
                panel.plot(own, [y] * len(own), "o", color="tab:blue", alpha=0.6, ms=6)
                panel.plot([statistics.fmean(own)] * 2, [y - 0.3, y + 0.3], color="black", lw=2)
        if min(values) > 0 and max(values) > WIDE * min(values):
            panel.set_xscale("log")
        panel.set_title(columns[name], fontsize=11)
        panel.grid(axis="both", alpha=0.25)
    for panel in list(panels.flat)[len(names) :]:
        panel.set_visible(False)
    first = panels[0][0]
    first.set_yticks(range(len(cells)), cells)
    first.set_ylim(len(cells) - 0.5, -0.5)
    seeds = f", {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""
    whole.suptitle(f"{plan.sweep.title}{seeds}", fontsize=13)
    return to_png(whole)
