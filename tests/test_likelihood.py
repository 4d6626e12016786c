"""The bound's terms and the decoder against mpmath, closed forms and exact toy distributions."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from mpmath import mpf
from reference import PREDICTIONS, VARIANCES
from scipy import stats

from ddpm_jax import keys, likelihood, schedules
from ddpm_jax.diffusion import Process

LEVELS = np.arange(256) / 127.5 - 1
decoder = jax.jit(likelihood.discretized_gaussian_log_likelihood)
decoder_gradient = jax.jit(
    jax.vmap(jax.grad(likelihood.discretized_gaussian_log_likelihood, argnums=(1, 2)))
)
vlb_term = jax.jit(likelihood.vlb_term, static_argnames="clip")
vlb_terms = jax.jit(likelihood.vlb_terms, static_argnames=("denoiser", "clip"))


@pytest.mark.parametrize("mean_difference", [0.0, 1e-6, 1e-3, 0.5, 30.0])
@pytest.mark.parametrize("d", [0.0, 1e-4, -1e-3, 0.0999, 0.1001, -0.1001, 1.0, -3.0, 8.0])
def test_gaussian_kl_is_accurate_for_small_and_large_differences(mean_difference, d):
    mean1, log_variance1, log_variance2 = np.float32([mean_difference, -5.0 + d, -5.0])
    got = likelihood.gaussian_kl(mean1, log_variance1, np.float32(0), log_variance2)
    d = mpf(float(log_variance1)) - mpf(float(log_variance2))
    square = mpf(float(mean1)) ** 2 * mpmath.exp(-mpf(float(log_variance2)))
    expected = (mpmath.exp(d) - 1 - d + square) / 2
    assert float(got) == pytest.approx(float(expected), rel=1e-5, abs=0)


def test_gaussian_kl_of_close_means_far_from_zero_keeps_its_digits():
    mean = np.float32(1.0)
    other = np.nextafter(mean, np.float32(2))
    expected = 0.5 * (float(other) - 1.0) ** 2 * np.exp(9.0)
    got = likelihood.gaussian_kl(mean, np.float32(-9), other, np.float32(-9))
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_gaussian_kl_of_equals_is_exactly_zero_with_zero_gradient():
    rng = np.random.default_rng(0)
    mean, log_variance = np.float32(rng.normal(size=(2, 1000)) * 9)
    np.testing.assert_array_equal(likelihood.gaussian_kl(mean, log_variance, mean, log_variance), 0)
    gradient = jax.grad(likelihood.gaussian_kl, argnums=(0, 1, 2, 3))(0.3, -4.0, 0.3, -4.0)
    np.testing.assert_array_equal(gradient, 0)


def decoder_cases():
    """x0 in the middle, beside and at the ends; σ from 1e-3 to 20; |x0 − mean| up to 500 σ."""
    log_scales = np.log([1e-3, 7.4e-3, 0.05, 0.19, 0.2, 0.21, 1.0, 20.0])
    distances = np.array([0, 0.3, -1, 3, -8, 30, -100, 300, -500])
    x0, log_scale, z = np.meshgrid(LEVELS[[0, 1, 100, 254, 255]], log_scales, distances)
    mean = x0 - z * np.exp(log_scale)
    return [np.float32(a.ravel()) for a in (x0, mean, log_scale)]


def test_the_decoder_is_exact_in_both_far_tails_e5():
    """Absolutely to 1e-5 nats near the mean, relatively to 1e-5 hundreds of σ away."""
    cases = decoder_cases()
    expected = reference.decoder_nats(*cases)
    assert expected.min() < -1e5
    np.testing.assert_allclose(decoder(*cases), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rmse", [0.95, 3, 6, 127.5, 255])
def test_the_decoder_does_not_flatter_a_poor_model_e5(rmse):
    """An error of this size on the 0-255 scale, at σ_1² = β̃_2."""
    log_scale = np.float32(0.5 * np.log(reference.chain("linear", 1000).posterior_variance[2]))
    x0 = np.float32(LEVELS[[127, 0, 255]])
    mean = np.float32(x0 + np.array([1, 1, -1]) * rmse / 127.5)
    expected = reference.decoder_nats(x0, mean, log_scale)
    np.testing.assert_allclose(decoder(x0, mean, log_scale), expected, rtol=1e-5)


def test_the_decoder_s_gradient_is_finite_and_right_in_the_tails():
    """∂/∂mean is (φ(a) − φ(b)) / (σ P), ∂/∂log σ is (a φ(a) − b φ(b)) / P."""
    x0, mean, log_scale = decoder_cases()
    got = decoder_gradient(x0, mean, log_scale)
    for i in range(0, len(x0), 7):
        scale, half = mpmath.exp(mpf(float(log_scale[i]))), mpf(1) / 255
        a, b = (mpf(float(x0[i])) - mpf(float(mean[i])) + s * half for s in (-1, 1))
        a, b = a / scale, b / scale
        open_low, open_high = x0[i] < -1 + half, x0[i] > 1 - half
        p = mpmath.exp(reference.decoder(x0[i], mean[i], log_scale[i]))
        phi_a, phi_b = 0 if open_low else mpmath.npdf(a), 0 if open_high else mpmath.npdf(b)
        for_mean = float((phi_a - phi_b) / (scale * p))
        for_scale = float((phi_a * a - phi_b * b) / p)
        unit = float(1 / scale)
        assert float(got[0][i]) == pytest.approx(for_mean, rel=0.01, abs=1e-4 * unit)
        assert float(got[1][i]) == pytest.approx(for_scale, rel=0.01, abs=2e-4)
    extreme = np.float32(np.array(np.meshgrid([-1, 0.2, 1], [-1e3, -2, 0, 2, 1e3], [-12, -5, 5])))
    assert np.isfinite(decoder_gradient(*extreme.reshape(3, -1))).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 7.4e-3, 0.05, 0.1959, 0.1962, 1.0, 50.0])
def test_the_256_bins_sum_to_one_e5(scale):
    for mean in (0.0, 0.1234, -1.0, 0.998, 1.3, -5.0):
        probabilities = np.exp(np.float64(decoder(np.float32(LEVELS), mean, np.log(scale))))
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_the_decoder_is_symmetric_and_falls_away_from_the_mean_e5():
    x0, mean, log_scale = decoder_cases()
    mirrored = decoder(-x0, -mean, log_scale)
    np.testing.assert_array_equal(decoder(x0, mean, log_scale), mirrored)
    # Steps of 1/400 of a bin would sink in float32's rounding of −z²/2; these do not.
    for log_scale in (-7.0, -4.9, -1.63, 0.0):
        means = np.float32(LEVELS[100] + np.exp(log_scale) * np.geomspace(0.5, 500, 200))
        assert (np.diff(decoder(np.float32(LEVELS[100]), means, log_scale)) < 0).all()
        # The bin at −1 is open: its probability only falls as the mean rises, and that at 1 rises.
        means = np.float32(np.exp(log_scale) * np.linspace(-2, 300, 200))
        assert (np.diff(decoder(np.float32(-1), means - 1, log_scale)) <= 0).all()
        assert (np.diff(decoder(np.float32(1), 1 - means, log_scale)) <= 0).all()


@pytest.mark.parametrize("variance, expected", [("fixed_small", 1.974), ("beta_1", 2.094)])
def test_l0_of_the_paper_s_distortion_needs_the_second_posterior_variance_s1(variance, expected):
    """Mean over a Gaussian error of RMSE 0.95 (0-255), by quadrature. The paper prints 1.97."""
    c, schedule = reference.chain("linear", 1000), schedules.linear()
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    error = np.float32(0.95 / 127.5 * x)[:, None]
    x0 = np.full_like(error, LEVELS[128])
    if variance == "beta_1":
        loss = -decoder(x0, x0 + error, 0.5 * c.log_beta[1]) / np.log(2)
        loss = loss[:, 0]
    else:
        times = np.ones(80, int)
        process = Process(schedule, "mu", variance)
        loss = vlb_term(process, x0 + error, x0, x0, times)
    assert np.average(loss, weights=weights) == pytest.approx(expected, abs=1e-3)


def test_the_prior_term_is_its_closed_form_and_the_paper_s_size():
    schedule, c = schedules.linear(), reference.chain("linear", 1000)
    x0 = np.float32(np.stack([np.zeros(256), np.ones(256), LEVELS]))
    got = likelihood.prior_term(schedule, x0)
    np.testing.assert_allclose(got, reference.prior_term(c, x0), rtol=1e-5, atol=1e-14)
    assert 0.5e-5 < got[2] < 1.5e-5
    short = likelihood.prior_term(schedules.constant(2, 0.3), x0)
    expected = reference.prior_term(reference.derive([0.3, 0.3]), x0)
    np.testing.assert_allclose(short, expected, rtol=1e-6)


def guesses(name, process, seed=0):
    """Every t once: x0, x_t and an output that misses by 0.1 of a unit (μ̃: of √β̃_t)."""
    c, times = reference.chain(name, 1000), np.arange(1, 1001)
    rng = np.random.default_rng(seed)
    x0 = np.float32(rng.integers(0, 256, (1000, 2, 2)) / 127.5 - 1)
    eps, error = rng.standard_normal((2, *x0.shape))
    x_t = np.float32(reference.diffuse(c, x0, eps, times))
    exact_eps = x_t - reference.at(c.sqrt_alpha_bar, times, x0) * np.float64(x0)
    exact_eps /= reference.at(c.sqrt_one_minus_alpha_bar, times, x0)
    exact = reference.target(
        c, process.prediction, np.float64(x0), exact_eps, np.float64(x_t), times
    )
    unit = np.exp(0.5 * c.log_posterior_variance) if process.prediction == "mu" else np.ones(1001)
    output = exact + 0.1 * reference.at(unit, times, x0) * error
    if process.variance == "learned":
        output = np.concatenate([output, reference.at(c.log_beta, times, x0) + 0 * x0], axis=-1)
    if process.variance == "learned_range":
        output = np.concatenate([output, rng.uniform(-1, 1, x0.shape)], axis=-1)
    return c, times, x0, x_t, np.float32(output)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_term_keeps_three_digits_in_float32_e7(prediction, variance, name):
    """Against float64 that takes the same float32 output, x_0 and x_t as exact, at every t."""
    process = Process(getattr(schedules, name)(), prediction, variance)
    c, times, x0, x_t, output = guesses(name, process)
    expected = reference.vlb_term(c, process, output, x0, x_t, times)
    got = vlb_term(process, output, x0, x_t, times, clip=False)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_evaluation_clips_x0_unless_told_otherwise_s2_e10(prediction):
    process = Process(schedules.linear(), prediction, "fixed_small")
    c, times, x0, x_t, output = guesses("linear", process)
    expected = reference.vlb_term(c, process, output, x0, x_t, times, clip=True)
    got = jax.jit(likelihood.vlb_term)(process, output, x0, x_t, times)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    unclipped = reference.vlb_term(c, process, output, x0, x_t, times, clip=False)
    matters = (np.abs(unclipped - expected) > 0.1 * expected).mean()
    assert matters == 0 if prediction == "mu" else matters > 0.05


@pytest.mark.parametrize("kept", [None, (2, 9, 10, 20)], ids=["all", "respaced"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_bound_has_one_column_a_term_e16(kept, clip):
    """Column k is L_k; errors have column t. A recording denoiser says at which x_t."""
    schedule, c = schedules.linear(20, 1e-3, 0.3), reference.derive(np.linspace(1e-3, 0.3, 20))
    if kept:
        c = reference.derive(np.linspace(1e-3, 0.3, 20), kept)
        schedule = schedules.respace(schedule, kept)
    process = Process(schedule, "eps", "fixed_large")
    x0 = np.float32(np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1)) / 127.5 - 1)
    network = lambda x, t: jnp.sin(3 * x) + t[:, None, None, None] / 40  # noqa: E731
    recorded, calls = reference.recording(network)
    key = keys.example_keys(0, "bound", 0, jnp.arange(3))
    choice = {} if clip else {"clip": False}  # Clipped unless told otherwise.
    bound = likelihood.vlb_terms(process, recorded, x0, key, **choice)
    jax.effects_barrier()
    steps = schedule.num_steps
    assert len(calls) == steps
    for array in bound:
        assert array.shape == (3, steps + 1)
        assert array.dtype == jnp.float32
    np.testing.assert_allclose(bound.terms[:, steps], reference.prior_term(c, x0), rtol=1e-5)
    np.testing.assert_array_equal(bound.x0_mse[:, 0], 0)
    np.testing.assert_array_equal(bound.eps_mse[:, 0], 0)
    noises = []
    for index, (times, x_t) in enumerate(calls, start=1):
        np.testing.assert_array_equal(times, kept[index - 1] if kept else index)
        t = np.full(3, index)
        output = np.float64(network(jnp.float32(x_t), times))
        term = reference.vlb_term(c, process, output, x0, x_t, t, clip)
        np.testing.assert_allclose(bound.terms[:, index - 1], term, rtol=1e-3)
        root, rest = c.sqrt_alpha_bar[index], c.sqrt_one_minus_alpha_bar[index]
        noises.append((x_t - root * x0) / rest)
        x0_hat = reference.model(c, "eps", output, x_t, t, clip)[1]
        errors = x0_hat - x0, (x_t - root * x0_hat) / rest - noises[-1]
        for got, error in zip((bound.x0_mse, bound.eps_mse), errors, strict=True):
            expected = (error**2).reshape(3, -1).mean(axis=1)
            np.testing.assert_allclose(got[:, index], expected, rtol=1e-3)
    # Each term has noise of its own, and each image.
    noises = np.array(noises).reshape(-1, 4)
    assert np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() < 0.9999
    assert stats.kstest(noises.ravel(), "norm").pvalue > 1e-3


def exact_gaussian_denoiser(prediction, c, mean, variance):
    """float32 network that returns what is exact for data N(mean, variance): affine in x_t."""
    t = np.arange(len(c.beta))
    ends = []
    for x_t in (np.zeros(len(t)), np.ones(len(t))):
        x0_hat, _ = reference.denoise_gaussian(c, mean, variance, t, x_t)
        rest = np.maximum(np.sqrt(c.one_minus_alpha_bar), 1e-9)
        eps = (x_t - np.sqrt(c.alpha_bar) * x0_hat) / rest
        ends.append(reference.target(c, prediction, x0_hat, eps, x_t, t))
    offset, slope = jnp.float32(ends[0]), jnp.float32(ends[1] - ends[0])
    return lambda x, t: slope[t][:, None] * x + offset[t][:, None]


@pytest.mark.parametrize(
    "prediction, variance",
    [("eps", "fixed_large"), *((prediction, "fixed_small") for prediction in PREDICTIONS)],
)
def test_the_bound_of_gaussian_data_is_its_closed_form(prediction, variance):
    """E L_{t−1} = KL with E‖x_0 − x̂_0‖² = Var[x_0|x_t] in place of the square.

    The square of n = 200,000 Gaussian numbers has a mean of standard error √(2/n) = 0.32 %; the
    test allows 4.5 of them, and a fifth of that for the prior's.
    """
    steps, mean, spread, count = 12, 0.3, 0.25, 200_000
    betas = np.linspace(0.02, 0.4, steps)
    c, process = reference.derive(betas), Process(schedules.from_betas(betas), prediction, variance)
    x0 = np.float32(mean + np.sqrt(spread) * np.random.default_rng(0).standard_normal((400, 500)))
    denoiser = exact_gaussian_denoiser(prediction, c, mean, spread)
    key = keys.example_keys(3, "bound", 0, jnp.arange(400))
    bound = vlb_terms(process, denoiser, x0, key, clip=False)
    terms = np.float64(bound.terms).mean(axis=0)
    t = np.arange(2, steps + 1)
    unexplained = reference.denoise_gaussian(c, mean, spread, t, np.zeros(steps - 1))[1]
    sigma2 = (c.beta if variance == "fixed_large" else c.posterior_variance)[t]
    d = np.log(c.posterior_variance[t] / sigma2)
    square = c.posterior_mean_x0[t] ** 2 * unexplained / sigma2
    expected = 0.5 * (np.expm1(d) - d + square) / np.log(2)
    error = 0.5 * square / np.log(2) * np.sqrt(2 / count)
    assert np.abs((terms[1:steps] - expected) / error).max() < 4.5
    np.testing.assert_allclose(
        np.float64(bound.x0_mse).mean(axis=0)[2:], unexplained, rtol=4.5 * np.sqrt(2 / count)
    )
    d, a = np.log1p(-c.alpha_bar[-1]), c.alpha_bar[-1]
    prior = 0.5 * (np.expm1(d) - d + a * (mean**2 + spread)) / np.log(2)
    assert terms[steps] == pytest.approx(prior, rel=0.01)


def test_the_bound_exceeds_the_exact_negative_log_likelihood():
    """One pixel, two steps: −log p_θ(x_0) by integration over x_1 and x_2, for all 256 values.

    The bound is the mean of 4,000 draws and may fall below by 4 of its standard errors.
    """
    betas, count = [0.3, 0.6], 4000
    c, process = reference.derive(betas), Process(schedules.from_betas(betas), "x0", "fixed_small")
    sigma = c.posterior_variance[2] ** 0.5  # At t = 2, and at t = 1 as well.
    network = lambda x, t: jnp.tanh(x)  # noqa: E731
    x, step = np.linspace(-8, 8, 1001, retstep=True)
    mean1, mean2 = (reference.model(c, "x0", np.tanh(x), x, np.full(len(x), t))[0] for t in (1, 2))
    p1 = stats.norm.pdf(x[:, None], mean2, sigma) @ stats.norm.pdf(x) * step
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    bins = np.diff(stats.norm.cdf(edges[:, None], mean1, sigma), axis=0)
    exact = -np.log2(bins @ p1 * step)
    assert np.exp2(-exact).sum() == pytest.approx(1, abs=1e-6)

    x0 = np.float32(np.repeat(LEVELS[::5], count)).reshape(-1, 1)
    key = keys.example_keys(1, "bound", 0, jnp.arange(len(x0)))
    bound = np.float64(vlb_terms(process, network, x0, key, clip=False).terms.sum(axis=1))
    bound = bound.reshape(-1, count)
    gap = bound.mean(axis=1) - exact[::5]
    error = bound.std(axis=1) / np.sqrt(count)
    assert (gap > -4 * error).all()
    assert 0.1 < gap.mean() < 0.6


def test_the_bound_of_a_few_points_is_their_entropy_and_little_more():
    """Four equally likely 8-bit images cost 2 bits; an exact network in 200 steps is near that."""
    steps = 200
    betas = np.geomspace(1e-6, 0.2, steps)
    c = reference.derive(betas)
    points = LEVELS[[[20, 200], [230, 250], [120, 30], [60, 90]]]
    process = Process(schedules.from_betas(betas), "x0", "fixed_small")
    x0 = np.float32(np.repeat(points, 500, axis=0))
    key = keys.example_keys(2, "bound", 0, jnp.arange(len(x0)))
    bound = vlb_terms(process, reference.points_denoiser(c, points), x0, key)
    total = np.float64(2 * bound.terms.sum(axis=1))
    error = total.std() / np.sqrt(len(total))
    assert error < 0.05
    assert 2 - 4 * error < total.mean() < 2.15
    np.testing.assert_allclose(bound.terms[:, 0], 0, atol=1e-3)


@pytest.mark.parametrize("t", [0, 1001])
def test_times_outside_the_chain_are_refused_e27(t):
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="t must"):
        likelihood.vlb_term(Process(schedules.linear()), x, x, x, jnp.array([t]))
