"""Exact bounds, likelihoods and samplers' marginals: against integrals, identities and the library.

The library's own estimates (`likelihood.vlb_terms`, `sampling.sample`) are held to them in turn.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import PREDICTIONS, VARIANCES
from scipy import integrate, stats

from ddpm_jax import keys, likelihood, oracles, sampling, schedules
from ddpm_jax.diffusion import Process

LEVELS = np.arange(256) / 127.5 - 1
BETAS = np.linspace(0.02, 0.4, 6)
SCHEDULE, EXACT = schedules.from_betas(BETAS), reference.derive(BETAS)

ROOT = np.random.default_rng(5).standard_normal((4, 4)) / 3
FULL = oracles.Gaussian(np.array([0.6, -0.2, 0.1, -0.5]).reshape(2, 1, 2), ROOT @ ROOT.T)
LINE = oracles.Gaussian([0.6], 0.25)
POINTS = oracles.Points(LEVELS[[[100, 200], [140, 220], [120, 180]]], [1, 2, 3])
LINE_POINTS = oracles.Points(LEVELS[[0, 90, 110, 255]][:, None], [1, 2, 3, 1])


def bound_keys(count, seed=0):
    return keys.example_keys(seed, "bound", 0, jnp.arange(count))


# Each prediction and each variance meets clipping and its absence, whole and shorter chains.
CASES = [
    *((FULL, p, v, False, 0) for p, v in zip(PREDICTIONS, VARIANCES, strict=True)),
    *((FULL, p, v, True, 4) for p, v in zip(PREDICTIONS, VARIANCES[::-1], strict=True)),
    (POINTS, "eps", "learned", True, 4),
    (POINTS, "mu", "fixed_small", False, 0),
]


@pytest.mark.parametrize("data, prediction, variance, clip, steps", CASES)
def test_the_library_s_estimate_of_the_bound_is_the_exact_one(
    data, prediction, variance, clip, steps
):
    """4,000 draws: within 4 standard errors of each term, and 2e-5 for float32."""
    process = Process(SCHEDULE, prediction, variance)
    network = oracles.denoiser(data, process)
    short = sampling.shorten(process, steps) if steps else process

    @jax.jit
    def estimate(key):
        return likelihood.vlb_terms(short, network, data.sample(key), key, clip=clip).terms

    terms = np.float64(estimate(bound_keys(4000)))
    expected = oracles.bound(data, process, clip, steps)
    error = terms.std(axis=0) / np.sqrt(len(terms))
    assert expected.dtype == np.float64
    assert (np.abs(terms.mean(axis=0) - expected) < 4 * error + 2e-5).all()
    assert (error < 0.04 * expected + 1e-3).all()


def simple_decoder(x0, mean, scale):
    """−log of Eq. 13's integral as a difference of CDFs, mirrored so that both are small."""
    side = np.where(x0 > mean, -1, 1)
    outer = (side * (x0 - mean) + 1 / 255) / scale
    inner = (side * (x0 - mean) - 1 / 255) / scale
    outer = np.where(np.where(side > 0, x0 > 1 - 1 / 255, x0 < -1 + 1 / 255), np.inf, outer)
    inner = np.where(np.where(side > 0, x0 < -1 + 1 / 255, x0 > 1 - 1 / 255), -np.inf, inner)
    return -np.log(stats.norm.cdf(outer) - stats.norm.cdf(inner))


@functools.cache
def grid_terms(clip, variance):
    """L_0..L_{T−1} of LINE in nats, summed over a fine grid of (x_0, ε)."""
    # The bins open at ±254/255, half-way between two values of the grid.
    dx = 254 / 255 / 300
    x0 = (np.arange(-1100, 1500) + 0.5) * dx
    eps, de = np.linspace(-7, 7, 701, retstep=True)
    weights = stats.norm.pdf(x0, 0.6, 0.5)[:, None] * dx * stats.norm.pdf(eps) * de
    result = []
    for t in range(1, 7):
        x_t = EXACT.sqrt_alpha_bar[t] * x0[:, None] + EXACT.sqrt_one_minus_alpha_bar[t] * eps
        x0_hat, left = reference.denoise_gaussian(EXACT, 0.6, 0.25, np.array(t), x_t)
        best = EXACT.posterior_variance[t] + EXACT.posterior_mean_x0[t] ** 2 * left
        raw = np.log(np.maximum(best, EXACT.posterior_variance[2]) if t == 1 else best)
        log_sigma2 = reference.log_variance(EXACT, variance, raw, np.array(t), 0.0)[0]
        x0_hat = np.clip(x0_hat, -1, 1) if clip else x0_hat
        if t == 1:
            term = simple_decoder(x0[:, None], x0_hat, np.exp(0.5 * log_sigma2))
        else:
            mean = EXACT.posterior_mean_x0[t] * (x0[:, None] - x0_hat)
            term = reference.gaussian_kl(mean, EXACT.log_posterior_variance[t], 0, log_sigma2)
        result.append((weights * term).sum())
    return np.array(result)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned"])
def test_each_term_of_gaussian_data_is_its_double_integral(clip, variance):
    """The grid's own error is some 1e-6."""
    got = oracles.bound(LINE, Process(SCHEDULE, "x0", variance), clip)
    np.testing.assert_allclose(got[:-1] * np.log(2), grid_terms(clip, variance), rtol=2e-6)
    square = EXACT.alpha_bar[-1] * (0.6**2 + 0.25)
    prior = 0.5 * (square - EXACT.alpha_bar[-1] - np.log1p(-EXACT.alpha_bar[-1]))
    assert got[-1] * np.log(2) == pytest.approx(prior, rel=1e-6)


@pytest.mark.parametrize(
    "variance, stretch", [*((v, 1.0) for v in VARIANCES), ("fixed_small", 1.25)]
)
@pytest.mark.parametrize("t", [1, 2, 5])
def test_each_term_of_points_is_its_integral(variance, stretch, t):
    """By adaptive quadrature over x_t, with Bayes' rule and the KL written out. Clipping matters
    to points beyond [−1, 1] alone."""
    data = oracles.Points(stretch * LINE_POINTS.points, LINE_POINTS.weights)
    points, weights = data.points[:, 0], data.weights
    root, rest = EXACT.sqrt_alpha_bar[t], EXACT.one_minus_alpha_bar[t]

    def integrand(x_t):
        joint = weights * stats.norm.pdf(x_t, root * points, np.sqrt(rest))
        shares = joint / joint.sum()
        x0_hat = shares @ points
        left = shares @ (points - x0_hat) ** 2
        best = EXACT.posterior_variance[t] + EXACT.posterior_mean_x0[t] ** 2 * left
        best = max(best, EXACT.posterior_variance[2]) if t == 1 else best
        small, large = EXACT.log_posterior_variance[t], EXACT.log_beta[t]
        raw = np.log(best)
        if variance == "learned_range":
            raw = 2 * (np.log(best) - small) / (large - small) - 1
        log_sigma2 = reference.log_variance(EXACT, variance, np.array([raw]), np.array([t]), [0.0])
        x0_hat = np.clip(x0_hat, -1, 1)
        if t == 1:
            terms = simple_decoder(points, x0_hat, np.exp(0.5 * log_sigma2))
        else:
            mean = EXACT.posterior_mean_x0[t] * (points - x0_hat)
            terms = reference.gaussian_kl(mean, small, 0, log_sigma2)
        return joint @ terms

    reach = stretch * root + 8 * np.sqrt(rest)
    cuts = np.concatenate([[-reach], root * np.linspace(-1, 1, 9), [reach]])
    expected = sum(
        integrate.quad(integrand, a, b, epsabs=1e-11, epsrel=1e-10, limit=200)[0]
        for a, b in itertools.pairwise(cuts)
    )
    got = oracles.bound(data, Process(SCHEDULE, "eps", variance))
    assert got[t - 1] * np.log(2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.linear()], ids=["6", "1000"])
def test_with_the_exact_reverse_the_rate_is_the_information_in_x_1(schedule):
    """Eq. 16: where p_θ(x_{t−1}|x_t) is the true q(x_{t−1}|x_t), L_1 + … + L_T is I(x_0; x_1) +
    KL(q(x_T) ‖ p(x_T)), for Gaussians ½ log(Var[x_1]/(1−ᾱ_1)) and a KL of two of them."""
    v = np.array([0.25, 0.04])
    data = oracles.Gaussian([0.3, -0.1], v)
    got = oracles.bound(data, Process(schedule, "eps", "learned"), clip=False)[1:].sum()
    beta, end = float(schedule.beta[1]), float(schedule.alpha_bar[-1])
    information = 0.5 * np.log1p((1 - beta) * v / beta)
    total = end * v + 1 - end
    prior = 0.5 * (total - 1 - np.log(total) + end * data.mean**2)
    assert got * np.log(2) == pytest.approx((information + prior).mean(), rel=1e-6)


def test_the_paper_s_fixed_variances_are_optimal_where_it_says():
    """§3.2: β_t for N(0, I), where all learning of it leads to; β̃_t for one point, at no cost."""
    unit = oracles.Gaussian(np.zeros(3), 1.0)
    large, learned = (
        oracles.bound(unit, Process(SCHEDULE, "eps", v), clip=False)
        for v in ("fixed_large", "learned")
    )
    np.testing.assert_allclose(large[1:], learned[1:], rtol=1e-10)
    np.testing.assert_allclose(
        oracles.optimal_variance(unit, SCHEDULE)[2:], EXACT.beta[2:], rtol=1e-6
    )
    one = oracles.Points(LEVELS[[[37, 201]]])
    small = oracles.bound(one, Process(SCHEDULE, "v", "fixed_small"))
    np.testing.assert_array_equal(small[1:-1], 0)
    np.testing.assert_allclose(
        oracles.optimal_variance(one, SCHEDULE)[1:],
        EXACT.posterior_variance[[2, *range(2, 7)]],
        rtol=1e-6,
    )


def test_the_best_isotropic_variance_minimises_the_bound_of_isotropic_models():
    """For unequal coordinates: no σ² beside it has a smaller sum of KLs, and it is their mean."""
    got = oracles.optimal_variance(FULL, SCHEDULE)
    for t in (2, 6):
        root, rest = EXACT.sqrt_alpha_bar[t], EXACT.one_minus_alpha_bar[t]
        total = root**2 * FULL.covariance + rest * np.eye(4)
        left = FULL.covariance - root**2 * FULL.covariance @ np.linalg.inv(total) @ FULL.covariance
        error = EXACT.posterior_mean_x0[t] ** 2 * np.diag(left)
        cost = lambda s: (np.log(s) + (EXACT.posterior_variance[t] + error) / s).mean()  # noqa: B023, E731
        assert cost(got[t]) < min(cost(got[t] * 1.01), cost(got[t] / 1.01))
        assert got[t] == pytest.approx(EXACT.posterior_variance[t] + error.mean(), rel=1e-6)
    # Of points: its excess over β̃_t is what the bound with fixed_small pays.
    points = oracles.optimal_variance(POINTS, SCHEDULE)[2:]
    small = oracles.bound(POINTS, Process(SCHEDULE, "eps", "fixed_small"))[1:-1] * 2 * np.log(2)
    np.testing.assert_allclose(points, EXACT.posterior_variance[2:] * (1 + small), rtol=1e-6)


def three_steps(prediction, variance):
    betas = [0.3, 0.2, 0.5]  # σ_t² < 2 β̃_t: otherwise the weights' variance is infinite.
    schedule = schedules.from_betas(betas)
    return reference.derive(betas), Process(schedule, prediction, variance)


def exact_nll(c, process, network, clip):
    """−log2 p_θ(x_0) of all 256 values by passing p_θ(x_t) down a grid, t = T..1."""
    x, step = np.linspace(-7, 7, 1401, retstep=True)
    density = stats.norm.pdf(x)
    for t in range(len(c.beta) - 1, 0, -1):
        output = np.float64(network(np.float32(x[:, None]), np.full(len(x), t)))
        raw = output[:, 1] if process.learns_variance else None
        times = np.full(len(x), t)
        mean = reference.model(c, process.prediction, output[:, 0], x, times, clip)[0]
        sigma = np.exp(0.5 * reference.log_variance(c, process.variance, raw, times, x))
        if t == 1:
            edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
            bins = np.diff(stats.norm.cdf(edges[:, None], mean, sigma), axis=0)
            return -np.log2(bins @ density * step)
        density = stats.norm.pdf(x[:, None], mean, sigma) @ density * step


@pytest.mark.parametrize(
    "prediction, variance, clip",
    [("eps", "learned", True), ("mu", "fixed_large", False)],
)
def test_sampled_likelihoods_fall_from_the_bound_to_the_exact_one(prediction, variance, clip):
    """One pixel, three steps. 500 estimates from 1 and from 8 paths a point: the former average to
    the bound, the latter lie lower, not below −log p_θ(x_0) by more than their error, and so
    does their likelihood's mean on either side. 4 standard errors are allowed."""
    c, process = three_steps(prediction, variance)
    data = LINE_POINTS
    network = jax.jit(oracles.denoiser(data, process))
    exact = exact_nll(c, process, network, clip)
    assert np.exp2(-exact).sum() == pytest.approx(1, abs=1e-5)
    exact = exact[[0, 90, 110, 255]]
    bound = oracles.bound_of_points(data, process, clip).sum(axis=1)
    assert (bound > exact).all()
    estimate = jax.jit(
        functools.partial(oracles.importance_nll, process, network, clip=clip),
        static_argnames="num_paths",
    )
    count = 500
    x0 = np.float32(np.repeat(data.points, count, axis=0))
    means, errors = [], []
    for num_paths in (1, 8):
        nll = np.float64(estimate(x0, bound_keys(len(x0)), num_paths=num_paths)).reshape(4, count)
        means.append(nll.mean(axis=1))
        errors.append(nll.std(axis=1) / np.sqrt(count))
    assert (np.abs(means[0] - bound) < 4 * errors[0] + 1e-4).all()
    assert (means[1] < means[0] + 3 * np.hypot(*errors)).all()
    assert means[1].mean() < means[0].mean()
    assert (means[1] > exact - 4 * errors[1] - 1e-4).all()
    # The mean of the weights themselves is p_θ(x_0) without bias, whatever their number.
    likelihoods = np.exp2(-nll)
    mean, error = likelihoods.mean(axis=1), likelihoods.std(axis=1) / np.sqrt(count)
    assert (np.abs(mean - np.exp2(-exact)) < 4 * error + 1e-4 * mean).all()
    assert (error < 0.05 * mean).all()


METHODS = [("ancestral", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]


@pytest.mark.parametrize("steps", [0, 1, 20])
@pytest.mark.parametrize("method, eta", METHODS)
def test_a_sampler_s_marginals_are_those_of_one_dimension(method, eta, steps):
    """At every index, against the recursion of one variable on mpmath's constants."""
    data = oracles.Gaussian([0.3, -0.5], [0.2, 0.01])
    kept = None
    if steps:
        kept = (
            (1000,) if steps == 1 else tuple(int(t) for t in np.round(np.linspace(1, 1000, steps)))
        )
    c = reference.chain("linear", 1000, kept)
    for variance in ("fixed_large", "fixed_small"):
        process = Process(schedules.linear(), "eps", variance)
        last = len(c.beta) - 1
        indices = (0, last // 2, last)
        got = [oracles.sampler_marginal(data, process, method, steps, eta, i) for i in indices]
        log_sigma2 = reference.log_variance(
            c, variance, None, np.arange(last + 1), np.zeros(last + 1)
        )
        for axis in range(2):
            m, v = data.mean[axis], data.covariance[axis]
            affine = reference.reverse_step(c, m, v, np.exp(log_sigma2), method, eta)
            means, variances = reference.marginals(affine, 0, 1)
            for index, gaussian in zip(indices, got, strict=True):
                assert gaussian.mean[axis] == pytest.approx(means[index], abs=2e-6)
                assert gaussian.covariance[axis] == pytest.approx(variances[index], abs=2e-6)


@pytest.mark.parametrize(
    "prediction, variance, method, eta, steps",
    [
        ("eps", "learned", "ancestral", 0.0, 0),
        ("v", "learned_range", "ancestral", 0.0, 3),
        ("mu", "fixed_large", "ancestral", 0.0, 3),
        ("eps", "fixed_small", "ddim", 0.0, 4),
        ("v", "fixed_small", "ddim", 0.7, 0),
    ],
)
def test_samples_have_the_exact_moments(prediction, variance, method, eta, steps):
    """20,000 of four correlated coordinates; 20 z-scores within 4.5."""
    process = Process(SCHEDULE, prediction, variance)
    network = oracles.denoiser(FULL, process)
    draw = jax.jit(
        lambda key: sampling.sample(
            process, network, FULL.shape, key, method, steps, eta, clip=False
        )
    )
    samples = draw(bound_keys(20_000))
    expected = oracles.sampler_marginal(FULL, process, method, steps, eta)
    z = oracles.moments_z(samples, expected)
    assert np.abs(z.mean).max() < 4.5
    assert np.abs(z.covariance).max() < 4.5
    # These samples are of another distribution than the data's, and that is seen.
    other = oracles.moments_z(samples, FULL)
    assert max(np.abs(other.mean).max(), np.abs(other.covariance).max()) > 4.5


def test_z_scores_are_standard_normal_and_find_mistakes():
    covariance = np.array([[0.5, 0.2], [0.2, 0.3]])
    gaussian = oracles.Gaussian([1.0, -2.0], covariance)
    rng = np.random.default_rng(0)
    draws = rng.multivariate_normal(gaussian.mean, covariance, (1000, 400))
    scores = [oracles.moments_z(d, gaussian) for d in draws]
    for values in (np.array([z.mean for z in scores]), np.array([z.covariance for z in scores])):
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=4.5 / np.sqrt(1000))
        np.testing.assert_allclose(values.std(axis=0), 1, atol=0.13)
    moved = oracles.moments_z(draws[0] + [0.0, 0.2], gaussian).mean
    assert abs(moved[0]) < 4.5 < moved[1]
    certain = oracles.moments_z(np.ones((3, 1)), oracles.Gaussian([1.0], 0.0))
    assert certain.mean == certain.covariance == 0
    assert np.isinf(oracles.moments_z(np.zeros((3, 1)), oracles.Gaussian([1.0], 0.0)).mean)


@pytest.mark.parametrize("covariance", [[[[0.5], [0.2]], [[0.3], [0.1]]], 0.2])
def test_z_scores_of_images_are_those_of_their_coordinates(covariance):
    """[2, 2, 1] with one variance a coordinate, or one for all: the same, flattened and full."""
    mean = np.arange(4.0).reshape(2, 2, 1)
    samples = mean + np.random.default_rng(1).normal(size=(50, 2, 2, 1)) * 0.5
    flat = np.diag(np.broadcast_to(covariance, mean.shape).reshape(-1))
    expected = oracles.moments_z(samples.reshape(50, 4), oracles.Gaussian(mean.reshape(-1), flat))
    z = oracles.moments_z(samples, oracles.Gaussian(mean, covariance))
    np.testing.assert_allclose(z.mean, expected.mean.reshape(2, 2, 1), rtol=1e-12)
    np.testing.assert_allclose(z.covariance, expected.covariance, rtol=1e-9)


@pytest.mark.parametrize("method, eta", METHODS[:2])
def test_samples_of_points_land_on_them_as_often_as_they_weigh(method, eta):
    """600 samples of weights 1/6, 2/6, 3/6: within 4.5 standard errors. A chain of 30 steps."""
    process = Process(schedules.linear(30, 1e-4, 0.4), "eps", "fixed_small")
    points = oracles.Points(LEVELS[[[20, 200], [230, 60], [120, 128]]][:, None, None], [1, 2, 3])
    network = oracles.denoiser(points, process)
    draw = jax.jit(lambda key: sampling.sample(process, network, (1, 1, 2), key, method, eta=eta))
    index, distance = points.nearest(draw(bound_keys(600)))
    assert distance.max() < 0.01
    shares = np.bincount(index, minlength=3) / 600
    error = np.sqrt(points.weights * (1 - points.weights) / 600)
    assert np.abs((shares - points.weights) / error).max() < 4.5


PROCESS = Process(SCHEDULE)
BAD = {
    "mixture": (
        "Gaussian and Points",
        lambda: oracles.bound(oracles.Mixture([1], [[0.0]], 1.0), PROCESS),
    ),
    "three coordinates": (
        "1 or 2",
        lambda: oracles.bound(oracles.Points(np.zeros((1, 3))), PROCESS),
    ),
    "too many steps": ("cannot choose", lambda: oracles.bound(LINE, PROCESS, steps=7)),
    "no path": (
        "num_paths",
        lambda: oracles.importance_nll(
            PROCESS, lambda x, t: x, jnp.zeros((1, 1)), bound_keys(1), 0
        ),
    ),
    "sampler of points": ("Gaussian data", lambda: oracles.sampler_marginal(POINTS, PROCESS)),
    "method": ("choose from", lambda: oracles.sampler_marginal(LINE, PROCESS, "euler")),
    "eta": ("eta must", lambda: oracles.sampler_marginal(LINE, PROCESS, "ddim", eta=2.0)),
    "index": ("index must", lambda: oracles.sampler_marginal(LINE, PROCESS, index=7)),
}


@pytest.mark.parametrize("reason, wrong", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(reason, wrong):
    with pytest.raises(ValueError, match=reason):
        wrong()
