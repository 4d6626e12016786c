"""The bound in plots: rate and distortion, and the terms over t."""

from __future__ import annotations

import shlex

import numpy as np

from ddpm_jax.evaluation import manifest
from experiments.reporting import tables
from experiments.reporting.html import Html
from experiments.reporting.plots import Axis, Choice, Plot, Series
from experiments.reporting.reading import Result, RunData, Study
from experiments.reporting.sections import Missing, Section

MOST = 1000  # Points of a curve of the coding.


def coding(study: Study | None) -> Html | None:
    """Rate and distortion, from the table of the study progressive_coding."""
    if study is None or not {"steps_done", "rate", "rmse"} <= {*study.table.columns}:
        return None
    column = {name: study.table.column(name) for name in study.table.columns}
    images = {value or 0 for value in column.get("images", [])}
    single = len(images) > 1  # Times of fewer images than others: they were drawn.
    rate, rmse = Axis("rate in bits/dim"), Axis("RMSE of x̂_0 on 0–255")
    steps, kind = Axis("reverse steps done"), "points" if single else "line"
    choices = []
    for label, x, y, xs, ys, drawn in (
        ("distortion against rate", rate, rmse, "rate", "rmse", kind),
        ("distortion against steps", steps, rmse, "steps_done", "rmse", kind),
        ("rate against steps", steps, rate, "steps_done", "rate", "line"),
    ):
        rows = [
            k for k, pair in enumerate(zip(column[xs], column[ys], strict=True)) if None not in pair
        ]
        if not rows:
            return None
        rows = [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, MOST).round().astype(int))]
        points = [
            values and [values[k] for k in rows]
            for values in (column[xs], column[ys], column.get(f"{ys}_error"))
        ]
        choices.append(Choice(label, y, [Series(ys, *points, drawn, 0)], x))
    first = choices[0].series[0]
    note = "Bands and bars are one standard error over images to both sides (§4.3, Fig. 5, Table 4)"
    if single:
        note += (
            ". Each point is of one time, and hollow where a single image has it; the picture "
            "below averages neighbouring times"
        )
    plot = Plot(
        "rate-distortion",
        "Rate and distortion",
        f"From {first.y[0]:.3g} at rate {first.x[0]:.2g} to {first.y[-1]:.3g} at rate "
        f"{first.x[-1]:.3g}.",
        rate,
        choices,
        note=f"{note}.",
    )
    return plot.html()


def bits_per_t(run: RunData) -> Section | Missing:
    """The terms of the bound, and the errors behind them, over t."""
    bounds = {label: r.bound for label, r in _labelled(run).items() if r.bound}
    if not bounds:
        command = f"python -m ddpm_jax.main --mode=evaluate --workdir={shlex.quote(run.shown)}"
        what = f"{command} --config.evaluation.metrics=bits_per_dim"
        return Missing("bits/dim, and its terms for each t", what)
    choices = []
    for label, name, shift, scale, log in (
        ("L_{t−1} in bits/dim", "terms", 1, 1.0, True),
        ("mean squared error of x̂_0 on 0–255", "x0_mse", 0, 127.5**2, True),
        ("mean squared error of ε", "eps_mse", 0, 1.0, True),
        ("Σ_{j≥t} L_j, the rate, in bits/dim", "rate", 0, 1.0, False),
    ):
        series = [
            _per_t(subject, number, bound, name, shift, scale)
            for number, (subject, bound) in enumerate(bounds.items())
        ]
        choices.append(Choice(label, Axis(label, log), series))
    priors = "; ".join(f"{bound['terms'][-1]:.3g} ({label})" for label, bound in bounds.items())
    plot = Plot(
        "bits-per-t",
        "Terms of the bound",
        f"L_0 is {next(iter(bounds.values()))['terms'][0]:.3g} bits/dim.",
        Axis("t, index of the chain"),
        choices,
        note="t = 1 is the decoder's term, L_0; bands and bars are one standard error over images "
        "to both sides, and a hollow point is of a single image, its error unknown. Not in the "
        f"plot of the terms: L_T in bits/dim, {priors}.",
    )
    return Section("bits", "Bits per t", plot.html())


def _labelled(run: RunData) -> dict[str, Result]:
    """The results of bits/dim by split, step, chain, and what else tells those of a split apart."""
    found = {}
    for r in (r for r in run.results if r.name.startswith("bits_per_dim_")):
        protocol = r.manifest.measured.protocol
        others = [o.manifest.measured.protocol for o in run.results if o.name == r.name]
        apart = {k: v[0] for o in others for k, v in manifest.differences(protocol, o).items()}
        told = {"step": f"{r.step:,}", "chain": protocol.get("chain", "unknown")} | apart
        found[", ".join([r.name.removeprefix("bits_per_dim_"), *tables.words(told)])] = r
    return found


def _per_t(
    name: str, color: int, bound: dict[str, np.ndarray], of: str, shift: int, scale: float
) -> Series:
    """A quantity at t = 1..T: column t − shift of its array; times without images are left out."""
    times = np.arange(1, len(bound[of]))
    values, errors = (scale * bound[key][times - shift] for key in (of, f"{of}_error"))
    seen = np.flatnonzero(np.isfinite(values))
    kind = "points" if len(seen) < len(times) else "line"
    points = (array[seen].tolist() for array in (times, values, errors))
    return Series(name, *points, kind, color)
