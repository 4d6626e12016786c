"""Sample quality by name: one table for evaluators, notebooks and experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.evaluation import names, reference
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import Statistics, fd, fd_infinity, statistics_of
from ddpm_jax.evaluation.metrics import Estimate, inception_score, kd
from ddpm_jax.evaluation.neighbors import nearest_neighbors, prdc
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import make_layout


class Sets(NamedTuple):
    """What metrics are computed from.

    features: of the samples, float32 [n, d]. logits: [n, classes], or None. real: the reference's
    features [m, d], and their `statistics`. held_out: features of other real images, or None.
    """

    features: np.ndarray
    logits: np.ndarray | None
    real: np.ndarray | None
    statistics: Statistics | None
    held_out: np.ndarray | None = None
    seed: int = 0


# The values of each metric of `names.KINDS`, and the least number of samples for it.
METRICS: dict[str, tuple[int, Callable[[Sets], dict[str, Estimate]]]] = {
    "fd": (2, lambda s: {"fd": fd(s.features, s.statistics)}),
    "kd": (4, lambda s: {"kd": kd(s.features, s.real)}),
    "is": (10, lambda s: {"is": inception_score(s.logits)}),
    "prdc": (6, lambda s: prdc(s.features, s.real)),
    "fdinf": (30, lambda s: {"fdinf": fd_infinity(s.features, s.statistics, s.seed)}),
    "nearest": (2, lambda s: {"nearest": nearest_neighbors(s.features, s.real, s.held_out)}),
}


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
      ValueError: too few images for a metric, or images that are not uint8.
    """
    for name, images in (("samples", samples), ("real", real)):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"{name} must be uint8 [n, h, w, c], not {images.dtype}")
    layout = make_layout("jit")
    batch = padded_batch(batch, layout)
    compute = reference.compile_extractor(extractor, layout, batch)

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        pieces = [compute(images[i : i + batch]) for i in range(0, len(images), batch)]
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    found, others = features(samples), features(real)["features"]
    sets = Sets(found["features"], found.get("logits"), others, statistics_of(others))
    return {
        names.quality_name(value, extractor.name, len(samples)): estimate
        for metric in metrics
        for value, estimate in METRICS[metric][1](sets).items()
    }
