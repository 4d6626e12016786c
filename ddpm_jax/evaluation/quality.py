"""Sample quality by name: one table for evaluators, notebooks and experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.evaluation import names, reference
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import fd, fd_infinity, fd_infinity_least
from ddpm_jax.evaluation.metrics import Estimate, inception_score, kd
from ddpm_jax.evaluation.neighbors import nearest_neighbors, prdc
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import make_layout


class Sets(NamedTuple):
    """What metrics are computed from.

    features: of the samples, float32 [n, d]. logits: [n, classes], or None. real: the reference, or
    None. held_out: features of other real images, or None. seed: of random subsets.
    """

    features: np.ndarray
    logits: np.ndarray | None
    real: reference.Reference | None
    held_out: np.ndarray | None = None
    seed: int = 0


# The values of each metric of `names.KINDS`, and the least number of samples and of real images.
METRICS: dict[str, tuple[int, int, Callable[[Sets], dict[str, Estimate]]]] = {
    "fd": (2, 2, lambda s: {"fd": fd(s.features, s.real.statistics)}),
    "kd": (4, 2, lambda s: {"kd": kd(s.features, s.real.features)}),
    "is": (10, 0, lambda s: {"is": inception_score(s.logits)}),
    "prdc": (6, 6, lambda s: prdc(s.features, s.real.features)),
    "fdinf": (30, 2, lambda s: {"fdinf": fd_infinity(s.features, s.real.statistics, s.seed)}),
    "nearest": (
        2,
        1,
        lambda s: {"nearest": nearest_neighbors(s.features, s.real.features, s.held_out)},
    ),
}
MAX_COVARIANCE = 8192  # Features: a covariance of more takes gigabytes, and its roots hours.


def check(
    metrics: Sequence[str],
    extractor: Extractor,
    count: int,
    image_shape: tuple[int, int, int],
    real: int,
) -> None:
    """Checks that metrics can be computed from so many samples and real images in these features.

    Raises:
      ValueError: one line that names the metric and the reason.
    """
    width = extractor.num_features(image_shape)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"{metric}: no such metric; choose from {', '.join(METRICS)}")
        least, least_real, _ = METRICS[metric]
        if metric == "is" and not extractor.has_logits:
            raise ValueError(f"is_{extractor.name}: these features have no logits to score")
        if metric in ("fd", "fdinf") and width > MAX_COVARIANCE:
            raise ValueError(
                f"{metric}_{extractor.name}: a covariance of {width:,} features is too large; "
                f"choose kd_{extractor.name} or nearest_{extractor.name}"
            )
        if metric == "fdinf":
            least = fd_infinity_least(width)
        for what, there, needed in (("samples", count, least), ("real images", real, least_real)):
            if there < needed:
                raise ValueError(
                    f"{metric}_{extractor.name}: {there} {what}; it needs at least {needed:,}"
                )


def compare_images(
    samples: np.ndarray,
    real: np.ndarray,
    extractor: Extractor,
    metrics: Sequence[str] = ("fd", "kd"),
    batch: int = 128,
) -> dict[str, Estimate]:
    """Metrics of any images against real ones, on all devices: for notebooks.

    Args:
      samples, real: uint8 [n, h, w, c] and [m, h, w, c], as they would be saved to the disk.
      extractor: `features.make_extractor("effnetlite0_64")`, say, or one of your own, from
        `features.from_function`.
      metrics: out of METRICS.
    Returns:
      {name as in a result's, e.g. kd_effnetlite0_64_5k: Estimate}.
    Raises:
      ValueError: too few images for a metric, or images that are not uint8 of one size.
    """
    for name, images in (("samples", samples), ("real", real)):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            shape = list(images.shape)
            raise ValueError(f"{name} must be uint8 [n, h, w, c], not {images.dtype} {shape}")
    if samples.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"samples are {list(samples.shape[1:])}, real images {list(real.shape[1:])}: resize one"
        )
    check(metrics, extractor, len(samples), samples.shape[1:], len(real))
    layout = make_layout("jit")
    batch = padded_batch(batch, layout)
    compute = reference.compile_extractor(extractor, layout, batch)

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        pieces = [compute(images[i : i + batch]) for i in range(0, len(images), batch)]
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    found, others = features(samples), features(real)["features"]
    sets = Sets(found["features"], found.get("logits"), reference.Reference(others, {}))
    return {
        names.quality_name(value, extractor.name, len(samples)): estimate
        for metric in metrics
        for value, estimate in METRICS[metric][2](sets).items()
    }
