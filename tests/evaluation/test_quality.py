"""Metrics of any images, in features of one's own."""

import numpy as np
import pytest

from ddpm_jax.evaluation import quality
from ddpm_jax.evaluation.features import from_function, make_extractor

RNG = np.random.default_rng(8)
REAL = RNG.integers(0, 256, (40, 3, 2, 1), dtype=np.uint8)
SAMPLES = (RNG.integers(0, 256, (37, 3, 2, 1)) // 2).astype(np.uint8)


def test_images_are_compared_in_features_of_ones_own():
    own = from_function("halves", lambda x: x.reshape(len(x), -1)[:, :2] / 2.0)
    found = quality.compare_images(SAMPLES, REAL, own, ("fd", "nearest"), batch=8)
    assert list(found) == ["fd_halves_37", "nearest_halves_37"]
    x, y = (a.reshape(len(a), -1)[:, :2] / 2.0 for a in (SAMPLES, REAL))
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert found["fd_halves_37"].value == pytest.approx(expected, rel=1e-6)
    distances = np.sqrt(((x[:, None] - y) ** 2).mean(axis=-1)).min(axis=1)
    assert found["nearest_halves_37"].value == pytest.approx(np.median(distances), rel=1e-6)


def test_each_metric_has_its_values_and_least_number():
    from ddpm_jax.evaluation.names import KINDS

    pixels = make_extractor("pixels")
    assert quality.METRICS.keys() == KINDS.keys()
    for metric, (least, _) in quality.METRICS.items():
        if metric == "is":
            continue
        found = quality.compare_images(SAMPLES[:least], REAL, pixels, (metric,))
        assert [name.split("_")[0] for name in found] == list(KINDS[metric].values)
        if metric in ("fdinf", "prdc"):
            with pytest.raises(ValueError):
                quality.compare_images(SAMPLES[: least - 1], REAL, pixels, (metric,))


def test_floats_are_refused():
    with pytest.raises(ValueError, match="samples must be uint8"):
        quality.compare_images(SAMPLES / 255, REAL, make_extractor("pixels"))
