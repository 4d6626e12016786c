"""Data of which everything is known: moments and denoisers against integrals done otherwise."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from reference import PREDICTIONS
from scipy import integrate, stats

from ddpm_jax import diffusion, keys, oracles, sampling, schedules
from ddpm_jax.diffusion import Process

LEVELS = np.arange(256) / 127.5 - 1
BETAS = np.linspace(1e-3, 0.5, 12)
SHORT, SHORT_EXACT = schedules.from_betas(BETAS), reference.derive(BETAS)

ROOT = np.random.default_rng(5).standard_normal((3, 3)) / 2
FULL = oracles.Gaussian(np.array([0.3, -0.2, 0.1]), ROOT @ ROOT.T)
DIAGONAL = oracles.Gaussian(np.array([0.3, -0.2]), np.array([0.25, 0.01]))
MIXTURE = oracles.Mixture([1, 2, 1], [[-0.5, 0.2], [0.6, 0.1], [0.0, -0.9]], [0.04, 0.01, 0.3])
DIAGONAL_MIXTURE = oracles.Mixture([1, 3], [[-0.5, 0.2], [0.6, 0.1]], [[0.04, 0.2], [0.3, 0.01]])
POINTS = oracles.Points(LEVELS[[[20, 200], [230, 250], [231, 250], [60, 90]]], [1, 2, 3, 2])
ALL = {
    "full": FULL,
    "diagonal": DIAGONAL,
    "isotropic": oracles.Gaussian(np.array([0.3, -0.2]), 0.09),
    "mixture": MIXTURE,
    "diagonal mixture": DIAGONAL_MIXTURE,
    "points": POINTS,
}


def example_keys(count, seed=0):
    return keys.example_keys(seed, "noise", 0, jnp.arange(count))


def moments_by_integration(density, t, x_t):
    """E and Var of one-dimensional x_0 given x_t, by adaptive quadrature of q(x_t|x_0) q(x_0)."""
    root, deviation = SHORT_EXACT.sqrt_alpha_bar[t], SHORT_EXACT.sqrt_one_minus_alpha_bar[t]
    centre = x_t / root

    def integral(power):
        value = lambda x: x**power * density(x) * stats.norm.pdf(x_t, root * x, deviation)  # noqa: E731
        places = np.clip([centre, -0.5, 0.6, 0.0], -7.9, 7.9)
        return integrate.quad(value, -8, 8, points=places, epsabs=1e-14, epsrel=1e-12, limit=500)[0]

    total, first, second = (integral(power) for power in range(3))
    return first / total, second / total - (first / total) ** 2


def normal_mixture(x):
    parts = zip((0.25, 0.75), (-0.5, 0.6), (0.2, 0.4), strict=True)
    return sum(w * stats.norm.pdf(x, m, s) for w, m, s in parts)


LINE = {
    "gaussian": (
        oracles.Gaussian([0.3], 0.25),
        lambda x: stats.norm.pdf(x, 0.3, 0.5),
    ),
    "mixture": (
        oracles.Mixture([1, 3], [[-0.5], [0.6]], [0.04, 0.16]),
        normal_mixture,
    ),
}


@pytest.mark.parametrize("name", LINE)
@pytest.mark.parametrize("t", [1, 4, 12])
def test_moments_are_the_integrals_that_define_them(name, t):
    data, density = LINE[name]
    x_t = np.array([-1.2, 0.05, 0.4, 1.9])
    got = data.posterior(SHORT, t, x_t[:, None])
    expected = np.array([moments_by_integration(density, t, x) for x in x_t])
    np.testing.assert_allclose(got.x0[:, 0], expected[:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.variance[:, 0], expected[:, 1], rtol=2e-6, atol=1e-9)
    assert data.log_prob([[0.4]]) == pytest.approx(np.log(density(0.4)), rel=1e-12)


@pytest.mark.parametrize("t", [1, 6, 12])
def test_a_full_covariance_is_the_textbook_s_conditional_gaussian(t):
    """From the joint Gaussian of (x_0, x_t): C_0t C_tt⁻¹ and the Schur complement's diagonal."""
    x_t = np.random.default_rng(0).standard_normal((5, 3))
    root, rest = SHORT_EXACT.sqrt_alpha_bar[t], SHORT_EXACT.one_minus_alpha_bar[t]
    gain = root * FULL.covariance @ np.linalg.inv(root**2 * FULL.covariance + rest * np.eye(3))
    x0 = FULL.mean + (x_t - root * FULL.mean) @ gain.T
    got = FULL.posterior(SHORT, t, x_t)
    np.testing.assert_allclose(got.x0, x0, atol=1e-6)
    np.testing.assert_allclose(got.eps, (x_t - root * x0) / np.sqrt(rest), atol=2e-6)
    left = np.diag(FULL.covariance - gain @ (root * FULL.covariance))
    np.testing.assert_allclose(got.variance, np.tile(left, (5, 1)), atol=1e-7)
    np.testing.assert_allclose(FULL.moments[0], FULL.mean, atol=1e-12)
    np.testing.assert_allclose(FULL.moments[1], np.diag(FULL.covariance), rtol=1e-12)


@pytest.mark.parametrize("t", [1, 6, 12])
def test_points_are_weighted_by_bayes_rule_in_fifty_digits(t):
    x_t = np.array([[0.8, 0.96], [-0.4, 0.1], [3.0, -2.0]])
    root, rest = (
        mpmath.mpf(c[t]) for c in (SHORT_EXACT.sqrt_alpha_bar, SHORT_EXACT.one_minus_alpha_bar)
    )
    got = POINTS.posterior(SHORT, t, x_t)
    for row, x in enumerate(x_t):
        squares = [
            sum((float(a) - root * b) ** 2 for a, b in zip(x, p, strict=True))
            for p in POINTS.points
        ]
        shares = [
            w * mpmath.exp(-s / (2 * rest)) for w, s in zip((1, 2, 3, 2), squares, strict=True)
        ]
        shares = [s / sum(shares) for s in shares]
        for axis in range(2):
            values = POINTS.points[:, axis]
            mean = sum(s * v for s, v in zip(shares, values, strict=True))
            variance = sum(s * (v - mean) ** 2 for s, v in zip(shares, values, strict=True))
            assert got.x0[row, axis] == pytest.approx(float(mean), abs=2e-6)
            assert got.variance[row, axis] == pytest.approx(float(variance), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("t", [1, 6, 12])
def test_the_exact_noise_is_the_score_of_the_marginal(name, t):
    """Tweedie: E[ε|x_t] = −√(1−ᾱ_t) ∇ log q(x_t), by central differences of the log density."""
    data = ALL[name]
    x_t = np.random.default_rng(1).uniform(-1, 1, (6, *data.shape))
    marginal, step = data.marginal(SHORT, t), 1e-5
    gradient = np.stack(
        [
            (marginal.log_prob(x_t + shift) - marginal.log_prob(x_t - shift)) / (2 * step)
            for shift in step * np.eye(data.shape[0])
        ],
        axis=1,
    )
    eps = data.posterior(SHORT, t, x_t).eps
    np.testing.assert_allclose(
        eps, -SHORT_EXACT.sqrt_one_minus_alpha_bar[t] * gradient, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ALL)
def test_the_marginal_has_the_moments_of_noised_data(name):
    data, c = ALL[name], SHORT_EXACT
    mean, variance = data.moments
    for t in (0, 1, 12):
        got = data.marginal(SHORT, t).moments
        np.testing.assert_allclose(got[0], c.sqrt_alpha_bar[t] * mean, rtol=1e-6)
        np.testing.assert_allclose(
            got[1], c.alpha_bar[t] * variance + c.one_minus_alpha_bar[t], rtol=1e-6
        )


def test_log_densities_are_scipy_s():
    x = np.random.default_rng(2).standard_normal((7, 3))
    expected = stats.multivariate_normal(FULL.mean, FULL.covariance).logpdf(x)
    np.testing.assert_allclose(FULL.log_prob(x), expected, rtol=1e-10)
    x, m = x[:, :2], DIAGONAL_MIXTURE
    parts = [stats.norm.pdf(x, m.means[k], np.sqrt(m.variances[k])).prod(axis=1) for k in (0, 1)]
    np.testing.assert_allclose(m.log_prob(x), np.log(m.weights @ parts), rtol=1e-10)
    with pytest.raises(ValueError, match="no density"):
        oracles.Gaussian([0.0, 1.0], [1.0, 0.0]).log_prob(x)


@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_moments_and_their_own_noise(name):
    """20,000 draws; 4.5 standard errors. Nothing in them recurs at a step of a chain."""
    data, key, count = ALL[name], example_keys(20_000), 20_000
    x0 = np.float64(jax.jit(data.sample)(key))
    assert x0.shape == (count, *data.shape)
    mean, variance = data.moments
    centred = x0 - mean
    assert np.abs(centred.mean(axis=0) / np.sqrt(variance / count)).max() < 4.5
    error = (centred**2).std(axis=0) / np.sqrt(count)
    assert np.abs(((centred**2).mean(axis=0) - variance) / error).max() < 4.5
    for position in (0, 1, 2):
        noise = np.asarray(keys.normal(key, position, data.shape)).reshape(count, -1)
        together = np.corrcoef(np.concatenate([centred.reshape(count, -1), noise], axis=1).T)
        d = noise.shape[1]
        assert np.abs(together[:d, d:]).max() < 4.5 / np.sqrt(count)
    if name == "full":
        z = oracles.moments_z(x0, data)
        assert np.abs(z.covariance).max() < 4.5
    if name == "points":
        index, distance = data.nearest(x0)
        assert distance.max() < 1e-6
        shares = np.bincount(index, minlength=4) / count
        np.testing.assert_allclose(shares, data.weights, atol=4.5 * np.sqrt(0.25 / count))


@functools.cache
def exact_targets(name, t):
    """x_t and E[target|x_t] of every prediction, from float64 moments checked above."""
    data, c = ALL[name], SHORT_EXACT
    x_t = np.float32(np.random.default_rng(t).uniform(-1.2, 1.2, (8, *data.shape)))
    x0 = data.posterior(SHORT, t, x_t).x0
    eps = (np.float64(x_t) - c.sqrt_alpha_bar[t] * x0) / c.sqrt_one_minus_alpha_bar[t]
    times = np.full(8, t)
    return x_t, {p: reference.target(c, p, x0, eps, np.float64(x_t), times) for p in PREDICTIONS}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["full", "diagonal mixture", "points"])
def test_the_denoiser_returns_the_mean_of_its_target(name, prediction):
    network = jax.jit(oracles.denoiser(ALL[name], Process(SHORT, prediction)))
    for t in (1, 2, 7, 12):
        x_t, targets = exact_targets(name, t)
        got = network(x_t, np.full(8, t))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, targets[prediction], atol=2e-5)


def test_no_digit_is_lost_between_images_that_differ_in_one_pixel():
    """3,072 coordinates, of which one differs by a grey level: its logit is (2x̄−…)Δ/2(1−ᾱ_t),
    some hundredths, while the squares themselves sum to thousands. All t of the paper's chain."""
    rng = np.random.default_rng(0)
    images = np.repeat(LEVELS[rng.integers(0, 255, (1, 3072))], 2, axis=0)
    images[1, 7] += 2 / 255
    schedule, c = schedules.linear(), reference.chain("linear", 1000)
    network = jax.jit(oracles.denoiser(oracles.Points(images), Process(schedule, "x0")))
    times = np.array([1, 2, 30, 100, 400, 700, 999, 1000])
    noise = rng.standard_normal((8, 3072))
    x_t = np.float32(reference.diffuse(c, images[:1], noise, times))
    got = np.asarray(network(x_t, times))
    assert np.isfinite(got).all()
    root, rest, a, b = c.sqrt_alpha_bar[times], c.one_minus_alpha_bar[times], *images[:, 7]
    logit = root * (b - a) * (2 * np.float64(x_t[:, 7]) - root * (a + b)) / (2 * rest)
    share = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose((got[:, 7] - a) / (b - a), share, atol=2e-5)
    np.testing.assert_allclose(
        np.delete(got, 7, 1), np.delete(images[:1], 7, 1) + 0 * noise[:, 1:], atol=1e-6
    )


def test_far_from_every_point_and_at_either_end_nothing_overflows():
    schedule = schedules.linear()
    for name in ("full", "mixture", "points"):
        data, process = ALL[name], Process(schedule, "eps", "learned")
        network = jax.jit(oracles.denoiser(data, process))
        for x in (-40.0, 0.0, 40.0):
            x_t, times = np.full((4, *data.shape), x, np.float32), np.array([1, 2, 999, 1000])
            assert np.isfinite(network(x_t, times)).all(), name


def test_the_denoiser_can_be_mapped_over_and_differentiated():
    network = jax.jit(oracles.denoiser(POINTS, Process(SHORT, "x0")))
    x, t = jnp.float32([[0.1, 0.2], [0.5, -0.3]]), jnp.array([3, 9])
    each = jax.jit(jax.vmap(lambda a, b: network(a[None], b[None])[0]))(x, t)
    np.testing.assert_allclose(each, network(x, t), atol=1e-6)
    # ∂E[x_0|x_t]/∂x_t = √ᾱ/(1−ᾱ) Cov[x_0|x_t].
    slope = jax.jit(jax.vmap(jax.jacfwd(lambda a, b: network(a[None], b[None])[0])))(x, t)
    for row, index in enumerate(np.asarray(t)):
        variance = POINTS.posterior(SHORT, index, x[row : row + 1]).variance[0]
        factor = SHORT_EXACT.sqrt_alpha_bar[index] / SHORT_EXACT.one_minus_alpha_bar[index]
        np.testing.assert_allclose(np.diag(slope[row]), factor * variance, rtol=1e-3)


def expected_kl(c, data, t, x_t, log_sigma2):
    """E over q(x_0|x_t) of the KL of Eq. 5 for each coordinate, points enumerated."""
    root, rest = c.sqrt_alpha_bar[t], c.one_minus_alpha_bar[t]
    squares = ((x_t - root * data.points) ** 2).sum(axis=1)
    shares = data.weights * np.exp(-(squares - squares.min()) / (2 * rest))
    shares /= shares.sum()
    x0_hat = shares @ data.points
    difference = c.posterior_mean_x0[t] * (data.points - x0_hat)
    kl = reference.gaussian_kl(difference, c.log_posterior_variance[t], 0, log_sigma2)
    return shares @ kl


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("steps", [12, 5])
def test_no_other_variance_has_a_smaller_bound(variance, steps):
    """At every step, at t = 1 as the decoder's density would have it, down to β̃_2."""
    process = sampling.shorten(Process(SHORT, "x0", variance), steps)
    kept = np.asarray(process.schedule.timesteps)[1:]
    c = reference.derive(BETAS, tuple(kept))
    network = jax.jit(oracles.denoiser(POINTS, process))
    for t, time in enumerate(kept, start=1):
        x_t = np.float32([[0.75, 0.9]]) * np.float32(c.sqrt_alpha_bar[t])
        output = np.asarray(network(x_t, np.array([time])))
        got = diffusion.p_log_variance(process, output[:, 2:], x_t, np.array([t]))
        log_sigma2 = np.float64(got)[0]
        if t == 1:
            left = POINTS.posterior(process.schedule, 1, x_t).variance[0]
            floor = c.posterior_variance[2]
            np.testing.assert_allclose(np.exp(log_sigma2), np.maximum(left, floor), rtol=1e-4)
            continue
        best = expected_kl(c, POINTS, t, x_t, log_sigma2)
        for change in (-0.05, 0.05):
            assert (expected_kl(c, POINTS, t, x_t, log_sigma2 + change) > best).all()
            # A minimum: both sides rise alike, by change²/4 to leading order.
        rise = [
            expected_kl(c, POINTS, t, x_t, log_sigma2 + change) - best for change in (-0.05, 0.05)
        ]
        np.testing.assert_allclose(rise, 0.05**2 / 4, rtol=0.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_a_respaced_chain_it_is_the_trained_network(prediction):
    trained = Process(SHORT, prediction)
    short = sampling.shorten(trained, 5)
    times = np.asarray(short.schedule.timesteps)[1:]
    x_t = np.float32(np.random.default_rng(0).uniform(-1, 1, (5, 2)))
    one, other = (jax.jit(oracles.denoiser(POINTS, p))(x_t, times) for p in (trained, short))
    np.testing.assert_allclose(one, other, atol=2e-5)
    with pytest.raises(ValueError, match="no step whose time"):
        oracles.denoiser(POINTS, short)(x_t, np.array([2] * 5))


def test_the_excess_error_of_a_known_mistake_is_known():
    """An exact network has 0, an output off by 0.1 has 0.01; x̂_0 = 0 has the mean of E[x_0|x_t]²,
    which is m² + v − Var[x_0|x_t]. The variance's channels do not count."""
    process, times = Process(SHORT, "x0", "learned"), (4, 6, 12)
    best = oracles.denoiser(DIAGONAL, process)

    def network(x_t, t):
        exact, which = best(x_t, t)[:, :2], t[:, None]
        prediction = jnp.where(which == 4, exact, jnp.where(which == 6, exact + 0.1, 0))
        return jnp.concatenate([prediction, prediction + 5], axis=-1)

    got = oracles.excess_error(DIAGONAL, process, network, example_keys(5000), times)
    assert got.dtype == np.float32
    assert got[0] == 0
    assert got[1] == pytest.approx(0.01, rel=1e-4)
    _, left = reference.denoise_gaussian(SHORT_EXACT, 0, DIAGONAL.covariance, 12, np.zeros(2))
    expected = (DIAGONAL.mean**2 + DIAGONAL.covariance - left).mean()
    assert got[2] == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="times must"):
        oracles.excess_error(DIAGONAL, process, best, example_keys(1), (0,))


BAD = {
    "covariance of another size": ("asks for a", lambda: oracles.Gaussian([0.0, 1.0], np.eye(3))),
    "mean without channels": ("asks for a", lambda: oracles.Gaussian(0.0, 1.0)),
    "asymmetric": ("symmetric", lambda: oracles.Gaussian([0.0, 1.0], [[1, 0.5], [0, 1]])),
    "not a covariance": ("negative", lambda: oracles.Gaussian([0.0, 1.0], [[1, 2], [2, 1]])),
    "negative variance": ("negative", lambda: oracles.Gaussian([0.0], -1.0)),
    "mixture of another size": ("ask for", lambda: oracles.Mixture([1], [[0.0]], [1.0, 2.0])),
    "mixture's variance": ("negative", lambda: oracles.Mixture([1], [[0.0]], -1.0)),
    "weights of another size": ("weights", lambda: oracles.Mixture([1, 1], [[0.0]], 1.0)),
    "a weight of zero": ("weights", lambda: oracles.Points([[0.0], [1.0]], [1, 0])),
    "points without channels": ("points must", lambda: oracles.Points([0.0, 1.0])),
    "time before the data": ("t must", lambda: POINTS.marginal(SHORT, -1)),
    "time beyond T": ("t must", lambda: POINTS.posterior(SHORT, 13, np.zeros((1, 2)))),
    "another shape": ("data have", lambda: FULL.log_prob(np.zeros((1, 2)))),
    "x_t of another shape": (
        r"^x_t must be \[batch, 3\], not \[1, 2\]$",
        lambda: oracles.denoiser(FULL, Process(SHORT))(jnp.zeros((1, 2)), jnp.array([1])),
    ),
    "an image of another shape": (
        r"^x_t must be \[batch, 2, 2, 1\], not \[1, 2\]$",
        lambda: oracles.denoiser(oracles.Points(np.zeros((1, 2, 2, 1))), Process(SHORT))(
            jnp.zeros((1, 2)), jnp.array([1])
        ),
    ),
    "points with NaN": ("points: 1 of 2", lambda: oracles.Points([[0.0], [np.nan]])),
    "infinite weights": ("weights: 1 of 1", lambda: oracles.Points([[0.0]], [np.inf])),
    "means with NaN": (
        "means: 2 of 2",
        lambda: oracles.Mixture([1, 1], [[np.nan], [-np.inf]], 1.0),
    ),
    "infinite variances": (
        "variances: 1 of 1",
        lambda: oracles.Mixture([1], [[0.0]], np.inf),
    ),
    "mean with NaN": ("mean: 1 of 1", lambda: oracles.Gaussian([np.nan], 1.0)),
    "covariance with NaN": (
        "covariance: 1 of 4",
        lambda: oracles.Gaussian([0.0, 0.0], [[1, 0], [0, np.nan]]),
    ),
    "infinite covariance": ("covariance: 1 of 1", lambda: oracles.Gaussian([0.0], np.inf)),
    "unknown time": (
        "no step whose time",
        lambda: oracles.denoiser(FULL, Process(SHORT))(jnp.zeros((1, 3)), jnp.array([0])),
    ),
}


@pytest.mark.parametrize("reason, wrong", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(reason, wrong):
    with pytest.raises(ValueError, match=reason):
        wrong()
