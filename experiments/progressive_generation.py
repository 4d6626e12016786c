"""Figs. 6 and 7: x̂_0 over the reverse process, how good it is by then, and what x_t already holds.

    python -m experiments.progressive_generation --run=runs/digits
    python -m experiments.progressive_generation --run=runs/cifar10 --metric=fid --count=50000 \\
        --config.evaluation.weights=PATH --config.sample.batch_size=512

Samples are those of --mode=sample under the run's config.sample: image k is the same image. Writes
figures/progressive_generation.png with

- x̂_0 of the first samples from T down to 0 (Fig. 6);
- a metric of sample quality of x̂_0 over time, beside that of as many real images held out
  (`evaluation.split`) where there are any, both against `evaluation.reference`; Fréchet
  distances of few images are mostly bias: they are to be read against that line, not against 0;
- for some t, an x_t from the middle of a chain and several reverse processes that go on from it
  with noise of their own (Fig. 7). The share of the variance that is fixed at t is
  1 − (variance among images from one x_t) / (variance among all samples), each averaged over the
  pixels: 0 where all is open, 100 % where x_t determines the image;

the numbers in .csv, and in evaluation/ the frames of 16 samples, from T to 0, for the report's
slider. --times are those of the trained chain; a shorter one (config.sample.steps) has some.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import Any

import jax
import numpy as np

from ddpm_jax import sampling
from ddpm_jax.config import RequestError
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import cost, names, requests
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.figures import grid
from ddpm_jax.generation import compile_sampler, padded_batch
from ddpm_jax.parallel import to_host
from ddpm_jax.parts import Arrays
from ddpm_jax.runs import image_shape
from ddpm_jax.schedules import spaced
from ddpm_jax.training.metrics import NonFiniteError
from experiments import common
from experiments.common import Study
from experiments.continuations import Shared, share
from experiments.quality_curve import Quality

FRAMES = 39  # Times at which x̂_0 is kept, the final sample aside; of these
POINTS = 20  # so many are measured.
FRAME_SAMPLES = 16  # In the frames.
ROWS, COLUMNS = 8, 11  # Of Fig. 6.
SHOWN_CHAINS, SHOWN_CONTINUATIONS = 4, 4  # Of Fig. 7.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    parser.add_argument(
        "--metric",
        help="as in evaluation.metrics; fd_pixels unless given, kd_pixels for large images",
    )
    parser.add_argument("--count", type=int, default=128, help="samples that are measured")
    parser.add_argument("--times", default="", help="of Fig. 7; T, 3T/4, T/2, T/4 unless given")
    parser.add_argument("--chains", type=int, default=8, help="whose x_t are gone on from")
    parser.add_argument("--continuations", type=int, default=4, help="from each x_t")


def work(study: Study) -> None:
    """Draws, measures and saves the figure."""
    flags, run, how = study.flags, study.run, study.run.config.sample
    process = sampling.shorten(run.process, how.steps) if how.steps else run.process
    for name, least in (("count", 2), ("chains", 2), ("continuations", 2)):
        if getattr(flags, name) < least:
            raise RequestError(f"--{name}={getattr(flags, name)}: choose at least {least}")
    forks = common.chain_indices(process.schedule, flags.times, "--times")
    deterministic = how.method == "ddim" and how.eta == 0
    if deterministic and flags.times:
        raise RequestError(
            "--times: DDIM with η = 0 goes on from an x_t in one way only; "
            "set --config.sample.eta=1 or --config.sample.method=ancestral"
        )
    path, quality = Path.of(process), Quality.of(study)
    drawn = draw(study, path)
    sets = [*drawn["path"].swapaxes(0, 1), drawn["images"]]
    curve = quality.curve(study, sets, path.protocol(study))
    sampler, shared = sampler_protocol(study), None
    if not deterministic:
        shared = share(study, process, sampler, forks, drawn["images"])
    frames = keep_frames(study, path, drawn)
    times = [path.times[k] for k in path.points]
    rows, notes = quality.rows(curve, times), quality.notes(study, curve)
    protocol = path.protocol(study) | quality.protocol(study)
    if shared:
        rows += shared.rows()
        protocol |= {"chains": flags.chains, "continuations": flags.continuations}
        notes.append("x_t is shown cut to [−1, 1], and the images beside it go on from it.")
    else:
        notes.append("DDIM with η = 0 goes on from an x_t in one way only: there is no Fig. 7.")
    picture = draw_figure(path, drawn, quality, curve, shared)
    study.save("Progressive generation", picture, rows, protocol, notes, frames)


def sampler_protocol(study: Study) -> dict[str, Any]:
    """How images are drawn."""
    how, num_steps = study.run.config.sample, study.run.config.diffusion.num_steps
    return {
        "sampler": how.method,
        "chain": requests.chain(how.steps, num_steps),
        "eta": how.eta,
        "clip": how.clip,
        "rounding": "nearest of 256 levels",
    }


@dataclasses.dataclass(frozen=True)
class Path:
    """Where x̂_0 is kept on the way down a chain.

    indices: of the chain, from its first step down to 1. times: what the network is told there.
    points: places in `indices` of those that are measured.
    """

    indices: list[int]
    times: list[int]
    points: np.ndarray

    @classmethod
    def of(cls, process: Process) -> Path:
        """Evenly over the chain, both ends included."""
        steps = process.schedule.num_steps
        indices = spaced(steps, min(FRAMES, steps))[::-1]
        times = np.asarray(process.schedule.timesteps)[indices]
        points = spaced(len(indices), min(POINTS, len(indices))) - 1
        return cls(indices.tolist(), times.tolist(), points)

    def protocol(self, study: Study) -> dict[str, Any]:
        """All that the samples and their path depend on, beside the run."""
        return sampler_protocol(study) | {"samples": study.flags.count, "times": self.times}


def draw(study: Study, path: Path) -> Arrays:
    """The samples with their path of x̂_0, uint8.

    Returns:
      images [count, h, w, c]; path [count, len(points), h, w, c]; frames [min(count,
      FRAME_SAMPLES), len(indices), h, w, c].
    """
    run, config = study.run, study.run.config
    count, protocol = study.flags.count, path.protocol(study)
    batch = padded_batch(min(config.sample.batch_size, count), run.layout)
    if not study.arrays_path(protocol).exists():
        steps = config.sample.steps or config.diffusion.num_steps
        shape = (batch, *image_shape(config))
        evaluations = steps * -(-count // batch)
        what = f"{count:,} samples"
        cost.announce(what, run.layout, run.apply, run.params, shape, evaluations, study.say)
    parts = run.layout, run.process, run.model, config, run.params_sharding
    sampler = compile_sampler(*parts, path.indices)

    def piece(start: int, length: int) -> Arrays:
        numbers = np.arange(start, start + batch)
        drawn = jax.tree.map(to_host, sampler(run.params, numbers))
        if not drawn.finite[:length].all():
            raise NonFiniteError("samples are not finite: try another checkpoint")
        x0_hat = drawn.x0_path[:, :length].swapaxes(0, 1)
        kept = max(0, min(length, FRAME_SAMPLES - start))
        return {
            "images": drawn.images[:length],
            "path": x0_hat[:, path.points],
            "frames": x0_hat[:kept],
        }

    return study.arrays(protocol, count, batch, piece, "sample")


def keep_frames(study: Study, path: Path, drawn: Arrays) -> Any:
    """Writes frames uint8 [times, samples, h, w, c] and times int64 [times]; returns their file."""
    protocol = path.protocol(study) | {"part": "frames"}
    final = drawn["images"][None, : len(drawn["frames"])]
    found = {
        "frames": np.concatenate([drawn["frames"].swapaxes(0, 1), final]),
        "times": np.array([*path.times, 0]),
    }
    count = len(found["times"])
    study.arrays(protocol, count, count, lambda *_: found, "time")
    return study.arrays_path(protocol)


def draw_figure(
    path: Path, drawn: Arrays, quality: Quality, curve: Arrays, shared: Shared | None
) -> bytes:
    """The PNG: Fig. 6 and the curve above, Fig. 7 below."""
    from matplotlib.figure import Figure

    panels = len(shared.times) if shared else 0
    lower = math.ceil(panels / 4)
    figure = Figure(figsize=(14, 5 + 3.3 * lower), layout="constrained")
    parts = figure.subfigures(1 + lower, 1, height_ratios=[5] + [3.3] * lower, squeeze=False)[:, 0]
    left, right = parts[0].subplots(1, 2, width_ratios=(1.45, 1))
    chosen = spaced(len(path.times), min(COLUMNS - 1, len(path.times))) - 1
    images = np.concatenate([drawn["frames"][:, chosen], drawn["images"][:FRAME_SAMPLES, None]], 1)
    labels = [str(path.times[k]) for k in chosen] + ["sample"]
    show(left, images[:ROWS], labels)
    left.set(xlabel="t", title="x̂_0 over the reverse process, a sample in each row")
    draw_curve(right, path, quality, curve)
    for k in range(panels):
        if k % 4 == 0:
            axes = parts[1 + k // 4].subplots(1, 4)
            for axis in axes:
                axis.set_axis_off()
        fork(axes[k % 4], shared, k)
    return common.to_png(figure)


def draw_curve(axis: Any, path: Path, quality: Quality, curve: Arrays) -> None:
    """The metric over time, with one standard error, and that of the images held out."""
    last = len(path.points)
    x = path.times[0] - np.array([*(path.times[k] for k in path.points), 0])
    for j, name in enumerate(quality.values):
        value, error = curve["value"][:, j], np.nan_to_num(curve["error"][:, j])
        (line,) = axis.plot(x, value[: last + 1], marker="o", ms=4, label=f"{name} of x̂_0")
        below, above = value - error, value + error
        axis.fill_between(x, below[: last + 1], above[: last + 1], alpha=0.25, lw=0)
        if len(quality.held_out):
            label = f"{name} of {len(quality.held_out):,} real images ({quality.source.split})"
            axis.axhline(value[-1], color=line.get_color(), ls="--", lw=1.2, label=label)
            axis.axhspan(below[-1], above[-1], color=line.get_color(), alpha=0.12, lw=0)
    values = curve["value"]
    if (values > 0).all() and values.max() > 10 * values.min():
        axis.set_yscale("log")
    kind = names.KINDS[quality.metric]
    count = f"{len(quality.real.features):,} images" if quality.real else ""
    against = f" against {count} of {quality.real.protocol['split']}" if quality.real else ""
    axis.set(
        xlabel="T − t, times of the trained chain gone",
        ylabel=f"{kind.better} is better" if kind.better else kind.unit,
    )
    axis.set_title(f"quality of x̂_0{against}")
    axis.grid(alpha=0.3)
    axis.legend()


def fork(axis: Any, shared: Shared, k: int) -> None:
    """A panel of Fig. 7: x_t, x̂_0 and what goes on from it, a chain in each row."""
    x_t, x0_hat, images = (
        shared.arrays[name][:SHOWN_CHAINS, k] for name in ("x_t", "x0_hat", "images")
    )
    images = images[:, :SHOWN_CONTINUATIONS]
    labels = ["x_t", "x̂_0"] + [""] * images.shape[1]
    labels[2 + images.shape[1] // 2] = "samples from this x_t"
    show(axis, np.concatenate([x_t[:, None], x0_hat[:, None], images], axis=1), labels)
    value, error = shared.fixed[k]
    fixed = Measured(100 * value, 100 * error).text()
    axis.set_axis_on()
    axis.set_title(f"t = {shared.times[k]}: {fixed} % of the variance fixed", fontsize="medium")


def show(axis: Any, images: np.ndarray, labels: list[str]) -> None:
    """Rows of images uint8 [rows, columns, h, w, c] with a label below each column."""
    columns, height, width, channels = images.shape[1:]
    picture = grid(images.reshape(-1, height, width, channels), columns)
    picture = picture[..., 0] if channels == 1 else picture
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    cell = picture.shape[1] / columns
    axis.set_xticks([cell * (k + 0.5) for k in range(columns)], labels)
    axis.set_yticks([])
    axis.tick_params(length=0)


def main(argv: list[str] | None = None) -> int:
    """Makes the figure; returns the exit code."""
    return common.main("progressive_generation", __doc__, work, argv, add_flags)


if __name__ == "__main__":
    sys.exit(main())
