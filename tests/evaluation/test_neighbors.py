"""Neighbourhood metrics against whole matrices of distances, prdc, and real spreads."""

import contextlib
import io
import math

import numpy as np
import pytest

from ddpm_jax.evaluation import neighbors

NAMES = ("precision", "recall", "density", "coverage")


def distances(x, y):
    return np.sqrt(np.square(np.float64(x)[:, None] - np.float64(y)).sum(-1))


def radii(x, k):
    between = distances(x, x)
    np.fill_diagonal(between, np.inf)
    return np.sort(between, axis=1)[:, k - 1]


def direct(x, y, k_precision=3, k_coverage=5):
    """The definitions of both papers over the whole matrix, samples first."""
    between = distances(x, y)
    return {
        "precision": (between <= radii(y, k_precision)).any(axis=1).mean(),
        "recall": (between <= radii(x, k_precision)[:, None]).any(axis=0).mean(),
        "density": (between < radii(y, k_coverage)).sum() / (k_coverage * len(x)),
        "coverage": (between < radii(y, k_coverage)).any(axis=0).mean(),
    }


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def feature_sets(n, m, d, scale=0.8):
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=(n, d)) * scale + 0.3), np.float32(rng.normal(size=(m, d)))


@pytest.mark.parametrize(("n", "m", "d"), [(6, 6, 2), (150, 90, 3), (80, 140, 20)])
@pytest.mark.parametrize(("k_precision", "k_coverage"), [(3, 5), (5, 1)])
def test_prdc_follows_the_definitions(n, m, d, k_precision, k_coverage):
    x, y = feature_sets(n, m, d)
    found = neighbors.prdc(x, y, k_precision, k_coverage)
    assert tuple(found) == NAMES
    assert values(found) == pytest.approx(direct(x, y, k_precision, k_coverage), rel=1e-12)


def test_prdc_decides_ties_as_the_papers_do():
    """On a grid of whole numbers: a precise sample may lie on the ball, a covering one may not."""
    y = np.float32([[0], [1], [2], [3], [4], [5], [6], [7]])
    x = np.float32([[-1], [8], [-1.5], [9], [9.5], [3.5]])
    found = values(neighbors.prdc(x + 1e6, y + 1e6, k_precision=1, k_coverage=1))
    assert found["precision"] == 3 / 6  # −1 and 8 are on balls of radius 1, 3.5 is in two.
    assert found["density"] == 2 / 6
    assert found["coverage"] == 2 / 8
    # Balls of samples: −1 and −1.5 reach ½, 8 and 9.5 reach 1 and ½, 9 ½; 3.5 reaches 4.5.
    assert found["recall"] == 1
    # The same shape with rounding: thirds of a grid in three dimensions, exactly decided.
    rng = np.random.default_rng(1)
    y, x = rng.integers(0, 5, size=(60, 3)), rng.integers(0, 5, size=(50, 3))
    assert values(neighbors.prdc(x, y)) == pytest.approx(direct(x, y), rel=1e-12)
    far = values(neighbors.prdc(x + 2**20, y + 2**20))
    assert far == pytest.approx(direct(x, y), rel=1e-12)


def test_prdc_of_a_set_with_itself_and_of_one_far_away():
    x, y = feature_sets(60, 50, 4)
    same = values(neighbors.prdc(x, x))
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(
        1
    )  # Strictly inside are the point itself and 4 neighbours of 5.
    assert set(values(neighbors.prdc(x + 100, y)).values()) == {0}


def test_prdc_of_copies_has_balls_of_no_size():
    x = np.zeros((20, 4))
    found = values(neighbors.prdc(x, x))
    assert found == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


@pytest.mark.parametrize("max_bytes", [1, 20_000])
def test_prdc_does_not_depend_on_the_size_of_blocks(max_bytes):
    x, y = feature_sets(90, 70, 5)
    assert neighbors.prdc(x, y, max_bytes=max_bytes) == neighbors.prdc(x, y)


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_is_the_package_prdc_s(k):
    pytest.importorskip("sklearn")
    prdc = pytest.importorskip("prdc")
    x, y = feature_sets(220, 180, 6)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = prdc.compute_prdc(np.float64(y), np.float64(x), nearest_k=k)
    found = values(neighbors.prdc(x, y, k_precision=k, k_coverage=k))
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(0.1 < value < 1.9 and value != 1 for value in found.values())


@pytest.mark.parametrize(
    ("n", "m", "d", "scale"), [(200, 200, 4, 1.0), (150, 300, 6, 0.6), (300, 150, 2, 0.5)]
)
def test_the_standard_errors_are_the_spreads_over_new_samples(n, m, d, scale):
    rng = np.random.default_rng(2)
    y = rng.normal(size=(m, d))
    estimates = [neighbors.prdc(rng.normal(size=(n, d)) * scale, y) for _ in range(120)]
    for name in NAMES:
        real = np.std([e[name].value for e in estimates], ddof=1)
        errors = [e[name].standard_error or 0 for e in estimates]
        assert 0.8 < math.sqrt(np.mean(np.square(errors))) / real < 1.25, name


def test_recall_s_standard_error_comes_from_halves_of_the_samples():
    x, y = feature_sets(103, 240, 3)
    of_halves, of_points = [], []
    for i in range(10):
        bits = np.random.Philox(key=np.array([103, i], np.uint64)).random_raw(103)
        order = np.argsort(bits, kind="stable")
        reached = [
            (distances(half, y) <= radii(half, 3)[:, None]).any(axis=0)
            for half in (x[order[:51]], x[order[51:]])
        ]
        of_halves.append(np.var([r.mean() for r in reached], ddof=1))
        of_points.append(np.var(reached, axis=0, ddof=1).mean() / 240)
    variance = np.mean(of_points) + (np.mean(of_halves) - np.mean(of_points)) / 2
    assert np.mean(of_halves) > np.mean(of_points)
    found = neighbors.prdc(x, y)["recall"].standard_error
    assert found == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_coverage_s_standard_error_is_that_of_the_occupancy_problem():
    """Samples fall between far pairs of reference points: both balls of a pair are hit or none."""
    cells, n = 100, 60
    y = np.array([[1e3 * i + side] for i in range(cells) for side in (0, 1)])
    rng = np.random.default_rng(6)
    squares = []
    for _ in range(300):
        x = 1e3 * rng.integers(0, cells, size=(n, 1)) + 0.5
        squares.append(neighbors.prdc(x, y, k_coverage=1)["coverage"].standard_error ** 2)
    one, two = (1 - 1 / cells) ** n, (1 - 2 / cells) ** n
    variance = (cells * (cells - 1) * two + cells * one - (cells * one) ** 2) / cells**2
    assert np.mean(squares) == pytest.approx(variance, rel=0.1)


def test_errors_that_the_samples_do_not_tell_are_none():
    x, y = feature_sets(7, 50, 2)
    few = neighbors.prdc(x, y)
    assert few["recall"].standard_error is None  # A half has three: none has three others.
    assert few["precision"].standard_error is not None
    assert neighbors.prdc(x + 100, y)["coverage"].standard_error is None


def test_nearest_neighbors_by_hand():
    reference = np.float32([[0, 0], [10, 0]])
    samples = np.float32([[0, 0], [3, 4], [10, 1], [10, 0], [16, 8]])
    found = neighbors.neighbors_of(samples, reference, k=2)
    np.testing.assert_array_equal(found.positions, [[0, 1], [0, 1], [1, 0], [1, 0], [1, 0]])
    nearest = np.array([0, 5, 1, 0, 10]) / math.sqrt(2)
    np.testing.assert_allclose(found.distances[:, 0], nearest, rtol=1e-15)
    estimate = neighbors.nearest_neighbors(samples, reference)
    assert estimate.value == pytest.approx(1 / math.sqrt(2))
    names = ("0", "0.01", "0.1", "0.5", "0.9")
    expected = {f"quantile_{q}": np.quantile(nearest, float(q)) for q in names}
    assert estimate.details == pytest.approx(expected | {"copies": 2})


def test_memorization_is_seen():
    rng = np.random.default_rng(3)
    train, held_out = rng.normal(size=(2, 300, 5))
    honest = rng.normal(size=(270, 5))
    copied = np.concatenate([honest, train[:15], train[15:30] + 1e-3])
    estimate = neighbors.nearest_neighbors(copied, train, held_out)
    details = estimate.details
    assert details["copies"] == 15
    assert details["held_out_copies"] == 0
    closest = distances(held_out, train).min(axis=1) / math.sqrt(5)
    assert details["held_out_quantile_0.1"] == pytest.approx(np.quantile(closest, 0.1))
    assert 0.1 <= details["memorization"] < 0.13
    share = details["memorization"]
    error = math.sqrt(share * (1 - share) / 299)
    assert details["memorization_standard_error"] == pytest.approx(error)


@pytest.mark.parametrize("held", [99, 150])
def test_a_perfect_model_s_memorization_is_a_hundredth(held):
    rng = np.random.default_rng(4)
    shares = []
    for _ in range(600):
        train, held_out, samples = np.split(rng.normal(size=(40 + held + 200, 2)), [40, 40 + held])
        details = neighbors.nearest_neighbors(samples, train, held_out).details
        shares.append(details["memorization"])
    assert abs(np.mean(shares) - 0.01) < 3 * np.std(shares) / math.sqrt(600)


def test_memorization_of_few_held_out_points_is_not_told():
    """The least of h distances is an honest sample's in one of h + 1 cases: more than 1 %."""
    train, held_out, samples = np.random.default_rng(7).normal(size=(3, 100, 2))
    details = [
        neighbors.nearest_neighbors(samples, train, held_out[:h]).details for h in (1, 98, 99)
    ]
    assert ["memorization" in d for d in details] == [False, False, True]
    assert ["memorization_standard_error" in d for d in details] == [False, False, True]
    assert all("held_out_quantile_0.01" in d and "held_out_copies" in d for d in details)
    one = neighbors.nearest_neighbors(samples[:1], train, held_out).details
    assert "memorization" in one and "memorization_standard_error" not in one


def test_the_median_distance_s_error_is_its_spread_over_new_samples():
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(100, 3))
    estimates = [
        neighbors.nearest_neighbors(rng.normal(size=(150, 3)), reference) for _ in range(400)
    ]
    real = np.std([e.value for e in estimates], ddof=1)
    claimed = math.sqrt(np.mean([e.standard_error**2 for e in estimates]))
    assert 0.8 < claimed / real < 1.25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: neighbors.prdc(np.zeros((5, 2)), np.zeros((9, 2))), "samples: 5 rows.* least 6"),
        (lambda: neighbors.prdc(np.zeros((9, 2)), np.zeros((5, 2))), "reference: 5 rows"),
        (lambda: neighbors.prdc(np.zeros((9, 2)), np.zeros((9, 3))), "3 features a row"),
        (lambda: neighbors.prdc(np.full((9, 2), np.nan), np.zeros((9, 2))), "9 of 9 rows"),
        (lambda: neighbors.prdc(np.zeros((9, 2)), np.zeros((9, 2)), 0), "k_precision=0"),
        (lambda: neighbors.prdc(np.zeros((9, 2)), np.zeros((9, 2)), 3, 0), "k_coverage=0"),
        (lambda: neighbors.neighbors_of(np.zeros((9, 2)), np.zeros((9, 2)), 0), "k=0"),
        (lambda: neighbors.nearest_neighbors(np.zeros((0, 2)), np.zeros((9, 2))), "0 rows"),
        (lambda: neighbors.nearest_neighbors(np.zeros((2, 2)), np.zeros((9, 3))), "3 features"),
        (
            lambda: neighbors.nearest_neighbors(
                np.zeros((2, 2)), np.zeros((9, 2)), np.zeros((3, 4))
            ),
            "held-out: 4 features",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
