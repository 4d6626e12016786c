"""Samples beside their nearest training images: does the model copy what it has seen?

    python -m experiments.nearest_neighbors --run=runs/digits
    python -m experiments.nearest_neighbors --run=runs/digits --show=first --neighbors=8
    python -m experiments.nearest_neighbors --run=runs/cifar10 --features=pixels,effnetlite0_64

Writes nearest_neighbors.png, .csv and .json into the run's figures/. For pixels, and for the
features of a network: rows of samples with their nearest training images and the distances, and how
far samples are from the training set beside how far the held-out images of `evaluation.split` are.
The paper's appendix shows such pages for CelebA-HQ and LSUN, in pixels and in Inception's features.

How to read it. A model that has learned the distribution comes as close to the training set as new
images do: the two curves lie on each other. One that memorises comes closer: its curve is on the
left, distances below the held-out images' 1 % quantile (in red) are many more than 1 %, and the
closest pairs, which are shown first, look alike.

Samples are the largest set in the run's samples/ that was drawn from the same parameters; where
there is none, 1,000 are drawn, with a chain of 100 steps unless --config.sample.steps says
otherwise. Their distances are also kept as the result `nearest_…` of --mode=evaluate.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax import generation, parts
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import requests
from ddpm_jax.evaluation.drawing import Drawer
from ddpm_jax.evaluation.evaluators import QualityEvaluator
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.evaluation.neighbors import memorization_limit, neighbors_of
from ddpm_jax.evaluation.results import evaluate_and_keep
from ddpm_jax.interruption import Watch
from experiments import common
from experiments.common import Study
from experiments.sample_sets import COUNT, Space, drawn_by, extractors, held_out_split, real_images

ROWS = 8  # Samples shown in each space.
PIECE = 4096  # Samples whose neighbours are found at a time.
# In the picture, in images: between rows, above them, and between a sample and its neighbours.
PITCH, HEADING, APART = 1.3, 0.4, 0.3
SHARP = {"interpolation": "nearest"}


class Shown(NamedTuple):
    """One space's part of the figure.

    name: of the features. result: of `nearest`, see `neighbors.nearest_neighbors`.
    distances: float64 [n, k], of samples to their nearest; positions: int64 [n, k], which.
    held_out: float64 [h], of held-out images to their nearest; None without any.
    rows: int64 [r], the samples shown. neighbors: uint8 [r, k, h, w, c]. arrays: the file of both.
    """

    name: str
    result: Measured
    distances: np.ndarray
    positions: np.ndarray
    held_out: np.ndarray | None
    rows: np.ndarray
    neighbors: np.ndarray
    arrays: str

    @property
    def limit(self) -> float | None:
        """The distance below which a sample counts as memorised; None with too few held out."""
        return None if self.held_out is None else memorization_limit(self.held_out)


def work(study: Study) -> None:
    """Makes the figure."""
    flags = study.flags
    if flags.neighbors < 1:
        raise RequestError(f"--neighbors={flags.neighbors}: at least 1 is needed")
    if flags.count and flags.count < 2:
        raise RequestError(f"--count={flags.count}: at least 2 samples are needed")
    e = study.run.config.evaluation
    source = requests.open_split(study.run.config, e.reference, "evaluation.reference")
    used = len(requests.positions(source, e.reference_count, "evaluation.reference_count"))
    if flags.neighbors > used:
        raise RequestError(
            f"--neighbors={flags.neighbors}: {source.split} of {source.name} gives {used} images"
        )
    held_out = held_out_split(study)
    if held_out is None:
        study.say(
            f"config.evaluation.split={','.join(e.split)} holds nothing out from {e.reference}: "
            "distances of samples alone, without those of held-out images to judge them by"
        )
    found = extractors(study, flags.features)
    run = drawn_by(study, flags.count, min(e.count, COUNT))
    run.config.evaluation.count = run.config.sample.count
    drawer = Drawer(study.say)
    evaluators = [QualityEvaluator(run, x, ("nearest",), study.say, drawer) for x in found]
    results = []
    with Watch() as watch:
        for evaluator in evaluators:
            results += evaluate_and_keep(
                evaluator, run, study.directory, study.say, watch.asked
            ).values()
    images, _ = drawer(run, study.directory, None)
    shown = [
        _shown(Space(study, run, extractor), result, images, source, held_out)
        for extractor, result in zip(found, results, strict=True)
    ]
    figure = draw(shown, images, source.split, held_out.split if held_out else "")
    study.save(
        "Samples and their nearest training images",
        common.to_png(figure),
        [_row(one, len(images)) for one in shown],
        {
            "samples": generation.sampling_protocol(run),
            "spaces": {one.name: {**one.result.protocol, "arrays": one.arrays} for one in shown},
            "show": flags.show,
        },
        [_note(one, len(images), source.split, held_out) for one in shown],
        study.directory.evaluation / shown[0].arrays,
    )


def _shown(
    space: Space, result: Measured, images: np.ndarray, source: Source, held_out: Source | None
) -> Shown:
    study, k = space.study, space.study.flags.neighbors
    real = space.real(source)
    features = space.samples(images)["features"]
    of_samples = {
        "samples": generation.sampling_protocol(space.run),
        "reference": real.protocol,
        "neighbors": k,
    }
    near = _nearest(study, of_samples, features, real.features, k)
    others = None
    if held_out is not None:
        new = space.real(held_out)
        of_new = {"held_out": new.protocol, "reference": real.protocol}
        others = _nearest(study, of_new, new.features, real.features, 1)["distances"][:, 0]
    order = np.arange(len(images))
    if study.flags.show == "closest":
        order = np.argsort(near["distances"][:, 0], kind="stable")
    rows = order[:ROWS]
    neighbors = real_images(source, study.run.config.evaluation, near["positions"][rows])
    arrays = study.arrays_path(of_samples).name
    name = space.extractor.name
    return Shown(
        name, result, near["distances"], near["positions"], others, rows, neighbors, arrays
    )


def _nearest(
    study: Study, protocol: dict[str, Any], features: np.ndarray, real: np.ndarray, k: int
) -> parts.Arrays:
    def piece(start: int, length: int) -> parts.Arrays:
        return neighbors_of(features[start : start + length], real, k)._asdict()

    return study.arrays(protocol, len(features), PIECE, piece)


def _row(one: Shown, count: int) -> dict[str, Any]:
    quantiles = [f"quantile_{q}" for q in ("0", "0.01", "0.1", "0.5", "0.9")] + ["copies"]
    more = [*quantiles, *(f"held_out_{name}" for name in quantiles)]
    more += ["memorization", "memorization_standard_error"]
    return {
        "features": one.name,
        "samples": count,
        "held_out_images": None if one.held_out is None else len(one.held_out),
        "median": float(one.result),
        "median_standard_error": one.result.standard_error,
        **{name: one.result.details.get(name) for name in more},
        "memorization_limit": one.limit,
    }


def _note(one: Shown, count: int, split: str, held_out: Source | None) -> str:
    r, d = one.result, one.result.details
    text = (
        f"{one.name}: the nearest image of {split} is at a median distance of {r.text()}, "
        f"{d['copies']:.0f} of {count:,} samples are copies of one"
    )
    if held_out is None:
        return text + "; no held-out images to compare with."
    text += (
        f"; of {len(one.held_out):,} images of {held_out.split} the median is "
        f"{d['held_out_quantile_0.5']:.4g}, copies {d['held_out_copies']:.0f}"
    )
    if one.limit is not None:
        closer, expected = _closer(one)
        text += f"; {closer} of the samples are closer than 99 % of those (expected: {expected})"
    return text + "."


def _closer(one: Shown) -> tuple[str, str]:
    """The share of samples below the limit, held-out images' 1 % quantile, and the expected one.

    An honest sample is below the limit from h images with a probability that has a Beta
    distribution of mean p = 0.01 and variance p (1 − p) / (h + 2).
    """
    d, spread = one.result.details, math.sqrt(0.01 * 0.99 / (len(one.held_out) + 2))
    share, error = d["memorization"], d["memorization_standard_error"]
    return f"{100 * share:.1f} ± {100 * error:.1f} %", f"1.0 ± {100 * spread:.1f} %"


def draw(shown: list[Shown], images: np.ndarray, split: str, held_out: str) -> Any:
    """The figure: above the pairs, below the distances' distributions; a column a space.

    Args:
      images: uint8 [n, h, w, c], the samples.
      split, held_out: what the sets are called; held_out "" without one.
    """
    from matplotlib.figure import Figure

    rows, k = shown[0].neighbors.shape[:2]
    scale = max(0.95, 5.5 / (k + APART + 1))  # Inches an image.
    width, tall = scale * (k + APART + 1) + 0.3, scale * (rows * PITCH + HEADING)
    figure = Figure(figsize=(width * len(shown), tall + 4.3), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, height_ratios=(tall, 3.5))
    for (above, below), one in zip(panels.T, shown, strict=True):
        _draw_pairs(above, one, images, split, held_out)
        _draw_distances(below, one, split, held_out)
    return figure


def _draw_pairs(axes: Any, one: Shown, images: np.ndarray, split: str, held_out: str) -> None:
    limit, k = one.limit or 0.0, one.neighbors.shape[1]
    for row, (sample, neighbors) in enumerate(zip(one.rows, one.neighbors, strict=True)):
        y = row * PITCH
        _draw_image(axes, images[sample], 0, y)
        axes.text(0.5, y + 1.02, f"no. {sample}", ha="center", va="top", fontsize=10)
        for column, image in enumerate(neighbors):
            x, distance = column + 1 + APART, one.distances[sample, column]
            _draw_image(axes, image, x, y)
            close = {"color": "tab:red", "weight": "bold"} if distance < limit else {}
            text = f"{distance:.3f}" if distance else "copy"
            axes.text(x + 0.5, y + 1.02, text, ha="center", va="top", fontsize=11, **close)
    axes.set(xlim=(0, k + 1 + APART), ylim=(len(one.rows) * PITCH, -HEADING), aspect="equal")
    axes.axis("off")
    axes.text(0.5, -0.1, "sample", ha="center", fontsize=11)
    heading = f"nearest of {split}, RMS distance"
    heading += f" (red: closer than 99 % of {held_out})" if limit else ""
    axes.text(1 + APART + k / 2, -0.1, heading, ha="center", fontsize=11)
    axes.set_title(f"in {'pixels' if one.name == 'pixels' else one.name}", fontsize=14)


def _draw_image(axes: Any, image: np.ndarray, x: float, y: float) -> None:
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.shape[-1] == 1 else {}
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(pixels, extent=(x + 0.03, x + 0.97, y + 0.97, y + 0.03), **SHARP, **grey)


def _draw_distances(axes: Any, one: Shown, split: str, held_out: str) -> None:
    curves = [("samples", one.distances[:, 0], "tab:blue")]
    if one.held_out is not None:
        curves.append((f"images of {held_out}", one.held_out, "black"))
    for name, values, color in curves:
        x, share = np.sort(values), np.arange(1, len(values) + 1) / len(values)
        error = np.sqrt(share * (1 - share) / len(values))
        axes.step(x, share, where="post", color=color, label=f"{len(values):,} {name}")
        axes.fill_between(x, share - error, share + error, step="post", color=color, alpha=0.2)
    text = []
    if one.limit is not None:
        axes.axvline(one.limit, color="tab:red", ls="--", lw=1)
        closer, expected = _closer(one)
        text += ["left of the red line:", f"{closer} of samples", f"(expected: {expected})"]
    text.append(f"copies: {one.result.details['copies']:.0f}")
    axes.text(0.97, 0.05, "\n".join(text), ha="right", transform=axes.transAxes, fontsize=11)
    axes.set(ylim=(0, 1), xlim=(0, None))
    unit = "pixels in [−1, 1]" if one.name == "pixels" else f"features of {one.name}"
    axes.set_xlabel(f"RMS distance to the nearest of {split}, {unit}", fontsize=12)
    axes.set_ylabel("share that close or closer", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=11, framealpha=1)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    parser.add_argument(
        "--features",
        default="",
        help="comma-separated: pixels, effnetlite0_64, inception; pixels and what there is, if not "
        "given",
    )
    parser.add_argument(
        "--count", type=int, default=0, help="samples at least; a larger set is taken whole"
    )
    parser.add_argument(
        "--show",
        choices=("closest", "first"),
        default="closest",
        help="the samples closest to the training set, or the first drawn",
    )
    parser.add_argument("--neighbors", type=int, default=5, help="of each sample shown")


main: Callable[..., int] = functools.partial(
    common.main, "nearest_neighbors", __doc__, work, add_flags=add_flags
)

if __name__ == "__main__":
    sys.exit(main())
