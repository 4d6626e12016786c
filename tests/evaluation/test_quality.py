"""Metrics of any images, in features of one's own."""

import numpy as np
import pytest

from ddpm_jax.evaluation import quality
from ddpm_jax.evaluation.features import from_function, make_extractor
from ddpm_jax.evaluation.names import KINDS

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


def test_each_metric_has_its_values_and_least_numbers():
    one = from_function("mean", lambda x: x.reshape(len(x), -1).mean(axis=1, keepdims=True))
    many = RNG.integers(0, 256, (60, 3, 2, 1), dtype=np.uint8)
    assert quality.METRICS.keys() == KINDS.keys()
    for metric, (least, least_real, _) in quality.METRICS.items():
        if metric == "is":
            continue
        found = quality.compare_images(many[:least], REAL[:least_real], one, (metric,))
        assert [name.split("_")[0] for name in found] == list(KINDS[metric].values)
        for samples, real in ((many[: least - 1], REAL), (many, REAL[: least_real - 1])):
            if len(samples) and len(real):
                with pytest.raises(ValueError, match=f"{metric}_mean: .* it needs at least"):
                    quality.compare_images(samples, real, one, (metric,))


def test_what_cannot_be_compared_is_said_in_one_line():
    pixels = make_extractor("pixels")
    wide = np.zeros((3, 64, 64, 3), np.uint8)
    for samples, real, metric, words in [
        (SAMPLES, REAL, "fid", "fid: no such metric; choose from fd, kd"),
        (SAMPLES, REAL, "is", "no logits"),
        (SAMPLES, REAL[:, :2], "fd", "resize one"),
        (SAMPLES[:0], REAL, "fd", "samples must be uint8"),
        (wide, wide, "fd", "covariance of 12,288 features is too large"),
    ]:
        with pytest.raises(ValueError, match=words):
            quality.compare_images(samples, real, pixels, (metric,))
    assert quality.compare_images(wide, wide, pixels, ("nearest",))["nearest_pixels_3"].value == 0


def test_floats_are_refused():
    with pytest.raises(ValueError, match="samples must be uint8"):
        quality.compare_images(SAMPLES / 255, REAL, make_extractor("pixels"))
