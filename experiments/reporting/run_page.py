"""The sections of a run's report. One that the run's data cannot give is a line with a command."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

import numpy as np

from ddpm_jax.evaluation.manifest import Manifest
from experiments.reporting import tables
from experiments.reporting.html import (
    Html,
    data,
    el,
    grid_png,
    join,
    picture,
    slider,
)
from experiments.reporting.plots import Axis, Choice, Plot, Series, curve
from experiments.reporting.reading import PATH_STUDY, Frames, RunData, Study

CODING_STUDY = "progressive_coding"
# The experiments of a run, in the report's order, and what each shows.
STUDIES = {
    CODING_STUDY: "rate and distortion over the reverse process",
    PATH_STUDY: "x̂_0 over time",
    "interpolation": "interpolations between test images",
    "nearest_neighbors": "samples with their nearest training images",
    "sample_quality": "sample quality with its protocol",
    "fixed_variance_cost": "what the fixed choices of Σ cost, for each t",
    "autoregressive": "an autoregressive model as a diffusion that masks coordinates",
}
QUALITY = ("fid50k", "fd_inception", "fd_effnet", "kd_inception", "kd_effnet", "fd_pixels", "kd_")
FRAME_BYTES = 12 * 2**20  # Of x̂_0 before compression; what is beyond is thinned out.


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    body: Html


@dataclasses.dataclass(frozen=True)
class Missing:
    """What the data cannot give, and the command that makes it."""

    what: str
    command: str


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole report: title, a line below it, tiles (label, value), sections, what is missing."""

    title: str
    line: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    missing: Sequence[Missing]


def run_page(run: RunData) -> Page:
    """The report of a run."""
    parts: list[Section | Missing] = [
        training(run),
        samples(run),
        evaluation(run),
        bits_per_t(run),
        *studies(run),
        Section("config", "Config", tables.config(run)),
        Section("provenance", "Provenance", tables.provenance(run)),
    ]
    return Page(
        run.directory.path.name,
        description(run),
        tiles(run),
        [part for part in parts if isinstance(part, Section)],
        [part for part in parts if isinstance(part, Missing)],
    )


def description(run: RunData) -> str:
    """The run in a line: data, network, the three choices, steps."""
    c = run.config
    size, widths = c.data.image_size, ", ".join(map(str, c.model.channel_multipliers))
    return (
        f"{c.data.name}/{c.data.split}, {size}×{size}×{c.data.channels} · U-Net of "
        f"{c.model.channels} × ({widths}) channels · prediction {c.diffusion.prediction}, variance "
        f"{c.diffusion.variance}, objective {c.train.objective} · {c.diffusion.schedule} schedule, "
        f"T = {c.diffusion.num_steps:,}"
    )


def tiles(run: RunData) -> list[tuple[str, str]]:
    """(label, value): how far the training is, and the numbers that matter most."""
    found = [("step", f"{run.step:,} of {run.config.train.steps:,}")]
    losses = [r["loss"] for r in run.records if "loss" in r]
    found.append(("training loss", f"{losses[-1]:.4g}"))
    bits = [n for n in ("bits_per_dim_test", "bits_per_dim_train") if n in run.results]
    bits += sorted(n for n in run.results if n.startswith("bits_per_dim_"))
    if bits:
        found.append((bits[0], run.results[bits[0]].measured.text()))
    if quality := main_quality(run.results):
        found.append((quality, run.results[quality].measured.text()))
    return found


def main_quality(results: dict[str, Manifest]) -> str | None:
    """The result that stands for the quality of samples; nearest to the paper's FID first."""
    for start in QUALITY:
        found = sorted(name for name in results if name.startswith(start))
        if found:
            return found[0]
    return None


def training(run: RunData) -> Section:
    """The curves of metrics.jsonl."""
    lines = [r for r in run.records if "loss" in r]
    positive = all(r["loss"] > 0 for r in lines)
    losses = [curve(lines, "loss", "all t")]
    for quarter in range(1, 5):
        key = f"loss_quarter_{quarter}"
        if any(key in r for r in lines):
            losses.append(curve(lines, key, f"quarter {quarter}", color=quarter, faint=True))
    step = Axis("step")
    figures = [
        Plot(
            "loss",
            "Loss",
            f"It goes from {lines[0]['loss']:.3g} at step {lines[0]['step']:,} to "
            f"{lines[-1]['loss']:.3g} at step {lines[-1]['step']:,}.",
            step,
            [Choice("loss", Axis(f"loss ({run.config.train.objective})", positive), losses)],
            note="Means over the steps between lines of metrics.jsonl; quarters: of t from 1 to T.",
        )
    ]
    shown = {"step", *(k for r in lines for k in r if k.startswith("loss"))}
    others = [k for k in dict.fromkeys(k for r in lines for k in r) if k not in shown]
    for key in others:
        if key == "images_per_second":  # Steps a second times the batch size.
            continue
        title = key.replace("_", " ").capitalize()
        last = next(r[key] for r in reversed(lines) if key in r)
        choice = Choice(key, Axis(""), [curve(lines, key)])
        name = "training-" + re.sub(r"\W+", "-", key)
        figures.append(Plot(name, title, f"It ends at {last:.4g}.", step, [choice]))
    found = [el("div", *(p.html() for p in figures), class_="plots")]
    evaluated = [r for r in run.records if "loss" not in r]
    keys = dict.fromkeys(k for r in evaluated for k in r if k != "step" and k[-6:] != "_error")
    if keys:
        choices = [
            Choice(k, Axis(k), [curve(evaluated, k, kind="both")])
            for k in sorted(keys, key=lambda k: (not k.startswith("bits_per_dim"), k))
        ]
        plot = Plot(
            "evaluated",
            "Evaluation while training",
            "Results of train.evaluate_every over the steps, with their standard errors.",
            step,
            choices,
            choose="Result",
            note="Bars are one standard error to both sides.",
        )
        found.append(plot.html())
    return Section("training", "Training", join(found))


def samples(run: RunData) -> Section | Missing:
    """The grids of samples: those of the training over its steps, and the newest drawn after."""
    found = []
    if len(run.grids) > 1:
        frames = [(f"step {step:,}", png) for step, png in run.grids.items()]
        alt = "Grid of samples drawn during training"
        found.append(
            join(
                [
                    el("h3", "During training"),
                    slider(frames, "Drawn at", alt, len(frames) - 1, "training-samples"),
                ]
            )
        )
    elif run.grids:
        ((step, png),) = run.grids.items()
        alt = f"Grid of samples drawn at step {step:,}"
        found.append(picture(png, alt, f"Drawn at step {step:,}, at the end of training.", True))
    if run.drawn:
        name, png = run.drawn
        shown = picture(png, "Grid of the newest samples", el("code", name), True)
        found.append(join([el("h3", "Newest"), shown]))
    if PATH_STUDY not in run.studies and run.training:
        alt = "The training loss, and x̂_0 over the reverse process for a few samples"
        found.append(picture(run.training, alt, "x̂_0 at the end of training"))
    if not found:
        what = f"python -m ddpm_jax.main --mode=sample --workdir={shlex.quote(run.shown)}"
        return Missing("samples", what)
    return Section("samples", "Samples", el("div", *(el("div", f) for f in found), class_="side"))


def path(run: RunData) -> Html | None:
    """x̂_0 over the reverse process, with a slider."""
    if run.path is None:
        return None
    frames, note = within_budget(run.path)
    shown = [
        (f"t = {t:,}", grid_png(images))
        for t, images in zip(frames.times, frames.frames, strict=True)
    ]
    alt = "Grid of x̂_0, the samples that the network expects"
    return join([slider(shown, "x̂_0 at", alt, 0, "x0-path"), el("p", note, class_="note")])


def within_budget(path: Frames) -> tuple[Frames, str]:
    """As many samples and times as the page bears, and a sentence that says how many."""
    times, count = path.frames.shape[:2]
    one = max(1, path.frames[0, 0].nbytes)
    kept = min(count, 64, max(4, FRAME_BYTES // (one * times)))
    steps = min(times, max(12, FRAME_BYTES // (one * kept)))
    chosen = np.linspace(0, times - 1, steps).round().astype(int)
    thin = Frames(path.frames[chosen][:, :kept], [path.times[k] for k in chosen])
    return thin, (
        f"{kept} of {count} samples at {steps} of {times} times, from noise (t = "
        f"{path.times[0]:,}) to the samples (t = {path.times[-1]:,})."
    )


def coding(run: RunData) -> Html | None:
    """Rate and distortion, from the table of the study."""
    study = run.studies.get(CODING_STUDY)
    needed = {"steps_done", "rate", "rmse"}
    if study is None or not study.table.rows or not needed <= {*study.table.columns}:
        return None
    column = {name: study.table.column(name) for name in study.table.columns}
    every = column.get("images")
    kind = "points" if every and min(map(_or_0, every)) < max(map(_or_0, every)) else "line"
    rate, rmse = Axis("rate in bits/dim"), Axis("RMSE of x̂_0 on 0–255")
    steps = Axis("reverse steps done")
    pairs = [
        ("distortion against rate", rate, rmse, "rate", "rmse", kind),
        ("distortion against steps", steps, rmse, "steps_done", "rmse", kind),
        ("rate against steps", steps, rate, "steps_done", "rate", "line"),
    ]
    choices = []
    for label, x, y, xs, ys, drawn in pairs:
        error = column.get(f"{ys}_error")
        rows = [k for k in range(len(column[xs])) if None not in (column[xs][k], column[ys][k])]
        rows = [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, 1000).round().astype(int))]
        pick = lambda values, rows=rows: [values[k] for k in rows]  # noqa: E731
        series = Series(ys, pick(column[xs]), pick(column[ys]), error and pick(error), drawn, 0)
        choices.append(Choice(label, y, [series], x))
    plot = Plot(
        "rate-distortion",
        "Rate and distortion",
        f"From {choices[0].series[0].y[0]:.3g} at rate {choices[0].series[0].x[0]:.2g} to "
        f"{choices[0].series[0].y[-1]:.3g} at rate {choices[0].series[0].x[-1]:.3g}.",
        rate,
        choices,
        note="Bands are one standard error over images to both sides (§4.3, Fig. 5, Table 4).",
    )
    return plot.html()


def _or_0(value: float | None) -> float:
    return value or 0


def bits_per_t(run: RunData) -> Section | Missing:
    """The terms of the bound, and the errors behind them, over t."""
    if not run.bounds:
        what = _evaluate(run, "--config.evaluation.metrics=bits_per_dim")
        return Missing("bits/dim, and its terms for each t", what)
    quantities = [
        ("L_{t−1} in bits/dim", "terms", 1, 1.0, True),
        ("mean squared error of x̂_0 on 0–255", "x0_mse", 0, 127.5**2, True),
        ("mean squared error of ε", "eps_mse", 0, 1.0, True),
        ("Σ_{j≥t} L_j, the rate, in bits/dim", "rate", 0, 1.0, False),
    ]
    choices = []
    for label, name, shift, scale, log in quantities:
        series = [
            _per_t(split, number, bound, name, shift, scale)
            for number, (split, bound) in enumerate(run.bounds.items())
            if name in bound and f"{name}_error" in bound
        ]
        if series:
            choices.append(Choice(label, Axis(label, log), series))
    totals = ", ".join(
        f"L_T = {bound['terms'][-1]:.3g} ({split})" for split, bound in run.bounds.items()
    )
    plot = Plot(
        "bits-per-t",
        "Terms of the bound",
        f"L_0 is {next(iter(run.bounds.values()))['terms'][0]:.3g} bits/dim.",
        Axis("t"),
        choices,
        note="t = 1 is the decoder's term, L_0; bands are one standard error over images to both "
        f"sides. Not in the plot of the terms: {totals} bits/dim.",
    )
    return Section("bits", "Bits per t", plot.html())


def _per_t(
    split: str, color: int, bound: dict[str, np.ndarray], name: str, shift: int, scale: float
) -> Series:
    """A quantity at t = 1..T: column t − shift of its array; times without images are left out."""
    times = np.arange(1, len(bound[name]))
    values, errors = (
        scale * bound[name][times - shift],
        scale * bound[f"{name}_error"][times - shift],
    )
    seen = np.flatnonzero(np.isfinite(values))
    gaps = len(seen) < len(times)
    kind = "points" if gaps else "line"
    return Series(
        split, times[seen].tolist(), values[seen].tolist(), errors[seen].tolist(), kind, color
    )


def evaluation(run: RunData) -> Section | Missing:
    """Every result with its error and protocol, and the pictures kept beside results."""
    if not run.results:
        return Missing("bits/dim and the quality of samples", _evaluate(run))
    found = tables.results(run.results)
    for name, png in run.pictures.items():
        if name.startswith("nearest"):
            alt = "Samples in the upper row, each above its nearest training image"
            found.append(picture(png, alt, f"{name}: samples above their nearest images", True))
        else:
            found.append(picture(png, name, name))
    return Section("evaluation", "Evaluation", join(found))


def _evaluate(run: RunData, more: str = "") -> str:
    words = f"python -m ddpm_jax.main --mode=evaluate --workdir={shlex.quote(run.shown)} {more}"
    return words.strip()


def studies(run: RunData) -> list[Section | Missing]:
    """A section a study, in the order of STUDIES, others after them."""
    order = [*STUDIES, *sorted(set(run.studies) - set(STUDIES))]
    more = {CODING_STUDY: coding(run), PATH_STUDY: path(run)}
    found: list[Section | Missing] = []
    for name in order:
        if name in run.studies:
            found.append(_study(run.studies[name], more.get(name)))
        else:
            what = f"python -m experiments.{name} --run={shlex.quote(run.shown)}"
            found.append(Missing(STUDIES[name], what))
    return found


def _study(study: Study, more: Html | None) -> Section:
    alt = f"{study.title}. {' '.join(study.notes)}".strip()
    shown = el("ul", *(el("li", note) for note in study.notes)) if study.notes else None
    step = study.content.get("subject", {}).get("checkpoint")
    when = el("p", f"Made at step {step:,}.", class_="note") if isinstance(step, int) else None
    body = [
        more,
        picture(study.figure, alt),
        shown,
        when,
        data(study.table, study.title, f"{study.name}.csv", "Table"),
    ]
    return Section(f"study-{study.name}", study.title, join(body))
