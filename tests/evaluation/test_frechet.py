"""Fréchet distances against closed forms, mpmath, SciPy's square root and real spreads."""

import math

import mpmath
import numpy as np
import pytest
from scipy import linalg, stats

from ddpm_jax.evaluation import frechet
from ddpm_jax.evaluation.frechet import Statistics


def rotation(rng, d):
    return stats.ortho_group.rvs(d, random_state=rng)


def with_spectrum(rng, values):
    basis = rotation(rng, len(values))
    return basis * values @ basis.T


def exact_distance(a, b, digits=60):
    """The distance from the eigenvalues of Σ1 Σ2 with so many digits that roots keep enough."""
    with mpmath.workdps(digits):
        mean = sum((mpmath.mpf(float(p)) - float(q)) ** 2 for p, q in zip(a[0], b[0], strict=True))
        first, second = (mpmath.matrix(s[1].tolist()) for s in (a, b))
        roots = mpmath.eig(first * second, left=False, right=False)
        trace = sum(first[i, i] + second[i, i] for i in range(first.rows))
        return float(mean + trace - 2 * sum(mpmath.sqrt(abs(mpmath.re(r))) for r in roots))


def test_gaussians_with_common_axes_have_a_closed_form():
    rng = np.random.default_rng(0)
    mean, other_mean = rng.normal(size=(2, 20))
    deviation, other_deviation = rng.uniform(0.1, 3, size=(2, 20))
    expected = np.sum((mean - other_mean) ** 2) + np.sum((deviation - other_deviation) ** 2)
    for basis in (np.eye(20), rotation(rng, 20)):
        a = Statistics(mean, basis * deviation**2 @ basis.T, 9)
        b = Statistics(other_mean, basis * other_deviation**2 @ basis.T, 9)
        assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


SPECTRA = {
    "plain": [3, 2, 1, 0.5, 0.2, 0.1],
    "steep": [1e3, 10, 1e-1, 1e-3, 1e-5, 1e-7],
    "singular": [3, 2, 1, 0, 0, 0],
}


@pytest.mark.parametrize("first", SPECTRA)
@pytest.mark.parametrize("second", SPECTRA)
def test_the_distance_has_the_digits_of_mpmath_s(first, second):
    rng = np.random.default_rng(1)
    a = Statistics(rng.normal(size=6), with_spectrum(rng, SPECTRA[first]), 9)
    b = Statistics(rng.normal(size=6), with_spectrum(rng, SPECTRA[second]), 9)
    expected = exact_distance(a, b)
    scale = np.trace(a.covariance) + np.trace(b.covariance)
    # What float64 matrices say of their smallest eigenvalues; the root of a rounded 0 is 1e-8.
    tolerance = max({"plain": 1e-14, "steep": 1e-12, "singular": 1e-8}[s] for s in (first, second))
    assert abs(frechet.frechet_distance(a, b) - expected) < tolerance * scale
    assert frechet.frechet_distance(b, a) == pytest.approx(
        frechet.frechet_distance(a, b), rel=1e-11
    )


def test_singular_covariances_cost_no_digits():
    """Subspaces that meet at an angle: the closed form is of rank one and 2-D, exactly."""
    rng = np.random.default_rng(2)
    d = 40
    basis = rotation(rng, d)
    angle, a_deviations, b_deviation = 0.3, np.array([2.0, 0.7]), 1.5
    direction = math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 5]
    first = basis[:, :2] * a_deviations**2 @ basis[:, :2].T
    second = b_deviation**2 * np.outer(direction, direction)
    zero = np.zeros(d)
    expected = 4 + 0.49 + 2.25 - 2 * 2.0 * 1.5 * math.cos(angle)
    a, b = Statistics(zero, first, 3), Statistics(zero, second, 2)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)
    # A singular one against a regular one: tr √ of BᵀΣB, 2×2.
    full = with_spectrum(rng, np.geomspace(1e-3, 10, d))
    factor = basis[:, :2] * a_deviations
    inner = factor.T @ full @ factor
    roots = np.sqrt(np.linalg.eigvalsh(inner))
    expected = 4.49 + np.trace(full) - 2 * roots.sum()
    got = frechet.frechet_distance(a, Statistics(zero, full, 99))
    assert got == pytest.approx(expected, rel=1e-13)


def test_it_agrees_with_scipy_s_square_root():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(200, 30)), rng.gamma(2, size=(300, 30)) @ rng.normal(size=(30, 30))
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = (
        np.sum((x.mean(0) - y.mean(0)) ** 2)
        + np.trace(np.cov(x.T) + np.cov(y.T))
        - 2 * np.trace(root.real)
    )
    reference = frechet.statistics_of(y)
    assert frechet.frechet_distance(frechet.statistics_of(x), reference) == pytest.approx(
        expected, rel=1e-11
    )
    estimate = frechet.fd(x, reference)
    assert estimate.value == pytest.approx(expected, rel=1e-11)
    terms = estimate.details["mean_term"] + estimate.details["covariance_term"]
    assert terms == pytest.approx(expected, rel=1e-11)
    assert estimate.details["mean_term"] == pytest.approx(np.sum((x.mean(0) - y.mean(0)) ** 2))


@pytest.mark.parametrize("n", [5, 12, 40])
def test_a_shift_costs_its_square_whatever_the_rank(n):
    rng = np.random.default_rng(4)
    x, shift = rng.normal(size=(n, 12)) * np.geomspace(1e-3, 10, 12), rng.normal(size=12)
    reference = frechet.statistics_of(x + shift)
    for value in (
        frechet.fd(x, reference).value,
        frechet.frechet_distance(frechet.statistics_of(x), reference),
    ):
        assert value == pytest.approx(np.sum(shift**2), abs=1e-10)
    same = frechet.fd(x, frechet.statistics_of(x))
    assert 0 <= same.value < 1e-11
    assert same.standard_error < 1e-10
    assert same.details["rank_deficient"] == (n <= 12)
    assert ("bias" in same.details) == (n > 12)


def test_the_distance_is_never_below_zero():
    rng = np.random.default_rng(14)
    for _ in range(50):
        same = frechet.statistics_of(rng.normal(size=(30, 5)))
        assert 0 <= frechet.frechet_distance(same, same) < 1e-13


def test_the_bias_in_one_dimension_has_a_closed_form():
    """(m − μ)² + (s − σ)²: E m² is s²/n and E s about σ (1 − 1/4n)."""
    x = np.random.default_rng(15).normal(size=(200, 1)) * 3
    estimate = frechet.fd(x, Statistics(np.ones(1), np.full((1, 1), 4.0), 9))
    s = x.std(ddof=1)
    assert estimate.details["bias"] == pytest.approx((s**2 + 2 * 2 * s / 4) / 200, rel=1e-12)


@pytest.mark.parametrize(("n", "least"), [(20, 0.7), (50, 0.85)])
def test_the_bias_is_a_lower_bound_where_samples_are_few(n, least):
    """Of equal Gaussians, whose distance is all bias; at n = 5 d nearly all of it is told."""
    rng = np.random.default_rng(16)
    estimates = [frechet.fd(rng.normal(size=(n, 10)), population(10)) for _ in range(200)]
    claimed = np.mean([e.details["bias"] for e in estimates])
    assert least < claimed / np.mean([e.value for e in estimates]) < 1


@pytest.mark.parametrize("function", [frechet.fd, lambda x, y: frechet.fd_infinity(x, y, 3)])
def test_the_reference_may_be_features(function):
    x, y = np.random.default_rng(17).normal(size=(2, 90, 4))
    assert function(x, np.float32(y)) == function(x, frechet.statistics_of(np.float32(y)))


def test_the_reference_is_decomposed_once(monkeypatch):
    x, y = np.random.default_rng(18).normal(size=(2, 90, 4))
    reference, decomposed, eigh = frechet.statistics_of(y), [], np.linalg.eigh
    expected = frechet.fd(x, frechet.statistics_of(y))
    monkeypatch.setattr(
        np.linalg, "eigh", lambda a: (decomposed.append(a is reference.covariance), eigh(a))[1]
    )
    assert frechet.fd(x, reference) == frechet.fd(x, reference) == expected
    frechet.fd_infinity(x, reference, 0)
    frechet.frechet_distance(frechet.statistics_of(x), reference)
    assert sum(decomposed) == 1
    # Other statistics made from these have their own.
    moved = reference._replace(covariance=4 * reference.covariance)
    assert frechet.fd(x, moved).value == pytest.approx(
        frechet.frechet_distance(frechet.statistics_of(x), Statistics(*moved)), rel=1e-12
    )
    assert frechet.fd(x, moved).value > 2 * expected.value


def test_sets_without_spread_are_points():
    point, other = np.ones((7, 3)), np.full((7, 3), 3.0)
    assert frechet.fd(point, frechet.statistics_of(other)).value == pytest.approx(12, rel=1e-14)
    spread = np.random.default_rng(5).normal(size=(50, 3)) * [1, 2, 3]
    reference = frechet.statistics_of(spread)
    expected = np.sum((spread.mean(0) - 1) ** 2) + np.trace(np.cov(spread.T))
    for n in (2, 7):
        assert frechet.fd(point[:n], reference).value == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("cuts", [[1], [3, 4, 500], [999], list(range(1, 1000)), [0, 0, 1000]])
def test_statistics_do_not_depend_on_how_batches_are_cut(cuts):
    rng = np.random.default_rng(6)
    features = rng.normal(size=(1000, 5)) * [1, 2, 3, 1e-3, 10] + [0, 1e4, -1e3, 1, 1e6]
    total = frechet.StatisticsSum()
    for part in np.split(features, cuts):
        total.update(part)
    mean, covariance, count = total.result()
    exact = np.array([math.fsum(column) / 1000 for column in features.T])
    deviation = features - exact
    expected = [[math.fsum(p * q) / 999 for q in deviation.T] for p in deviation.T]
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert count == 1000
    np.testing.assert_allclose(mean, exact, rtol=1e-14)
    # 1e-11: the sixteen digits of 1e6 ± 10 hold its spread to eleven.
    np.testing.assert_array_less(np.abs(covariance - expected) / scale, 1e-11)
    centred = frechet.StatisticsSum()
    for part in np.split(deviation, cuts):
        centred.update(part)
    np.testing.assert_array_less(np.abs(centred.result().covariance - expected) / scale, 1e-12)


def test_float32_features_are_summed_in_float64():
    features = np.float32(np.random.default_rng(7).normal(size=(9000, 3)) + 100)
    mean, covariance, _ = frechet.statistics_of(features)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, np.float64(features).mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(np.float64(features).T), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rank", [4, 2])
def test_the_standard_error_is_that_of_the_distance_s_derivatives(rank):
    """By numerical derivatives of the distance in the weight of each sample."""
    rng = np.random.default_rng(8)
    x = rng.gamma(2, size=(60, rank)) @ rng.normal(size=(rank, 4)) + 1
    reference = frechet.statistics_of(rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)))

    def distance(weights):
        mean = weights @ x
        deviation = x - mean
        covariance = (deviation.T * weights) @ deviation * 60 / 59
        return frechet.frechet_distance(Statistics(mean, covariance, 60), reference)

    uniform, step = np.full(60, 1 / 60), 1e-5
    towards = np.eye(60)
    influence = [
        (distance(uniform + step * (e - uniform)) - distance(uniform - step * (e - uniform)))
        / (2 * step)
        for e in towards
    ]
    expected = np.std(influence, ddof=1) / math.sqrt(60)
    assert frechet.fd(x, reference).standard_error == pytest.approx(expected, rel=0.02)


def spread(function, num_draws, seed, draw):
    """Standard deviation of the values over draws, root mean square of the errors, mean value."""
    rng = np.random.default_rng(seed)
    estimates = [function(draw(rng)) for _ in range(num_draws)]
    values = np.array([e.value for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    return values.std(ddof=1), math.sqrt(np.mean(errors**2)), estimates


def population(d):
    return Statistics(np.zeros(d), np.eye(d), 10**9)


@pytest.mark.parametrize(
    ("n", "d", "shift", "scale"), [(500, 3, 0.3, 1.3), (600, 12, 0.2, 0.8), (500, 6, 1.0, 1.0)]
)
def test_the_standard_error_and_the_bias_are_those_of_new_draws(n, d, shift, scale):
    real, claimed, estimates = spread(
        lambda x: frechet.fd(x, population(d)),
        400,
        9,
        lambda rng: rng.normal(size=(n, d)) * scale + shift,
    )
    assert 0.8 < claimed / real < 1.25
    bias = np.mean([e.value for e in estimates]) - d * (shift**2 + (scale - 1) ** 2)
    noise = real / math.sqrt(400)
    claimed_bias = np.mean([e.details["bias"] for e in estimates])
    assert abs(claimed_bias - bias) < 0.1 * bias + 3 * noise


def test_the_standard_error_holds_for_features_that_are_not_gaussian():
    real, claimed, _ = spread(
        lambda x: frechet.fd(x, population(4)), 400, 10, lambda rng: rng.gamma(1.5, size=(800, 4))
    )
    assert 0.8 < claimed / real < 1.25


def test_fd_infinity_is_the_line_s_intercept_over_its_documented_subsets():
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(400, 6)) * 1.2, rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    reference = frechet.statistics_of(y)
    sizes = [int(40 + 360 * i / 14) for i in range(15)]
    inverse = 1 / np.array(sizes)
    off = inverse - inverse.mean()
    values, weight = [], np.zeros(400)
    for i, size in enumerate(sizes):
        bits = np.random.Philox(key=np.array([5, i], np.uint64)).random_raw(400)
        subset = np.argsort(bits, kind="stable")[:size]
        # The line's intercept is Σ_i (1/15 − mean off_i / Σ off²) value_i.
        weight[subset] += (1 / 15 - inverse.mean() * off[i] / np.sum(off**2)) / size
        part = x[subset]
        root = linalg.sqrtm(np.cov(part.T) @ reference.covariance).real
        values.append(
            np.sum((part.mean(0) - reference.mean) ** 2)
            + np.trace(np.cov(part.T) + reference.covariance - 2 * root)
        )
    line = stats.linregress(inverse, values)
    estimate = frechet.fd_infinity(x, reference, seed=5)
    assert estimate.value == pytest.approx(line.intercept, rel=1e-9)
    assert estimate.details["slope"] == pytest.approx(line.slope, rel=1e-9)
    of_samples = 400 * np.sum(weight**2) * frechet.fd(x, reference).standard_error ** 2
    error = math.sqrt(of_samples + line.intercept_stderr**2)
    assert estimate.standard_error == pytest.approx(error, rel=1e-9)
    assert min(of_samples, line.intercept_stderr**2) > 0.1 * error**2  # So that both count.
    assert estimate.details["largest"] == pytest.approx(frechet.fd(x, reference).value, rel=1e-12)
    assert estimate == frechet.fd_infinity(x, reference, seed=5)
    assert estimate.value != frechet.fd_infinity(x, reference, seed=6).value


def test_fd_infinity_starts_at_five_thousand():
    x = np.random.default_rng(12).normal(size=(60_000, 1))
    reference = population(1)
    estimate = frechet.fd_infinity(x, reference, seed=0, num_sizes=3)
    sizes, values = [5000, 32500, 60000], []
    for i, size in enumerate(sizes):
        bits = np.random.Philox(key=np.array([0, i], np.uint64)).random_raw(60_000)
        part = x[np.argsort(bits, kind="stable")[:size]]
        values.append(part.mean() ** 2 + (part.std(ddof=1) - 1) ** 2)
    assert estimate.value == pytest.approx(np.polyfit(1 / np.array(sizes), values, 1)[1], rel=1e-8)


@pytest.mark.parametrize(("d", "shift", "scale"), [(4, 0.3, 1.3), (10, 0.1, 1.2)])
def test_fd_infinity_has_little_bias_and_the_error_that_it_claims(d, shift, scale):
    real, claimed, estimates = spread(
        lambda x: frechet.fd_infinity(x, population(d), seed=0),
        150,
        13,
        lambda rng: rng.normal(size=(1000, d)) * scale + shift,
    )
    assert 0.8 < claimed / real < 1.25
    true = d * (shift**2 + (scale - 1) ** 2)
    assert abs(np.mean([e.value for e in estimates]) - true) < 3 * real / math.sqrt(150) + 0.01
    assert np.mean([e.details["largest"] for e in estimates]) > true


def test_fd_infinity_wants_samples_enough_for_a_line():
    """Equal Gaussians: at the least n little is left of the distance, and fewer are refused."""
    d, least = 20, frechet.fd_infinity_least(20)
    rng = np.random.default_rng(19)
    draws = [rng.normal(size=(least, d)) for _ in range(30)]
    estimates = [frechet.fd_infinity(x, population(d), seed=0) for x in draws]
    removed = np.mean([e.details["largest"] - e.value for e in estimates])
    assert abs(np.mean([e.value for e in estimates])) < 0.2 * removed
    with pytest.raises(ValueError, match=f"{least - 1} rows.*20 features.*at least {least}"):
        frechet.fd_infinity(draws[0][1:], population(d), seed=0)


def test_the_smallest_subset_is_the_paper_s_and_twice_the_features():
    assert [frechet.fd_infinity_least(d) for d in (1, 2048, 3072)] == [30, 40_960, 61_440]
    assert frechet.fd_infinity_least(1, num_sizes=20) == 40
    cases = [(200, 10), (40_960, 2048), (40_000, 2), (60_000, 2), (61_440, 3072), (90_000, 3072)]
    assert [frechet._smallest(n, d) for n, d in cases] == [20, 4096, 4000, 5000, 6144, 6144]


NAN = np.float32([[0, 1], [np.nan, 1], [2, 3]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frechet.fd(np.zeros((1, 2)), population(2)), "1 rows, but at least 2"),
        (lambda: frechet.fd(np.zeros((3, 2)), population(3)), "3 features, but the others have 2"),
        (lambda: frechet.fd(NAN, population(2)), "1 of 3 rows"),
        (lambda: frechet.fd_infinity(np.zeros((29, 1)), population(1), 0), "at least 30"),
        (lambda: frechet.fd_infinity(np.zeros((1500, 300)), population(300), 0), "least 6000"),
        (lambda: frechet.fd_infinity(np.zeros((99, 1)), population(1), -1), "seed=-1"),
        (lambda: frechet.fd_infinity(np.zeros((99, 1)), population(1), 2**64), "seed="),
        (lambda: frechet.fd(np.zeros((9, 2)), np.zeros((1, 2))), "reference: 1 rows"),
        (lambda: frechet.fd(np.zeros((9, 2)), np.zeros((5, 3))), "3 features, but .* have 2"),
        (lambda: frechet.statistics_of(NAN, "real images"), "^real images: 1 of 3 rows"),
        (lambda: frechet.fd_infinity(np.zeros((29, 2)), population(2), 0, 2), "at least 3 sizes"),
        (lambda: frechet.frechet_distance(population(2), population(3)), "another network"),
        (
            lambda: frechet.frechet_distance(
                population(2), Statistics(np.zeros(2), np.full((2, 2), np.nan), 3)
            ),
            "not finite",
        ),
        (lambda: frechet.statistics_of(NAN[:1]), "at least 2"),
        (lambda: frechet.StatisticsSum().result(), "0 rows"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_batches_of_another_width_are_refused():
    total = frechet.StatisticsSum()
    total.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="4 features a row, but the others have 3"):
        total.update(np.zeros((2, 4)))
