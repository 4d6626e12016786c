"""What a sample-quality metric sees: real images, and real images spoiled in known ways.

    pip install -e '.[evaluation]'
    python -m experiments.metric_check --config=configs/cifar10.py --features=effnetlite0_64

with --config.KEY=VALUE as for ddpm_jax.main.

Takes --count held-out images (`evaluation.split`), as they are and with noise, blur, most classes
left out, or most images repeated, and compares each set with as many training images: Fréchet and
kernel distance with their standard errors. A metric worth trusting puts the real images first and
more of one fault behind less of it. Writes --out, a Markdown table, and a picture beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import figures, files, interruption
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source, open_source
from ddpm_jax.evaluation import reference
from ddpm_jax.evaluation.features import make_extractor
from ddpm_jax.evaluation.frechet import fd
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.evaluation.metrics import kd
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import make_layout
from ddpm_jax.parts import collect

TWO_CLASSES = (3, 5)  # Cats and dogs of CIFAR-10.
FEW_CLASSES = "classes 3 and 5 only"
LEAST = 20
SHOWN = 12  # Images of each set in the picture.


def spoiled(images: np.ndarray, few_classes: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """uint8 images [n, h, w, c] by what was done to them.

    Noise is Gaussian with the standard deviation named, on 0–255; blur is Gaussian with that of its
    kernel, in pixels.

    Args:
      few_classes: other images, of which there are as many, from few of the classes.
    """
    rng = np.random.default_rng(0)
    n = len(images)
    sets = {"real": images}
    for deviation in (5, 10, 20):
        noisy = images + rng.normal(0, deviation, images.shape)
        sets[f"noise {deviation}"] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    for deviation in (0.5, 0.75, 1.0):
        sets[f"blur {deviation:g}"] = blur(images, deviation)
    if few_classes is not None:
        sets[FEW_CLASSES] = few_classes
    sets["90 % copies"] = images[np.arange(n) % max(1, n // 10)]
    return sets


def of_two_classes(source: Source, count: int) -> np.ndarray | None:
    """Images of TWO_CLASSES, repeated where there are fewer than `count`; None without labels."""
    labels = source.labels(np.arange(len(source)))
    positions = np.flatnonzero(np.isin(labels, TWO_CLASSES)) if labels is not None else []
    return source.images(positions[np.arange(count) % len(positions)]) if len(positions) else None


def blur(images: np.ndarray, deviation: float) -> np.ndarray:
    """uint8 images convolved with a Gaussian, edges continued, rounded."""
    reach = int(np.ceil(4 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    smooth = images.astype(np.float64)
    for axis in (1, 2):
        width = [(reach, reach) if k == axis else (0, 0) for k in range(4)]
        padded = np.pad(smooth, width, mode="edge")
        size = images.shape[axis]
        smooth = sum(w * padded.take(range(k, k + size), axis=axis) for k, w in enumerate(weights))
    return np.clip(np.rint(smooth), 0, 255).astype(np.uint8)


def _positions(source: Source, count: int) -> np.ndarray:
    if not LEAST <= count <= len(source):
        raise RequestError(
            f"--count={count}: choose {LEAST} to {len(source)}, the images of "
            f"{source.name}/{source.split}"
        )
    return reference.evenly(len(source), count)


def table(
    config: ml_collections.ConfigDict, features: str, count: int, say=print
) -> tuple[str, np.ndarray]:
    """The Markdown table, and the picture of the sets, a row each."""
    e = config.evaluation
    real = open_source(config, e.reference)
    held_out = open_source(config, e.split[0])
    positions = _positions(held_out, count)
    layout = make_layout("jit")
    batch = padded_batch(e.batch_size, layout)
    extractor = make_extractor(features, e.weights, e.cache_dir)
    compute = reference.compile_extractor(extractor, layout, batch)
    train = reference.load_reference(
        extractor,
        compute,
        real,
        len(_positions(real, count)),
        False,
        e.cache_dir,
        "",
        batch,
        say,
    )
    sets = spoiled(held_out.images(positions), of_two_classes(held_out, count))
    lines = [
        f"| {count:,} of {held_out.name}/{held_out.split}, {features} | KD × 1000 | FD |",
        "|---|---|---|",
    ]
    for name, images in sets.items():
        found = collect(
            count,
            batch,
            lambda start, length, images=images: compute(images[start : start + length]),
            "image",
            say,
        )["features"]
        kernel, frechet = kd(found, train.features), fd(found, train.statistics)
        scaled = Measured(1000 * kernel.value, 1000 * kernel.standard_error)
        lines.append(f"| {name} | {scaled.text()} | {Measured(*frechet[:2]).text()} |")
        say(lines[-1])
    rows = np.concatenate([images[:SHOWN] for images in sets.values()])
    return "\n".join(lines) + "\n", figures.grid(rows, columns=SHOWN)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file of configs/, for its data")
    parser.add_argument("--features", default="effnetlite0_64", help="as in evaluation.metrics")
    parser.add_argument("--count", type=int, default=2000, help="images in each set")
    parser.add_argument("--out", default="metric_check.md", help="the table's file")
    args, rest = parser.parse_known_args(argv)
    try:
        config = config_lib.load_file(args.config)
        for key, value in config_lib.parse_overrides(rest):
            config_lib.override(config, key, value)
        config_lib.validate(config)
        text, picture = table(config, args.features, args.count)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except interruption.Interrupted as error:
        print(error, file=sys.stderr)
        return interruption.EXIT_CODE
    out = epath.Path(args.out).expanduser()
    files.replace(out, text)
    figures.save_png(out.with_suffix(".png"), picture)
    print(f"{out}, {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
