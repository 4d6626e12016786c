"""Progressive lossy compression: distortion and rate over the reverse process (Fig. 5, Table 4).

    python -m experiments.progressive_coding --run=runs/digits

with --config.KEY=VALUE for what differs from the run's config, such as
--config.evaluation.terms=0 for all T terms of every image.

Algorithms 3 and 4 send x_T, then x_{T−1} given x_T, and so on. After T − t + 1 steps the receiver
has x_t, for L_T + L_{T−1} + … + L_t bits/dim, and estimates x_0 by x̂_0(x_t), Eq. 15. Three panels:
the RMSE of that estimate on 0–255, and the bits, against the steps done; and one against the
other. Bands are one standard error over images to both sides. All T steps end at the rate of
Table 4; L_0, the distortion in bits, then turns x_1 into x_0 without loss. The table's ten points
are marked beside what they can be compared with: ε-prediction on the whole CIFAR-10 test split, by
the whole chain of the paper's schedule.

The bound is that of --mode=evaluate, measured unless it is there. Where `evaluation.terms` has
chosen a part of the terms, few images share a time: the curves of x̂_0 then show means over
neighbouring times, enough for a hundred images each. The CSV has a row for each time, unaveraged;
an empty cell has too few images (none for a value, one for an error).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax.evaluation import bound as bounds
from ddpm_jax.evaluation import requests
from ddpm_jax.evaluation.bound import Bound
from ddpm_jax.evaluation.manifest import Measured
from experiments import common
from experiments.common import has_paper_s_chain, style

ENOUGH = 100  # Images whose mean is shown as a point.
FULL_SCALE = 127.5  # A difference of x in [−1, 1], on 0–255.

PAPER_LABEL = r"the paper's Table 4 (test, ε, $L_\mathrm{simple}$)"
# Steps done T − t + 1, rate in bits/dim, RMSE on 0–255.
PAPER = (
    (1000, 1.77581, 0.95136),
    (900, 0.11994, 12.02277),
    (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656),
    (600, 0.01507, 30.80948),
    (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765),
    (300, 0.00081, 54.18826),
    (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is known after so many steps of the chain; all float64 [k], in the order of t.

    t: the time of x_t, or the mean of neighbouring times. steps: S − t + 1. rate: the bits/dim
    sent, Σ_{j≥t} L_j. rmse: of x̂_0(x_t), on 0–255. images: behind x̂_0. Errors are standard errors
    over images; NaN where one image alone was there.
    """

    t: np.ndarray
    steps: np.ndarray
    rate: np.ndarray
    rate_error: np.ndarray
    rmse: np.ndarray
    rmse_error: np.ndarray
    images: np.ndarray


def neighbors(num_steps: int, terms: int, observations: int) -> list[tuple[int, int]]:
    """(first, last) times, from 1 to S without a gap, of those whose images are taken together.

    Args:
      terms: of each image, as for `bound.compile_terms`; with all of them each time stands alone.
      observations: images times draws; each has one time in each part of `bound.strata`.
    Returns:
      divisions of the parts, as many as leave `ENOUGH` observations to each.
    """
    if not terms:
        return [(t, t) for t in range(1, num_steps + 1)]
    found = [(1, 1)]
    for start, end in itertools.pairwise(bounds.strata(num_steps, terms)):
        count = min(max(observations // ENOUGH, 1), end - start)
        edges = np.linspace(start, end, count + 1).round().astype(int)
        found += [(int(a), int(b) - 1) for a, b in itertools.pairwise(edges)]
    return found


def images_at(
    num_steps: int, terms: int, seed: int, positions: np.ndarray, draws: int
) -> np.ndarray:
    """int64 [S+1]: how many images have a term at each time; arguments as for `bound.measure`."""
    if not terms:
        return np.append(0, np.full(num_steps, len(positions)))

    @jax.jit
    def times(draw: jax.Array) -> jax.Array:
        keys = keys_lib.example_keys(seed, "bound_times", draw, jnp.asarray(positions))
        return jax.vmap(lambda key: bounds.chosen_times(key, num_steps, terms))(keys)

    there = np.zeros((len(positions), num_steps + 1), bool)
    for draw in range(draws):
        there[np.arange(len(positions))[:, None], np.asarray(times(draw))] = True
    return there.sum(axis=0)


def curve(bound: Bound, images: np.ndarray, groups: Sequence[tuple[int, int]]) -> Curve:
    """Rate and distortion at each group of times, of those that images had terms at.

    The pair at t is the bound's `rate[t]` and `x0_mse[t]`: x_t has been sent, and x̂_0 is estimated
    from it. At t = 1 that is all but L_0, and x̂_0(x_1). A group's numbers are means over its
    images; its error is their spread, that of the times within the group included.

    Args:
      images: [S+1], of `images_at`.
      groups: of `neighbors`.
    """
    num_steps, rows = len(bound.rate) - 1, []
    for first, last in groups:
        times = np.arange(first, last + 1)
        times = times[images[times] > 0]
        if not times.size:
            continue
        n = images[times]
        mean = lambda x, n=n, times=times: n @ x[times] / n.sum()  # noqa: E731
        mse, error = mean(bound.x0_mse), bound.x0_mse_error[first]
        if len(times) > 1:
            own = np.where(n > 1, bound.x0_mse_error[times], 0)
            squares = n * (n - 1) * own**2 + n * (bound.x0_mse[times] - mse) ** 2
            # With several draws an image may be there several times.
            independent = min(n.sum(), len(bound.total))
            error = np.sqrt(squares.sum() / (n.sum() - 1) / independent)
        t = mean(np.arange(num_steps + 1))
        rmse = FULL_SCALE * np.sqrt(mse)
        rate = mean(bound.rate), mean(bound.rate_error)
        rows.append((t, num_steps - t + 1, *rate, rmse, rmse_error(mse, error), n.sum()))
    return Curve(*np.array(rows).T)


def rmse_error(mse: Any, mse_error: Any) -> Any:
    """The standard error of the RMSE on 0–255, from that of the mean square on [−1, 1]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return FULL_SCALE * mse_error / (2 * np.sqrt(mse))


def table(bound: Bound, images: np.ndarray) -> list[dict[str, Any]]:
    """A row for each t, from S down as the reverse process has it; see the module."""
    num_steps = len(bound.rate) - 1
    error = rmse_error(bound.x0_mse, bound.x0_mse_error)
    rows = []
    for t in range(num_steps, 0, -1):
        columns = {
            "rate": bound.rate[t],
            "rate_error": bound.rate_error[t],
            "rmse": FULL_SCALE * np.sqrt(bound.x0_mse[t]),
            "rmse_error": error[t],
            "term": bound.terms[t - 1],
            "term_error": bound.terms_error[t - 1],
        }
        shown = {k: float(v) if np.isfinite(v) else None for k, v in columns.items()}
        rows.append({"t": t, "steps_done": num_steps - t + 1, **shown, "images": int(images[t])})
    return rows


def draw(found: Curve, bound: Bound, paper: bool, what: str) -> bytes:
    """The three panels as PNG.

    Args:
      found: the curve.
      paper: whether the paper's points are marked.
      what: names the run, for the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    by_distortion, by_rate, both = figure.subplots(1, 3)
    line = {"color": "C0", "lw": 2, "label": what}
    if len(found.t) < 60:
        line |= {"marker": "o", "ms": 4}
    band = {"color": "C0", "alpha": 0.3, "lw": 0}
    num_steps = len(bound.rate) - 1
    done = num_steps - np.arange(1, num_steps + 1) + 1
    low, high = found.rmse - found.rmse_error, found.rmse + found.rmse_error
    by_distortion.plot(found.steps, found.rmse, **line)
    by_distortion.fill_between(found.steps, low, high, **band)
    rate, error = bound.rate[1:], bound.rate_error[1:]
    axes = [by_rate]
    if num_steps >= 20:
        axes.append(by_rate.inset_axes((0.13, 0.33, 0.52, 0.6)))
    for axis in axes:
        axis.plot(done, rate, color="C0", lw=2)
        axis.fill_between(done, rate - error, rate + error, **band)
    both.plot(found.rate, found.rmse, **line)
    both.fill_between(found.rate, low, high, **band)
    both.fill_betweenx(
        found.rmse, found.rate - found.rate_error, found.rate + found.rate_error, **band
    )
    if paper:
        steps, rates, rmses = np.array(PAPER).T
        marks = {"ls": "", "marker": "x", "ms": 8, "mew": 2, "color": "C3", "zorder": 5}
        by_distortion.plot(steps, rmses, **marks, label=PAPER_LABEL)
        both.plot(rates, rmses, **marks)
        for axis in axes:
            axis.plot(steps, rates, **marks)
    if len(axes) > 1:
        axes[1].set_yscale("log")
        axes[1].set_ylim(max(1e-5, rate[rate > 0].min()), None)
        axes[1].set_title("the same, logarithmic", fontsize=10)
    # The start is at no bits, or at those of L_T.
    both.set_xscale("symlog", linthresh=1e-3, linscale=0.4)
    both.set_xlim(0, None)
    style(by_distortion, "reverse steps done, T − t + 1", "RMSE of x̂$_0$ (0–255)", "distortion")
    style(by_rate, "reverse steps done, T − t + 1", "bits/dim sent", "rate")
    style(both, "rate (bits/dim; linear below 0.001)", "RMSE of x̂$_0$ (0–255)", "rate–distortion")
    by_distortion.legend(fontsize=11)
    return common.to_png(figure)


def notes(bound: Bound, split: str, last: Curve, paper: bool) -> list[str]:
    """The totals with their errors, and where the bits are."""
    units = {"rmse": "RMSE of x̂_0 at t = 1 (0–255)"}
    values = {
        name: Measured(*pair, units.get(name, "bits/dim")).text()
        for name, pair in bound.summary().items()
    }
    num_steps = len(bound.rate) - 1
    found = [
        f"{split}, {len(bound.total):,} images: rate {values['rate']}, distortion L_0 "
        f"{values['distortion']}, together {values['bits_per_dim']}; {values['rmse']}."
    ]
    if num_steps >= 10:
        late = 1 - bound.rate[1 + num_steps // 10] / bound.rate[1]
        beside = " (Table 4: 93 %)" if paper else ""
        found.append(f"{late:.0%} of the rate is sent in the last tenth of the steps{beside}.")
    if len(last.t) < num_steps:
        found.append(
            f"Of each image's {num_steps:,} terms a part was evaluated, at times of its own: "
            f"x̂_0's points are means over neighbouring times, of {last.images.min():.0f} images "
            "or more."
        )
    return found


def is_the_paper_s(config: ml_collections.ConfigDict, split: str, whole: bool) -> bool:
    """Whether the paper's points belong beside the curve of a run.

    Args:
      whole: whether it is of all images of the split.
    """
    d = config.diffusion
    return (
        (config.data.name, split, d.prediction) == ("cifar10", "test", "eps")
        and has_paper_s_chain(config)
        and requests.chain(config.evaluation.steps, d.num_steps) == "all"
        and whole
    )


def work(study: common.Study) -> None:
    """Makes the figure."""
    run, source = study.run, common.open_split(study)
    e, split = run.config.evaluation, source.split
    positions = requests.positions(source, e.max_images, "evaluation.max_images")
    bound = study.bound(split)
    num_steps, (count, draws) = len(bound.rate) - 1, bound.total.shape
    terms = bounds.checked_terms(e.terms, num_steps)
    images = images_at(num_steps, terms, run.config.seed, positions, draws)
    found = curve(bound, images, neighbors(num_steps, terms, count * draws))
    paper = is_the_paper_s(run.config, split, count == len(source))
    name = study.directory.path.name
    protocol = {
        "split": split,
        "images": count,
        "draws": draws,
        "terms": terms or "all",
        "chain": requests.chain(e.steps, run.config.diffusion.num_steps),
        "clip": e.clip,
    }
    study.save(
        "Progressive lossy compression",
        draw(found, bound, paper, f"{name}, {run.config.data.name} {split}"),
        table(bound, images),
        protocol,
        notes(bound, split, found, paper),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return common.main("progressive_coding", __doc__, work, argv, common.add_split)


if __name__ == "__main__":
    sys.exit(main())
