"""Figs. 8 and 9: between two test images, through the latent space.

    python -m experiments.interpolation --run=runs/digits
    python -m experiments.interpolation --run=runs/celeba_hq --times=500 --shared_noise

Pairs of images of `evaluation.split`, of different classes where the set has classes, are diffused
to t, mixed as (1 − λ) x_t + λ x'_t and decoded by the reverse process (§4.4). Each image's noise is
its own, the same for every λ and t, as is the noise of the reverse steps; --shared_noise gives both
images of a pair the same. The larger t, the coarser the features that mix, and the less of the
sources is left at λ = 0 and 1.

Writes figures/interpolation.png, for the first pairs a block each, with a row for each t between
the two sources; and .csv, with root mean squares over all pairs on 0–255 and their standard errors:

- reconstruction: of λ = 0 and 1 to their sources;
- step: between images of neighbouring λ, which is small where the change is smooth;
- ends: between λ = 0 and λ = 1.

The decoder is the ancestral chain of all T steps, as in the paper, or of config.sample.steps where
config.sample.method is ancestral; --times are those of the trained chain, of which a shorter one
has some.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax import sampling
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source, to_float, to_uint8
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import cost, reference, requests
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import from_host, network_jit, to_host
from ddpm_jax.parts import Arrays
from ddpm_jax.runs import Run
from ddpm_jax.training.metrics import NonFiniteError
from experiments import common
from experiments.common import Study
from experiments.progressive_generation import show

SHOWN = 3  # Pairs in the picture.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    parser.add_argument("--pairs", type=int, default=5, help="of images")
    parser.add_argument("--times", default="", help="T, 3T/4, T/2, T/4 unless given")
    parser.add_argument("--lambdas", type=int, default=11, help="evenly from 0 to 1, at least 2")
    parser.add_argument("--shared_noise", action="store_true", help="one for both images")


def work(study: Study) -> None:
    """Decodes, measures and saves the figure."""
    flags, run = study.flags, study.run
    if flags.lambdas < 2:
        raise RequestError(f"--lambdas={flags.lambdas}: choose at least 2, for λ = 0 and 1")
    process, decoder = choose_process(run)
    forks = common.chain_indices(process.schedule, flags.times, "--times")
    source = common.open_split(study)
    pairs = choose_pairs(source, flags.pairs)
    study.say(f"interpolation: {decoder}")
    sources = np.stack([source.images(pairs[:, k]) for k in (0, 1)], axis=1)
    times = np.asarray(process.schedule.timesteps)[forks].tolist()
    protocol = {
        **reference.data_protocol(source, len(pairs)),
        "positions": pairs.tolist(),
        "lambdas": flags.lambdas,
        "shared_noise": flags.shared_noise,
        "chain": requests.chain(process.schedule.num_steps, run.process.schedule.num_steps),
        "clip": run.config.sample.clip,
        "rounding": "nearest of 256 levels",
    }
    images = [
        decode(study, process, index, sources, protocol | {"t": t})
        for index, t in zip(forks, times, strict=True)
    ]
    rows = [{"t": t, **measure(sources, x)} for t, x in zip(times, images, strict=True)]
    noise = "one noise for both images" if flags.shared_noise else "a noise of its own each image"
    notes = [
        f"{len(pairs)} pairs of {source.name}/{source.split}, {flags.lambdas} λ, {noise}; "
        f"{decoder}.",
        "The outer columns are the sources; λ = 0 and 1 are decoded like the others.",
    ]
    study.save(
        "Interpolation",
        draw_figure(sources, images, times, rows),
        rows,
        protocol | {"times": times},
        notes,
    )


def choose_process(run: Run) -> tuple[Process, str]:
    """The chain that decodes, and what it is in words."""
    how, num_steps = run.config.sample, run.process.schedule.num_steps
    if how.method != "ancestral":
        note = (
            f"the ancestral chain of all {num_steps} steps, not config.sample.method={how.method}"
        )
        return run.process, f"{note}; --config.sample.method=ancestral for a shorter one"
    if how.steps in (0, num_steps):
        return run.process, f"the ancestral chain of all {num_steps} steps"
    words = f"the ancestral chain of {how.steps} of {num_steps} steps"
    return sampling.shorten(run.process, how.steps), words


def choose_pairs(source: Source, count: int) -> np.ndarray:
    """Positions int64 [count, 2], no image twice, those of a pair of different classes.

    The pairs are spread evenly over the set. Where a pair would be of one class, its second image
    is the next one that is free and of another. A set of a single class counts as one without.
    Labels are read, and with some sources images decoded, only as far as the search goes.

    Raises:
      RequestError: too few images, or no such image is left.
    """
    n = len(source)
    if count < 1:
        raise RequestError(f"--pairs={count}: choose at least 1")
    if 2 * count > n:
        raise RequestError(
            f"--pairs={count} needs {2 * count} images; {source.name}/{source.split} has {n}"
        )
    pairs = reference.evenly(n, 2 * count).reshape(2, count).T.copy()
    labels = source.labels(pairs[:, 0])
    if labels is None:
        return pairs
    for k, (first, second) in enumerate(pairs):
        taken, others = {*pairs[:, 0], *pairs[:k, 1]}, False
        for position, label in labels_around(source, second):
            others |= label != labels[k]
            if label != labels[k] and position not in taken:
                pairs[k, 1] = position
                break
        else:
            if not others:
                return pairs
            raise RequestError(
                f"--pairs={count}: {source.name}/{source.split} has no image left of another class "
                f"than image {first}'s; choose fewer"
            )
    return pairs


def labels_around(source: Source, start: int) -> Iterator[tuple[int, int]]:
    """(position, label) of all images from `start` on, once around, read in growing pieces."""
    n, done, piece = len(source), 0, 1
    while done < n:
        positions = (start + np.arange(done, min(done + piece, n))) % n
        yield from zip(positions.tolist(), source.labels(positions).tolist(), strict=True)
        done, piece = done + piece, min(2 * piece, reference.CHUNK)


def decode(
    study: Study, process: Process, index: int, sources: np.ndarray, protocol: dict[str, Any]
) -> np.ndarray:
    """What lies between the sources at an index of the chain: uint8 [pairs, lambdas, h, w, c].

    Args:
      sources: uint8 [pairs, 2, h, w, c].
      protocol: see `Study.arrays`.
    Raises:
      NonFiniteError: images that are not numbers.
      Interrupted: see `parts.collect`.
    """
    run, pairs, lambdas = study.run, len(sources), study.flags.lambdas
    together = max(1, run.config.sample.batch_size // lambdas)
    batch = padded_batch(min(together, pairs), run.layout)
    if not study.arrays_path(protocol).exists():
        shape = (batch * lambdas, *sources.shape[2:])
        evaluations = index * -(-pairs // batch)
        what = f"{pairs} pairs × {lambdas} λ at t = {protocol['t']}"
        cost.announce(what, run.layout, run.apply, run.params, shape, evaluations, study.say)
    decoder = compile_decoder(run, process, index, lambdas, study.flags.shared_noise)

    def piece(start: int, length: int) -> Arrays:
        numbers = np.arange(start, start + batch)
        ends = from_host(sources[np.minimum(numbers, pairs - 1)], run.layout.split(0))
        keys = keys_lib.example_keys(run.config.seed, "interpolation", 0, numbers)
        images = to_host(decoder(run.params, ends, keys))[:, :length]
        if not np.isfinite(images).all():
            raise NonFiniteError("images are not finite: try another checkpoint")
        return {"images": np.asarray(to_uint8(images)).swapaxes(0, 1)}

    return study.arrays(protocol, pairs, min(batch, pairs), piece, "pair")["images"]


def compile_decoder(
    run: Run, process: Process, index: int, lambdas: int, share_noise: bool
) -> Callable[..., jax.Array]:
    """`decoder(params, sources, keys)` -> float32 [lambdas, pairs, h, w, c].

    Sources are uint8 [pairs, 2, h, w, c], keys [pairs]; pairs a multiple of the devices.
    """

    def decoder(params, sources, keys):
        ends = to_float(sources)
        return sampling.interpolate(
            process,
            lambda x_t, t: run.apply(params, x_t, t),
            ends[:, 0],
            ends[:, 1],
            np.linspace(0, 1, lambdas).tolist(),
            index,
            keys,
            share_noise,
            run.config.sample.clip,
        )

    one = run.layout.split(0)
    shardings = run.params_sharding, one, one
    return network_jit(decoder, in_shardings=shardings, out_shardings=run.layout.split(1))


def measure(sources: np.ndarray, images: np.ndarray) -> dict[str, float | None]:
    """Root mean squares over pairs and pixels, on 0–255, and their standard errors over pairs.

    Args:
      sources: uint8 [pairs, 2, h, w, c].
      images: uint8 [pairs, lambdas, h, w, c], from λ = 0 to 1.
    """
    x, y = images.astype(np.float64), sources.astype(np.float64)
    differences = {
        "reconstruction": x[:, [0, -1]] - y,
        "step": np.diff(x, axis=1),
        "ends": x[:, :1] - x[:, -1:],
    }
    found: dict[str, float | None] = {}
    for name, difference in differences.items():
        squares = np.square(difference).mean(axis=(1, 2, 3, 4))
        rms = math.sqrt(squares.mean())
        found[f"{name}_rmse"], found[f"{name}_rmse_error"] = rms, None
        if len(squares) > 1:
            error = squares.std(ddof=1) / math.sqrt(len(squares))
            found[f"{name}_rmse_error"] = error / (2 * rms) if rms else 0.0
    return found


def draw_figure(
    sources: np.ndarray, images: list[np.ndarray], times: list[int], rows: list[dict[str, Any]]
) -> bytes:
    """The PNG: a block for each of the first pairs, and the numbers over t.

    Args:
      sources: uint8 [pairs, 2, h, w, c]. images: for each time, uint8 [pairs, lambdas, h, w, c].
    """
    from matplotlib.figure import Figure

    shown, lambdas = min(SHOWN, len(sources)), images[0].shape[1]
    block = 9 * len(times) / (lambdas + 2) + 0.25
    figure = Figure(figsize=(12.5, shown * block + 0.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(9, 3.5))
    labels = [f"{x:.2g}" for x in np.linspace(0, 1, lambdas)]
    axes = left.subplots(shown, 1, squeeze=False)[:, 0]
    for k, axis in enumerate(axes):
        ends = [np.stack([sources[k, end]] * len(times)) for end in (0, 1)]
        between = np.stack([x[k] for x in images])
        parts = [ends[0][:, None], between, ends[1][:, None]]
        show(axis, np.concatenate(parts, axis=1), ["source", *labels, "source"])
        height = (axis.get_ylim()[0] + 0.5) / len(times)
        axis.set_yticks(
            [height * (i + 0.5) for i in range(len(times))], [f"t = {t}" for t in times]
        )
    axes[0].set_title("between two images, diffused to t, mixed and decoded")
    axes[-1].set_xlabel("λ")
    draw_numbers(right.subplots(2, 1, sharex=True), rows, lambdas)
    return common.to_png(figure)


def draw_numbers(axes: Any, rows: list[dict[str, Any]], lambdas: int) -> None:
    """The numbers over t, with their standard errors."""
    titles = {
        "reconstruction": "λ = 0, 1 to their sources",
        "step": f"neighbouring λ, {1 / (lambdas - 1):.2g} apart",
    }
    t = [row["t"] for row in rows]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        value = [row[f"{name}_rmse"] for row in rows]
        error = [row[f"{name}_rmse_error"] or 0 for row in rows]
        axis.errorbar(t, value, error, marker="o", capsize=4)
        axis.set(title=title, ylabel="RMSE on 0–255", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("t")


def main(argv: list[str] | None = None) -> int:
    """Makes the figure; returns the exit code."""
    return common.main("interpolation", __doc__, work, argv, add_flags)


if __name__ == "__main__":
    sys.exit(main())
