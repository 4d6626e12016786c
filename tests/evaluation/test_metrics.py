"""Inception score and kernel distance by closed forms and loops, all metrics by torch-fidelity."""

import importlib.util
import itertools
import math
import sys
import types

import numpy as np
import pytest

from ddpm_jax.evaluation import frechet, metrics, neighbors


def looped_kd(x, y):
    """The unbiased MMD² by loops over pairs of float64."""
    n, m, d = len(x), len(y), x.shape[1]

    def k(p, q):
        return (math.fsum(float(a) * float(b) for a, b in zip(p, q, strict=True)) / d + 1) ** 3

    own = math.fsum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    other = math.fsum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    across = math.fsum(k(p, q) for p in x for q in y)
    return own / (n * (n - 1)) + other / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 7), (12, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kd_is_the_mean_over_pairs(n, m, dtype):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, 4)) + 0.3).astype(dtype), rng.normal(size=(m, 4)).astype(dtype)
    estimate = metrics.kd(x, y)
    assert estimate.value == pytest.approx(looped_kd(x, y), rel=1e-12, abs=1e-13)
    assert (estimate.standard_error is None) == (n < 4)


def test_kd_of_far_points_keeps_its_digits():
    """Float32 sums would lose the small difference of large kernels."""
    rng = np.random.default_rng(1)
    x, y = np.float32(rng.normal(size=(2, 30, 8)) + 30)
    assert metrics.kd(x, y).value == pytest.approx(looped_kd(x, y), rel=1e-7)


@pytest.mark.parametrize("max_bytes", [1, 3000])
def test_kd_does_not_depend_on_the_size_of_blocks(max_bytes):
    x, y = np.random.default_rng(2).normal(size=(2, 40, 3))
    expected = metrics.kd(x, y[:31])
    found = metrics.kd(x, y[:31], max_bytes)
    assert found.value == pytest.approx(expected.value, rel=1e-12, abs=1e-14)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-10)


def spread(estimates):
    values = np.array([e.value for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    return values.std(ddof=1), math.sqrt(np.mean(errors**2))


@pytest.mark.parametrize(("n", "m", "shift"), [(30, 150, 0.0), (40, 40, 0.0), (60, 60, 0.2)])
def test_kd_s_standard_error_is_the_spread_over_new_samples(n, m, shift):
    """Also of equal distributions, where only the second-order term is left as m grows."""
    rng = np.random.default_rng(3)
    y = rng.uniform(-1, 1, size=(m, 20))
    draws = rng.uniform(-1, 1, size=(250, n, 20)) + shift
    real, claimed = spread([metrics.kd(x, y) for x in draws])
    assert 0.8 < claimed / real < 1.25


def test_kd_s_standard_error_is_hoeffding_s_and_no_less_than_half_the_least():
    """By loops over distinct samples. Of equal distributions the first-order term's estimate is
    often below 0, and so may be the sum: then half the variance that the second leaves counts."""
    floors = 0
    for seed in range(12):
        x, y = np.random.default_rng(seed).normal(size=(2, 6, 2))
        to_y = np.mean([[(p @ q / 2 + 1) ** 3 for q in y] for p in x], axis=1)
        h = np.array([[(p @ q / 2 + 1) ** 3 for q in x] for p in x]) - to_y - to_y[:, None]
        two = np.mean([h[i, j] ** 2 for i, j in itertools.permutations(range(6), 2)])
        one = np.mean([h[i, j] * h[i, k] for i, j, k in itertools.permutations(range(6), 3)])
        none = np.mean([h[i, j] * h[k, m] for i, j, k, m in itertools.permutations(range(6), 4)])
        variance = (4 * 4 * (one - none) + 2 * (two - none)) / (6 * 5)
        floor = (two - none) / (6 * 5)
        floors += variance < floor
        assert metrics.kd(x, y).standard_error ** 2 == pytest.approx(max(variance, floor), rel=1e-9)
    assert 0 < floors < 12


def test_kd_is_unbiased_for_equal_distributions():
    rng = np.random.default_rng(4)
    values = [metrics.kd(*rng.normal(size=(2, 20, 3))).value for _ in range(2000)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(2000)


def test_inception_score_of_certain_and_of_ignorant_classifiers():
    certain = np.tile(1e4 * np.eye(7), (30, 1))
    assert metrics.inception_score(certain, 3).value == pytest.approx(7, rel=1e-14)
    same = np.tile(1e4 * np.eye(7)[:1], (30, 1))
    for logits in (same, np.zeros((30, 7)), np.full((30, 7), -800.0)):
        estimate = metrics.inception_score(logits)
        assert estimate.value == pytest.approx(1, rel=1e-14)
        assert estimate.standard_error == pytest.approx(0, abs=1e-14)
        assert estimate.details["std"] == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("n", "splits"), [(103, 10), (10, 10), (37, 1), (20, 3)])
def test_inception_score_takes_contiguous_splits(n, splits):
    logits = 3 * np.random.default_rng(5).normal(size=(n, 11)) + np.linspace(0, 9, n)[:, None]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for i in range(splits):
        part = p[i * n // splits : (i + 1) * n // splits]
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
    estimate = metrics.inception_score(np.float32(logits), splits)
    assert estimate.value == pytest.approx(np.mean(scores), rel=1e-6)
    assert estimate.details["std"] == pytest.approx(np.std(scores), rel=1e-5, abs=1e-12)
    assert (estimate.standard_error is None) == (n < 2 * splits)


@pytest.mark.parametrize(("n", "splits"), [(600, 1), (1000, 10)])
def test_inception_score_s_standard_error_is_the_spread_over_new_samples(n, splits):
    rng = np.random.default_rng(6)
    scales = np.array([0.5, 1, 2, 4, 8])
    draws = [
        rng.normal(size=(n, 5)) * rng.choice(scales, size=(n, 1)) + [0, 0, 0, 1, 2]
        for _ in range(400)
    ]
    real, claimed = spread([metrics.inception_score(logits, splits) for logits in draws])
    assert 0.8 < claimed / real < 1.25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.kd(np.zeros((1, 2)), np.zeros((5, 2))), "samples: 1 rows"),
        (lambda: metrics.kd(np.zeros((5, 2)), np.zeros((1, 2))), "reference: 1 rows"),
        (lambda: metrics.kd(np.zeros((5, 2)), np.zeros((5, 3))), "reference: 3 features"),
        (lambda: metrics.kd(np.zeros((5, 2)), np.full((5, 2), np.inf)), "5 of 5 rows"),
        (lambda: metrics.kd(np.full((5, 2), np.float32(1e30)), np.zeros((5, 2))), "1e[+]30"),
        (lambda: metrics.inception_score(np.zeros((9, 2))), "at least 10"),
        (lambda: metrics.inception_score(np.zeros((9, 2)), 0), "splits=0"),
        (lambda: metrics.inception_score(np.full((20, 2), np.nan)), "20 of 20 rows"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's modules of metrics, with empty ones in torchvision's place."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    empty = {
        name: types.ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.transforms.functional",
            "torchvision.datasets",
            "torchvision.models",
        )
    }
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(empty["torchvision.datasets"], name, type(name, (), {}))
    for name, module in empty.items():
        if "." in name:
            setattr(empty[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in empty.items():
            patch.setitem(sys.modules, name, module)
        names = ("fid", "isc", "kid", "prc")
        return {n: importlib.import_module(f"torch_fidelity.metric_{n}") for n in names}


def feature_sets(n, m, d):
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(d, d)) / math.sqrt(d)
    return rng.gamma(2, size=(n, d)) @ mixing, (0.9 * rng.gamma(2, size=(m, d)) + 0.1) @ mixing


def test_fd_is_torch_fidelity_s_fid(fidelity):
    import torch

    x, y = feature_sets(300, 400, 40)
    statistics = [fidelity["fid"].fid_features_to_statistics(torch.tensor(f)) for f in (x, y)]
    expected = fidelity["fid"].fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet.fd(x, frechet.statistics_of(y)).value
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-10)


def test_inception_score_is_torch_fidelity_s(fidelity):
    import torch

    logits = 4 * np.random.default_rng(8).normal(size=(557, 1008))
    expected = fidelity["isc"].isc_features_to_metric(torch.tensor(logits), 10, shuffle=False)
    estimate = metrics.inception_score(logits)
    assert estimate.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert estimate.details["std"] == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_kd_is_torch_fidelity_s_kid_on_whole_sets(fidelity):
    import torch

    x, y = feature_sets(250, 250, 40)
    expected = fidelity["kid"].kid_features_to_metric(
        torch.tensor(x), torch.tensor(y), kid_subsets=1, kid_subset_size=250, verbose=False
    )
    found = metrics.kd(x, y).value
    assert found == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)


def test_precision_and_recall_are_torch_fidelity_s(fidelity):
    import torch

    x, y = feature_sets(250, 320, 6)
    expected = fidelity["prc"].prc_features_to_metric(
        torch.tensor(x), torch.tensor(y), prc_neighborhood=3, verbose=False
    )
    found = neighbors.prdc(x, y)
    assert found["precision"].value == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"].value == pytest.approx(expected["recall"], abs=1e-6)
    assert 0.1 < expected["precision"] < 0.99
    assert 0.1 < expected["recall"] < 0.99
