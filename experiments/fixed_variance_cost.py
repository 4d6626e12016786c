"""What the fixed choices of Σ cost: bits/dim lost against the best isotropic and the learned one.

    python -m experiments.fixed_variance_cost --run=runs/digits
    python -m experiments.fixed_variance_cost --run=runs/digits --learned=runs/digits_learned

with --config.KEY=VALUE for what differs from the run's config.

§3.2 of the paper fixes σ²_t to β_t or to β̃_t and finds similar results; here is how similar. The
mean of the trained network stays as it is; σ²_t alone is exchanged:

  fixed_large   β_t, but β̃_2 at t = 1
  fixed_small   β̃_t, but β̃_2 at t = 1
  best          the best number: β̃_t + E‖μ̃_t − μ_θ‖²/D for each t, or where --terms < T one
                σ²_t/β̃_t for each group of neighbouring times; at t = 1 the minimum of L_0, found
                over the images
  learned       the network's own, if the run has learned it, or another run's (--learned), which
                is another network, with other means

Two panels: σ²_t over β̃_t, of a learned Σ the geometric mean over images and coordinates; and the
bits/dim that a choice loses at each t against `best`, with their sum from t = 1 on (dashed). What
is gained instead is dotted. The legend has the whole bound. The CSV has a row for each group of
neighbouring times, enough for a hundred images, and one for the whole at its end.

Times and noise are those of the bound of --mode=evaluate at draw 0, with --terms in the place of
evaluation.terms. Errors are standard errors over images, those of losses of the differences image
by image. `best` is fitted to the images it is compared on: its advantage is too large by about ¼ of
a squared relative error of σ²_t, nats for each of the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.config import RequestError, get, validate
from ddpm_jax.evaluation import bound as bounds
from ddpm_jax.evaluation import requests
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.evaluation.results import load_for_evaluation
from ddpm_jax.runs import RunDirectory
from experiments import common
from experiments.common import add_split, over_images, style
from experiments.variance_choices import (
    Choice,
    Errors,
    choices,
    chosen_process,
    grouped,
    measure,
    total,
)

FIXED = ("fixed_large", "fixed_small")
LEARNED = ("learned", "learned_range")


def table(
    errors: Errors, found: dict[str, Choice], group_of: np.ndarray, large: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each group of times that images have terms at, and at last the whole.

    Terms and losses are means over the group's images, bits/dim for each t; `cumulative` is the
    loss from t = 1 to the end of the group, as it enters the whole.

    Args:
      large: [T+1], β_t/β̃_t.
    """
    rows, cumulative = [], dict.fromkeys(found, 0.0)
    group, n = group_of[errors.times], len(errors.times)
    for number in range(group_of.max() + 1):
        inside = group == number
        if not inside.any():
            continue
        times = np.flatnonzero(group_of == number)
        row = {"t": int(times[0]), "t_last": int(times[-1]), "images": int(inside.sum())}
        row["beta_over_posterior_variance"] = float(large[times].mean())
        for name in (name for name in found if name not in FIXED):
            ratio = math.exp(found[name].log_ratio[times[0]])
            row[ratio_column(name)] = ratio
        weights = np.broadcast_to(errors.weights, inside.shape)[inside]
        for name, choice in found.items():
            put(row, name, over_images(choice.terms[inside]))
        for name in (name for name in found if name != "best"):
            lost = (found[name].terms - found["best"].terms)[inside]
            cumulative[name] += float(weights @ lost) / n
            put(row, f"{name}_lost", over_images(lost))
            row[f"{name}_lost_cumulative"] = cumulative[name]
        rows.append(row)
    whole = dict.fromkeys(rows[0]) | {"t": "all", "images": n}
    for name, choice in found.items():
        put(whole, name, over_images(total(errors, choice)))
        if name != "best":
            put(whole, f"{name}_lost", lost_in_all(errors, found, name))
            whole[f"{name}_lost_cumulative"] = whole[f"{name}_lost"]
    return [*rows, whole]


def ratio_column(name: str) -> str:
    """The column of a choice's σ²_t/β̃_t: a learned one differs over images and coordinates."""
    mean = "_geometric_mean" if name == "learned" else ""
    return f"{name}_over_posterior_variance{mean}"


def put(row: dict[str, Any], name: str, value: Measured) -> None:
    """Adds a number and its error to a row."""
    row[name], row[f"{name}_error"] = float(value), value.standard_error


def lost_in_all(
    errors: Errors, found: dict[str, Choice], name: str, against: str = "best"
) -> Measured:
    """What a choice loses in the whole bound; its error is that of the difference."""
    return over_images((found[name].terms - found[against].terms) @ errors.weights)


STYLES = {
    "fixed_large": ("C0", r"fixed_large, $\beta_t$"),
    "fixed_small": ("C1", r"fixed_small, $\tilde\beta_t$"),
    "best": ("black", "best isotropic"),
    "learned": ("C2", "learned by "),
}


def draw(rows: Sequence[dict[str, Any]], labels: dict[str, str]) -> bytes:
    """The two panels as PNG.

    Args:
      rows: of `table`.
      labels: of the choices, for the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    variances, losses = figure.subplots(1, 2)
    for axis in (variances, losses):
        axis.set_xscale("log")
        axis.set_yscale("log")
    *rows, whole = rows
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    t = (columns["t"] + columns["t_last"]) / 2
    beta = columns["beta_over_posterior_variance"]
    ratios = {"fixed_large": np.where(t == 1, 1, beta), "fixed_small": np.ones(len(t))}
    for name, label in labels.items():
        line = {"color": STYLES[name][0], "lw": 2, "marker": "o", "ms": 3}
        ratio = ratios[name] if name in FIXED else columns[ratio_column(name)]
        # The decoder's variance stands alone: it is relative to another.
        variances.plot(t[1:], ratio[1:], label=label, **line)
        variances.plot(t[:1], ratio[:1], **line | {"ms": 7, "marker": "D", "mfc": "none"})
        if name != "best":
            draw_losses(losses, t, columns, name, line)
    for ls, label in (("-", "at each t"), ("--", "sum from t = 1"), (":", "gained, not lost")):
        losses.plot([], [], color="grey", ls=ls, lw=1.5, label=label)
    top = max(abs(whole[f"{name}_lost"]) for name in labels if name != "best")
    losses.set_ylim(1e-7 * top, 3 * top)
    for axis in (variances.yaxis, losses.xaxis, variances.xaxis):
        axis.set_major_formatter("{x:g}")
    label_between_powers(variances)
    figure.legend(
        *variances.get_legend_handles_labels(), fontsize=11, ncols=2, loc="outside lower center"
    )
    losses.legend(fontsize=11, loc="lower left")
    ratio = r"$\sigma_t^2\,/\,\tilde\beta_t$  (diamonds at t = 1: $\sigma_1^2\,/\,\tilde\beta_2$)"
    style(variances, "t", ratio, "variance of the reverse process")
    style(losses, "t", "bits/dim", "bits/dim lost against the best isotropic Σ")
    variances.tick_params(which="minor", labelsize=10)
    return common.to_png(figure)


def label_between_powers(axis: Any) -> None:
    """More numbers on a logarithmic y axis of few powers of ten."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_ylim()
    if high / low < 30:
        axis.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_minor_formatter("{x:.3g}")


def draw_losses(
    axis: Any, t: np.ndarray, columns: dict[str, np.ndarray], name: str, line: dict[str, Any]
) -> None:
    """One choice's losses at each t with their errors, and their sum; gains dotted."""
    lost, error = columns[f"{name}_lost"], columns[f"{name}_lost_error"]
    low = np.where(lost > error, lost - error, np.nan)
    axis.fill_between(t, low, lost + error, color=line["color"], alpha=0.25, lw=0)
    whole = columns[f"{name}_lost_cumulative"]
    for sign, ls, ls_of_sum in ((1, "-", "--"), (-1, ":", ":")):
        axis.plot(t, positive(sign * lost), ls=ls, **line)
        axis.plot(t, positive(sign * whole), ls=ls_of_sum, lw=1.5, color=line["color"])


def positive(values: np.ndarray) -> np.ndarray:
    """The values that a logarithmic axis can show; NaN in place of the others."""
    return np.where(values > 0, values, np.nan)


def texts(
    errors: Errors, found: dict[str, Choice], learner: str
) -> tuple[dict[str, str], list[str]]:
    """The choices' labels, and the notes below the figure.

    Args:
      learner: what has the learned Σ.
    """
    named = {"fixed_large": "β_t", "fixed_small": "β̃_t", "best": "isotropic", "learned": learner}
    labels, notes = {}, []
    for name, choice in found.items():
        value = over_images(total(errors, choice)).text()
        label = STYLES[name][1] + (learner if name == "learned" else "")
        labels[name] = f"{label}: {value}"
        note = f"{name} ({named[name]}): {value}"
        if name != "best":
            note += f", {lost_in_all(errors, found, name).text()} above the best isotropic"
        notes.append(f"{note}.")
    gap = lost_in_all(errors, found, "fixed_large", "fixed_small").text()
    notes.append(f"fixed_large less fixed_small: {gap}.")
    return labels, notes


def load_learned(study: common.Study) -> common.Study:
    """The run of --learned, to be measured on the images of the study's run and beside it.

    Raises:
      RequestError: it has learned no Σ, or other data or another chain.
    """
    directory = RunDirectory.of(study.flags.learned)
    config, own = directory.load_config(), study.directory.load_config()
    if config.diffusion.variance not in LEARNED:
        raise RequestError(
            f"--learned={study.flags.learned}: that run's variance is "
            f"{config.diffusion.variance}; name one with learned or learned_range"
        )
    if study.run.process.learns_variance:
        raise RequestError("--learned: the variance of --run is learned itself; leave it out")
    same = ["data.name", "data.image_size", "data.channels"]
    same += [f"diffusion.{key}" for key in ("schedule", "num_steps", "beta_start", "beta_end")]
    same += ["data.data_dir"] if own.data.name == "folder" else []
    for key in same:
        if get(own, key) != get(config, key):
            raise RequestError(
                f"--learned={study.flags.learned}: {key} is {get(config, key)}, not "
                f"{get(own, key)} as in --run; name a run on the same data and chain"
            )
    for key in ("steps", "max_images", "clip", "batch_size"):
        config.evaluation[key] = study.run.config.evaluation[key]
    validate(config)
    run = load_for_evaluation(study.flags.learned, config)
    return dataclasses.replace(study, run=run)


def measure_learned(
    other: common.Study, images: tuple[Any, ...], group_of: np.ndarray, name: str
) -> tuple[Choice, str]:
    """The bound of the run of --learned under its own Σ, and what it loses against its best."""
    errors, process = measure(other, *images), chosen_process(other.run)
    found = choices(errors, process, group_of)
    best = over_images(total(errors, found["best"])).text()
    lost = lost_in_all(errors, found, "learned").text()
    note = f"With the means of {name} the best isotropic Σ gives {best}; its own loses {lost}."
    return found["learned"], note


def work(study: common.Study) -> None:
    """Makes the figure."""
    run, e = study.run, study.run.config.evaluation
    process = chosen_process(run)
    num_steps = process.schedule.num_steps
    if num_steps == 1:
        raise RequestError("a chain of one step has no Σ but the decoder's; choose a longer one")
    try:
        terms = bounds.checked_terms(study.flags.terms, num_steps)
    except ValueError as error:
        raise RequestError(f"--{error}") from error
    other = load_learned(study) if study.flags.learned else None
    source = common.open_split(study)
    positions = requests.positions(source, e.max_images, "evaluation.max_images")
    images = source, positions, terms, run.config.seed
    errors = measure(study, *images)
    group_of = grouped(num_steps, terms, len(positions))
    found, learner, more = choices(errors, process, group_of), "this network", []
    if other is not None:
        name = RunDirectory.of(study.flags.learned).path.name
        learner = f"{name} (another network)"
        found["learned"], note = measure_learned(other, images, group_of, name)
        more = [note]
    log_beta, log_small = (
        np.asarray(x, np.float64)
        for x in (process.schedule.log_beta, process.schedule.log_posterior_variance)
    )
    rows = table(errors, found, group_of, np.exp(log_beta - log_small))
    labels, notes = texts(errors, found, learner)
    protocol = {
        "split": source.split,
        "images": len(positions),
        "terms": terms or "all",
        "chain": requests.chain(e.steps, run.config.diffusion.num_steps),
        "clip": e.clip,
        "learned": learner if "learned" in found else None,
    }
    notes = [f"{run.config.data.name} {source.split}, {len(positions):,} images.", *notes, *more]
    study.save("Cost of a fixed Σ", draw(rows, labels), rows, protocol, notes)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the experiment's flags."""
    add_split(parser)
    parser.add_argument(
        "--learned", default="", help="a run with learned variance on the same data"
    )
    parser.add_argument(
        "--terms", type=int, default=100, help="of an image's T, stratified; 0: all (default 100)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return common.main("fixed_variance_cost", __doc__, work, argv, add_flags)


if __name__ == "__main__":
    sys.exit(main())
