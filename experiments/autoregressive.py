"""Autoregressive decoding as a diffusion whose forward process masks coordinates (§4.3).

    python -m experiments.autoregressive --run=runs/digits
    python -m experiments.autoregressive --run=runs/digits --order=random --steps=2600

with --config.KEY=VALUE for what differs from the run's config.

T is the dimensionality of the data, q(x_t|x_{t−1}) blanks the t-th coordinate of --order, p(x_T) is
the blank image, and p_θ(x_{t−1}|x_t) copies what is not blank and gives the t-th coordinate a
distribution over the grey levels of the training split: the run's own U-Net with a softmax at each
coordinate, which sees the image and which of it is blank. It is trained by the run's own training
step and settings, on one t an image, with checkpoints in RUN/autoregressive/; more --steps go on.

The bound of Eq. 5, as a sum of KL terms over all coordinates, and the log-likelihood of an
autoregressive model by the chain rule are then computed apart for each of the images. They must be
equal; how far they are apart is printed, and nothing is published where that is more than rounding.

The figure: images on their way from blank to full; samples beside images of the split; the bits
that each coordinate costs given those before it; the loss, which estimates the bound, over
training; and bits/dim beside those of the run's Gaussian diffusion. That one's decoder spreads its
mass over 256 bins, the autoregressive model's over the levels that occur, and it could not code
others. For a fair view the Gaussian's L_0 is also given with its mass on those levels alone. The
CSV has a row for each t.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, figures, keys, likelihood, runs
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source, open_source, to_float
from ddpm_jax.evaluation import reference, requests
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import from_host, network_jit, to_host
from ddpm_jax.parts import Arrays
from ddpm_jax.training.metrics import NonFiniteError
from experiments import common, masking
from experiments.common import over_images, style
from experiments.masked_model import (
    SAMPLES,
    Model,
    Trainer,
    check_levels,
    draw_samples,
    make_order,
    measure,
    occurring_levels,
    protocol_of,
)
from experiments.masking import Masking
from experiments.variance_choices import chosen_process

NAME = "autoregressive"
ORDERS = ("raster", "random")
STRIP_IMAGES, STRIP_TIMES = 4, 9
COUNTED = 10_000  # Training images, at most, whose levels are counted at each coordinate.
BLANK_COLOR = (0.55, 0.72, 0.85)


class Setup(NamedTuple):
    """What a study needs, found before any long work.

    positions: int64 [n]: the images that are measured, of `source`. subset: their places among
    those of the run's own bound.
    """

    model: Model
    training: Source
    source: Source
    positions: np.ndarray
    subset: np.ndarray
    trainer: Trainer


def prepare(study: common.Study) -> Setup:
    """Opens everything.

    Raises:
      RequestError: data or flags that do not fit.
    """
    config, flags = study.run.config, study.flags
    steps, step_by = flags.steps, config.train.steps_per_call
    if steps is None:
        steps = max(config.train.steps // 6 // step_by, 1) * step_by
    if steps < 1 or steps % step_by:
        raise RequestError(
            f"--steps={steps}: must be a positive multiple of train.steps_per_call={step_by}"
        )
    if flags.images < 0:
        raise RequestError(f"--images={flags.images}: must be 0, for all of them, or more")
    training = open_source(config, batch_size=config.train.batch_size)
    source = common.open_split(study)
    positions = requests.positions(source, config.evaluation.max_images, "evaluation.max_images")
    subset = reference.evenly(len(positions), min(flags.images, len(positions)))
    positions = positions[subset]
    levels = occurring_levels(training, config)
    check_levels(source.images(positions), levels, source)
    shape = runs.image_shape(config)
    process = Masking(make_order(flags.order, config.seed, math.prod(shape)), len(levels))
    network = runs.make_model(config).clone(out_channels=len(levels) * shape[-1])
    model = Model(process, levels, network, shape)
    trainer = Trainer(study, model, training, steps, at_least=flags.steps is None)
    return Setup(model, training, source, positions, subset, trainer)


def histogram_bits(model: Model, training: Source, images: np.ndarray) -> np.ndarray:
    """Bits [n, D] of images where each coordinate has the training split's histogram, alone.

    One count is added to each level.
    """
    chosen = reference.evenly(len(training), min(COUNTED, len(training)))
    counted = np.asarray(model.encode(training.images(chosen)))
    counts = np.ones((model.masking.num_steps, len(model.levels)))
    np.add.at(counts, (np.arange(counts.shape[0]), counted), 1)
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return np.take_along_axis(bits[None], np.asarray(model.encode(images))[..., None], 2)[..., 0]


def bits_saved(study: common.Study, setup: Setup, images: np.ndarray) -> np.ndarray:
    """What the Gaussian's L_0 of each image, bits/dim [n], saves with its mass on the levels alone.

    −log2 of the decoder's probability of the levels that occur, at the x_1 of the run's own bound,
    the mean over its draws: p(x_0|x_1) divided by it is a distribution over them.

    Raises:
      NonFiniteError: the network's output is not finite.
    """
    run, e = study.run, study.run.config.evaluation
    process, levels = chosen_process(run), to_float(setup.model.levels)
    batch = padded_batch(min(e.batch_size, len(images)), run.layout)

    def saved(params: Any, images: jax.Array, index: jax.Array) -> jax.Array:
        x0, t = to_float(images), jnp.ones(len(images), jnp.int32)

        def of_draw(draw: jax.Array) -> jax.Array:
            example_keys = keys.example_keys(run.config.seed, "bound", draw, index)
            x_1 = diffusion.q_sample(
                process.schedule, x0, t, keys.normal(example_keys, 1, x0.shape[1:])
            )
            output = run.apply(params, x_1, process.schedule.timesteps[t])
            p, _ = diffusion.p_distribution(process, output, x_1, t, e.clip)

            def add(total: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
                log_p = likelihood.discretized_gaussian_log_likelihood(
                    jnp.full_like(x0, level), p.mean, 0.5 * p.log_variance
                )
                return jnp.logaddexp(total, log_p), None

            log_mass, _ = jax.lax.scan(add, jnp.full(x0.shape, -jnp.inf), levels)
            return -likelihood.bits_per_dim(log_mass)

        return jax.lax.map(of_draw, jnp.arange(e.draws)).mean(axis=0)

    one = run.layout.split(0)
    compiled = network_jit(saved, in_shardings=(run.params_sharding, one, one), out_shardings=one)

    def piece(start: int, length: int) -> Arrays:
        number = np.minimum(np.arange(start, start + batch), start + length - 1)
        placed = from_host(images[number], one), from_host(np.int32(setup.positions[number]), one)
        found = to_host(compiled(run.params, *placed))[:length].astype(np.float64)
        if not np.isfinite(found).all():
            raise NonFiniteError("L_0 is not finite: the network's output is not")
        return {"saved": found}

    protocol = {
        "levels": setup.model.levels.tolist(),
        "images_crc32": runs.fingerprint({"images": jnp.asarray(images)}),
        "positions": setup.positions.tolist(),
        "draws": e.draws,
        "chain": process.schedule.num_steps,
        "clip": e.clip,
    }
    return study.arrays(protocol, len(images), batch, piece)["saved"]


def draw(
    setup: Setup,
    images: np.ndarray,
    samples: np.ndarray,
    coordinate_bits: np.ndarray,
    records: Sequence[dict[str, Any]],
    compared: dict[str, Measured],
) -> bytes:
    """The figure as PNG.

    Args:
      images: uint8, of the split.
      samples: of `draw_samples`.
      coordinate_bits: [T], mean L_{t−1} in bits, t = 1 first.
      records: the lines of metrics.
      compared: bits/dim by name.
    """
    from matplotlib.figure import Figure

    model = setup.model
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    strip, drawn, real = top.subplots(1, 3, width_ratios=(2.3, 1, 1))
    heat, curve, bars = bottom.subplots(1, 3, width_ratios=(1, 1, 1.25))
    times = np.linspace(model.masking.num_steps, 0, STRIP_TIMES).round().astype(int)
    show_strip(strip, model, samples[:STRIP_IMAGES], times)
    for axis, shown, title in (
        (drawn, model.decode(samples), "samples"),
        (real, images[:SAMPLES], f"{setup.source.name}/{setup.source.split}"),
    ):
        canvas = figures.grid(shown).squeeze()
        axis.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=14)
        axis.set_axis_off()
    shown = heat.imshow(
        pixel_bits(model, coordinate_bits), cmap="viridis", vmin=0, interpolation="nearest"
    )
    bottom.colorbar(shown, ax=heat, shrink=0.85).set_label(
        "bits, given those drawn before", fontsize=13
    )
    style(heat, "column", "row", "the cost of each pixel")
    heat.grid(False)
    for ticks in (heat.xaxis, heat.yaxis):
        ticks.get_major_locator().set_params(integer=True)
    lines = [(r["step"], r["loss"]) for r in records if "loss" in r]
    if lines:
        curve.plot(*zip(*lines, strict=True), color="C0", lw=2)
    whole = f"the whole bound, of {setup.source.split}"
    curve.axhline(compared["autoregressive"], color="C1", lw=2, ls="--", label=whole)
    curve.set_ylim(0, 1.15 * max([compared["autoregressive"], *(loss for _, loss in lines)]))
    curve.legend(fontsize=12)
    style(curve, "step", "T · L$_{t−1}$ at one t an image (bits/dim)", "training loss")
    names = list(compared)[::-1]
    values = [float(compared[name]) for name in names]
    errors = [compared[name].standard_error or 0.0 for name in names]
    colors = ["C1" if name == "autoregressive" else "0.6" for name in names]
    bars.barh(range(len(names)), values, xerr=errors, color=colors, height=0.6)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        bars.text(value + error + 0.02 * max(values), place, f"{value:.3g}", va="center", size=12)
    bars.set_yticks(range(len(names)), names)
    bars.set_xlim(0, 1.15 * max(values))
    style(bars, "bits/dim, with its standard error", "", "code lengths")
    return common.to_png(figure)


def pixel_bits(model: Model, coordinate_bits: np.ndarray) -> np.ndarray:
    """The bits [h, w] of each pixel, from those [T] of the coordinates in the order of t."""
    of_coordinate = np.empty(model.masking.num_steps)
    of_coordinate[model.masking.order] = coordinate_bits
    return of_coordinate.reshape(model.shape).sum(axis=-1)


def show_strip(axis: Any, model: Model, samples: np.ndarray, times: np.ndarray) -> None:
    """Samples on their way, a row each: x_t at the times, blank coordinates in a colour."""
    height, width, _ = model.shape
    n = len(samples)
    canvas = np.full((n * (height + 1) + 1, len(times) * (width + 1) + 1, 3), 0.5)
    for k, t in enumerate(times):
        x_t = np.asarray(masking.q_sample(model.masking, jnp.asarray(samples), jnp.full(n, t)))
        blank = (x_t == model.masking.blank).reshape(n, *model.shape)
        seen = np.append(model.levels, 0)[x_t].reshape(n, *model.shape) / 255
        color = np.broadcast_to(np.where(blank, BLANK_COLOR, seen), (n, height, width, 3))
        for row, image in enumerate(color):
            y, x = row * (height + 1) + 1, k * (width + 1) + 1
            canvas[y : y + height, x : x + width] = image
    axis.imshow(canvas, interpolation="nearest")
    axis.set_xticks([(k + 0.5) * (width + 1) for k in range(len(times))], times)
    axis.set_yticks([])
    style(axis, "t", "", "from the blank image x$_T$ to x$_0$")
    axis.grid(False)


def table(model: Model, terms: np.ndarray, alone: np.ndarray) -> list[dict[str, Any]]:
    """A row for each t, from T down as the reverse process has it.

    Args:
      terms: [n, T+1] bits of each image, column k is L_k.
      alone: [n, D], of `histogram_bits`.
    """
    rows = []
    for t in range(model.masking.num_steps, 0, -1):
        coordinate = int(model.masking.order[t - 1])
        row, column, channel = (int(i) for i in np.unravel_index(coordinate, model.shape))
        bits = over_images(terms[:, t - 1])
        rows.append(
            {
                "t": t,
                "row": row,
                "column": column,
                "channel": channel,
                "bits": float(bits),
                "bits_error": bits.standard_error,
                "bits_by_histogram": float(alone[:, coordinate].mean()),
            }
        )
    return rows


def work(study: common.Study) -> None:
    """Makes the figure."""
    setup, config = prepare(study), study.run.config
    model, T = setup.model, setup.model.masking.num_steps  # noqa: N806 (the paper's name)
    images = setup.source.images(setup.positions)
    params, records = setup.trainer()
    found = measure(study, model, params, images)
    samples = draw_samples(study, model, params)
    alone = histogram_bits(model, setup.training, images)
    gaussian = study.bound(setup.source.split).total.mean(axis=1)[setup.subset]
    bound, chain = found["terms"].sum(axis=1), -found["scores"].sum(axis=1)
    compared = {
        f"uniform, {len(model.levels)} levels": Measured(math.log2(len(model.levels))),
        "each coordinate alone": over_images(alone.mean(axis=1)),
        "autoregressive": over_images(bound),
        "Gaussian diffusion, 256 bins": over_images(gaussian),
    }
    if len(model.levels) < 256:
        on_levels = gaussian - bits_saved(study, setup, images)
        compared[f"Gaussian diffusion, {len(model.levels)} levels"] = over_images(on_levels)
    text = {name: value.text() for name, value in compared.items()}
    names = list(compared)
    notes = [
        f"The bound, L_T + Σ L_{{t−1}} with T = {T}, and the chain rule, "
        "−Σ log₂ p(x^i | x^{>i})/T, "
        f"agree on {len(images):,} images of {setup.source.name}/{setup.source.split}: "
        f"{bound.mean():.6f} and {chain.mean():.6f} bits/dim, for one image at most "
        f"{np.abs(bound - chain).max():.1e} apart; L_T is 0.",
        f"Autoregressive: {text['autoregressive']}, after {setup.trainer.steps:,} steps (the run's "
        f"diffusion: {study.run.step:,}); each coordinate by its own histogram: {text[names[1]]}.",
        f"The same images by the run's Gaussian diffusion: {text[names[3]]} (a bound). It spreads "
        f"its mass over 256 bins, the autoregressive model's is on {len(model.levels)} levels and "
        "zero elsewhere.",
    ]
    if len(names) > 4:
        notes.append(
            f"With L_0's mass on those levels alone the Gaussian has {text[names[4]]}, its rate "
            "included, which pays for an x_1 finer than the levels; the autoregressive model's "
            f"bits less these: {over_images(bound - on_levels).text()}."
        )
    protocol = protocol_of(model, params) | {
        "split": setup.source.split,
        "images": len(images),
        "steps": setup.trainer.steps,
        "parameters": study.run.kind,
        "gaussian_terms": config.evaluation.terms or "all",
    }
    study.save(
        "Autoregressive decoding as diffusion",
        draw(setup, images, samples, found["terms"].mean(axis=0)[:-1] * T, records, compared),
        table(model, found["terms"] * T, alone),
        protocol,
        notes,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the experiment's own flags."""
    parser.add_argument(
        "--order", choices=ORDERS, default="raster", help="in which coordinates are drawn"
    )
    parser.add_argument("--steps", type=int, help="of training; a sixth of the run's own")
    parser.add_argument(
        "--images", type=int, default=1000, help="of the split, at most, evenly spread; 0: all"
    )
    common.add_split(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return common.main(NAME, __doc__, work, argv, add_flags)


if __name__ == "__main__":
    sys.exit(main())
