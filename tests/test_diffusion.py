"""q and p_θ against float64, Bayes' rule and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import PREDICTIONS, VARIANCES

from ddpm_jax import diffusion, schedules
from ddpm_jax.diffusion import Process

LINEAR = schedules.linear()
EXACT = reference.chain("linear", 1000)
TIMES = np.array([1, 2, 3, 10, 500, 999, 1000])
EVERY = np.arange(1, 1001)


def draw(times=TIMES, shape=(2, 3, 2), seed=0):
    """float32 x0, ε and x_t, as float64."""
    rng = np.random.default_rng(seed)
    x0 = rng.integers(0, 256, (len(times), *shape)) / 127.5 - 1
    x0, eps = np.float32(x0), np.float32(rng.standard_normal(x0.shape))
    x_t = np.float32(reference.diffuse(EXACT, x0, eps, times))
    return x0.astype(np.float64), eps.astype(np.float64), x_t.astype(np.float64)


def with_variance(process, prediction, raw):
    return np.concatenate([prediction, raw], axis=-1) if process.learns_variance else prediction


@functools.partial(jax.jit, static_argnames="clip")
def p_distribution(process, output, x_t, t, clip):
    return diffusion.p_distribution(process, output, x_t, t, clip)


def test_x_t_is_the_closed_form():
    times = np.array([0, *TIMES])
    x0, eps, x_t = draw(times)
    got = diffusion.q_sample(LINEAR, jnp.asarray(x0), times, jnp.asarray(eps))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x_t, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(got[0], x0[0])


def test_half_precision_inputs_keep_their_noise_in_the_first_steps_e3():
    times = np.arange(1, 12)
    x0, eps, _ = draw(times)
    x0, eps = jnp.asarray(x0, jnp.bfloat16), jnp.asarray(eps, jnp.bfloat16)
    got = diffusion.q_sample(LINEAR, x0, times, eps)
    expected = reference.diffuse(EXACT, np.asarray(x0, float), np.asarray(eps, float), times)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-7)


def test_the_posterior_is_eq_7():
    x0, _, x_t = draw(EVERY, (4,))
    got = diffusion.q_posterior(LINEAR, x0, x_t, EVERY)
    expected = reference.posterior_mean(EXACT, x0, x_t, EVERY)
    np.testing.assert_allclose(got.mean, expected, rtol=0, atol=6e-7)
    expected = EXACT.posterior_variance[EVERY]
    expected[0] = expected[1]  # β̃_1 = 0 has no logarithm.
    np.testing.assert_allclose(got.variance[:, 0], expected, rtol=2e-6)


@pytest.mark.parametrize("t", [2, 3, 10, 500, 1000])
def test_the_posterior_is_bayes_rule(t):
    """q(x_{t−1}|x_t, x_0) ∝ q(x_t|x_{t−1}) q(x_{t−1}|x_0), normalised on a grid."""
    x0, x_t = 0.4, 0.7
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    beta, before = 1 - alpha_bar[t - 1] / alpha_bar[t - 2], alpha_bar[t - 2]
    x = np.sqrt(before) * x0 + np.sqrt(1 - before) * np.linspace(-100, 100, 400_001)
    log_density = -((x_t - np.sqrt(1 - beta) * x) ** 2) / (2 * beta)
    log_density -= (x - np.sqrt(before) * x0) ** 2 / (2 * (1 - before))
    density = np.exp(log_density - log_density.max())
    mean = np.average(x, weights=density)
    variance = np.average((x - mean) ** 2, weights=density)
    got = diffusion.q_posterior(LINEAR, jnp.full((1, 1), x0), jnp.full((1, 1), x_t), jnp.array([t]))
    assert float(got.mean[0, 0]) == pytest.approx(mean, rel=2e-6)
    assert float(got.variance[0, 0]) == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p_is_the_paper_s_for_every_prediction_and_variance_e7(prediction, variance, clip):
    """For ε without clipping the mean is Eq. 11 as it stands; x̂_0 is Eq. 15."""
    process = Process(LINEAR, prediction, variance)
    x0, eps, x_t = draw()
    rng = np.random.default_rng(1)
    exact = reference.target(EXACT, prediction, x0, eps, x_t, TIMES)
    output = np.float32(exact + 0.3 * rng.standard_normal(x0.shape))
    raw = np.float32(rng.uniform(-1, 1, x0.shape))
    p, x0_hat = p_distribution(process, with_variance(process, output, raw), x_t, TIMES, clip)
    mean, expected = reference.model(EXACT, prediction, output.astype(float), x_t, TIMES, clip)
    # A unit of the output, and its rounding, moves x̂_0 by this much.
    unit = {
        "eps": np.sqrt(EXACT.one_minus_alpha_bar / EXACT.alpha_bar),
        "mu": 1 / np.maximum(EXACT.posterior_mean_x0, 1e-9),
    }.get(prediction, np.ones(1001))
    error = np.abs(x0_hat - expected) / reference.at(1 + unit, TIMES, x0)
    assert error.max() < 1e-6
    np.testing.assert_allclose(p.mean, mean, rtol=1e-6, atol=1e-6)
    log_variance = reference.log_variance(EXACT, variance, raw, TIMES, x_t)
    got = np.broadcast_to(p.log_variance, x0.shape)
    np.testing.assert_allclose(got, np.broadcast_to(log_variance, x0.shape), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("variance", VARIANCES)
def test_every_variance_is_finite_and_the_paper_s_at_every_t_e1_e2(variance):
    process = Process(LINEAR, "eps", variance)
    beta, beta_tilde = EXACT.beta[1:], EXACT.posterior_variance[1:]
    small = np.append(beta_tilde[1], beta_tilde[1:])
    expected = {
        "fixed_large": np.append(beta_tilde[1], beta[1:]),
        "fixed_small": small,
        "learned": np.full(1000, np.exp(-2.5)),
        "learned_range": np.exp(0.25 * np.log(small) + 0.75 * np.log(beta)),
    }[variance]
    raw = np.full((1000, 1), -2.5 if variance == "learned" else 0.5)
    output = with_variance(process, np.zeros((1000, 1)), raw)
    p, _ = p_distribution(process, jnp.asarray(output), jnp.zeros((1000, 1)), EVERY, False)
    np.testing.assert_allclose(p.variance[:, 0], expected, rtol=2e-6)
    deviation = np.exp(0.5 * np.asarray(p.log_variance)[:, 0])
    np.testing.assert_allclose(deviation, np.sqrt(expected), rtol=2e-6)


def test_the_first_variance_is_the_second_posterior_s_s1_s4_e8():
    """β̃_2 = 0.5453 β_1 with either fixed variance; `learned_range` spans log β̃_2 .. log β_1."""

    def first(variance, raw=0.0):
        process = Process(LINEAR, "eps", variance)
        output = jnp.asarray(with_variance(process, np.zeros((1, 1)), np.full((1, 1), raw)))
        p, _ = diffusion.p_distribution(process, output, jnp.zeros((1, 1)), jnp.array([1]))
        return float(p.variance[0, 0]) / 1e-4

    assert first("fixed_large") == pytest.approx(0.5453, abs=5e-5)
    assert first("fixed_small") == first("fixed_large")
    assert first("learned_range", -1.0) == pytest.approx(0.5453, abs=5e-5)
    assert first("learned_range", 1.0) == pytest.approx(1.0, rel=1e-5)
    assert first("learned_range", 0.0) == pytest.approx(0.5453**0.5, abs=5e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_clipping_x0_changes_the_mean_e10_e17(prediction):
    process = Process(LINEAR, prediction)
    x0, eps, _ = draw()
    x0 = np.where(x0 > 0, 3.0, 0.5 * x0)
    x_t = reference.diffuse(EXACT, x0, eps, TIMES)
    output = reference.target(EXACT, prediction, x0, eps, x_t, TIMES)
    p, x0_hat = p_distribution(process, output, x_t, TIMES, True)
    expected = reference.posterior_mean(EXACT, np.minimum(x0, 1), x_t, TIMES)
    np.testing.assert_allclose(x0_hat, np.minimum(x0, 1), atol=1e-4)
    np.testing.assert_allclose(p.mean, expected, atol=1e-6)
    free, x0_hat = p_distribution(process, output, x_t, TIMES, False)
    np.testing.assert_allclose(x0_hat, x0, atol=1e-4)
    assert np.abs(free.mean - p.mean)[x0 == 3].min() > 1e-4
    # Clipping is what `clip` does unless told otherwise.
    default, _ = diffusion.p_distribution(process, output, x_t, TIMES)
    np.testing.assert_allclose(default.mean, p.mean, atol=1e-6)


def test_a_predicted_mean_stays_itself_and_only_its_x0_is_clipped():
    output = np.float32(draw()[1]) * 3
    x_t = jnp.asarray(draw()[2])
    p, x0_hat = p_distribution(Process(LINEAR, "mu"), output, x_t, TIMES, True)
    np.testing.assert_array_equal(p.mean, output)
    assert np.abs(x0_hat).max() == 1
    _, x0_hat = p_distribution(Process(LINEAR, "mu"), output, x_t, TIMES, False)
    assert np.abs(x0_hat).max() > 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_prediction_has_its_own_target_e9(prediction):
    x0, eps, x_t = draw()
    got = diffusion.predict_target(Process(LINEAR, prediction), x0, eps, x_t, TIMES)
    assert got.dtype == jnp.float32
    expected = reference.target(EXACT, prediction, x0, eps, x_t, TIMES)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("second", PREDICTIONS)
@pytest.mark.parametrize("first", PREDICTIONS)
def test_the_target_of_one_prediction_leads_to_that_of_another_e7_e9(first, second):
    times = np.array([1, 2, 10, 100, 300])
    x0, eps, x_t = (jnp.asarray(a, jnp.float32) for a in draw(times))
    one, other = Process(LINEAR, first), Process(LINEAR, second)
    output = diffusion.predict_target(one, x0, eps, x_t, times)
    x0_hat = diffusion.predict_x0(one, output, x_t, times)
    eps_hat = diffusion.predict_eps(LINEAR, x0_hat, x_t, times)
    output = diffusion.predict_target(other, x0_hat, eps_hat, x_t, times)
    np.testing.assert_allclose(diffusion.predict_x0(other, output, x_t, times), x0, atol=1e-4)
    # Rounding of x_t alone is 1e-7 of it, and ε is seen through √(1 − ᾱ_t).
    error = np.abs(eps_hat - eps) * reference.at(EXACT.sqrt_one_minus_alpha_bar, times, x0)
    assert error.max() < (1e-4 if first == "mu" else 1e-6)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_mean_predicted_for_the_trained_chain_serves_a_shorter_one(steps):
    kept = tuple(schedules.spaced(1000, steps).tolist())
    process = Process(schedules.respace(LINEAR, kept), "mu")
    x0, _, x_t = draw(kept)
    index = np.arange(1, steps + 1)
    trained = np.float32(reference.posterior_mean(EXACT, x0, x_t, kept))
    p, _ = p_distribution(process, trained, x_t, index, False)
    short = reference.chain("linear", 1000, kept)
    # The factor multiplies the rounding of the network's output.
    error = np.abs(p.mean - reference.posterior_mean(short, x0, x_t, index))
    assert (error / reference.at(short.mu_scale, index, x0)).max() < 1e-6
    target = diffusion.predict_target(process, x0, 0 * x0, x_t, index)
    np.testing.assert_allclose(target, trained, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_chains_of_one_and_two_steps_are_finite(prediction, variance, num_steps):
    process = Process(schedules.constant(num_steps, 0.3), prediction, variance)
    times = np.arange(1, num_steps + 1)
    output = with_variance(process, np.ones((num_steps, 2)), np.zeros((num_steps, 2)))
    p, x0_hat = p_distribution(process, output, np.full((num_steps, 2), 0.5), times, False)
    for array in (p.mean, p.log_variance, x0_hat):
        assert np.isfinite(array).all()
    if num_steps == 1:
        assert not variance.startswith("fixed") or np.allclose(p.variance, 0.3)
        np.testing.assert_allclose(p.mean, x0_hat, atol=1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bfloat16_network_gives_float32_statistics_e3(prediction, variance):
    process = Process(LINEAR, prediction, variance)
    x0, eps, x_t = draw()
    output = reference.target(EXACT, prediction, x0, eps, x_t, TIMES)
    output = jnp.asarray(with_variance(process, output, 0.1 * eps), jnp.bfloat16)
    got = p_distribution(process, output, jnp.float32(x_t), TIMES, True)
    expected = p_distribution(process, output.astype(jnp.float32), jnp.float32(x_t), TIMES, True)
    for array in jax.tree.leaves(got):
        assert array.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, got, expected)


BAD_TIMES = {
    "zero": [0, 1],
    "beyond": [1, 1001],
    "negative": [-1, 1],
    "float": [1.0, 2.0],
    "short": [1],
    "long": [1, 2, 3],
    "scalar": 1,
    "matrix": [[1], [2]],
}


@pytest.mark.parametrize("t", BAD_TIMES.values(), ids=BAD_TIMES)
@pytest.mark.parametrize("function", ["q_posterior", "p_distribution", "q_sample"])
def test_times_that_are_not_in_1_to_t_are_refused_e27(function, t):
    """JAX would clamp them in silence. Only q_sample has a meaning at t = 0."""
    x, t = jnp.zeros((2, 3)), np.array(t)
    calls = {
        "q_sample": lambda: diffusion.q_sample(LINEAR, x, t, x),
        "q_posterior": lambda: diffusion.q_posterior(LINEAR, x, x, t),
        "p_distribution": lambda: diffusion.p_distribution(Process(LINEAR), x, x, t),
    }
    if function == "q_sample" and t.ravel()[0] == 0:
        return
    with pytest.raises(ValueError, match="t must"):
        calls[function]()


@pytest.mark.parametrize("variance", VARIANCES)
def test_an_output_with_wrong_channels_is_refused(variance):
    process = Process(LINEAR, "eps", variance)
    channels = 3 if process.learns_variance else 6
    with pytest.raises(ValueError, match="ask for an output"):
        diffusion.p_distribution(
            process, jnp.zeros((2, 4, channels)), jnp.zeros((2, 4, 3)), jnp.array([1, 2])
        )
    right = 6 if process.learns_variance else 3
    with pytest.raises(ValueError, match="ask for an output"):
        diffusion.p_distribution(
            process, jnp.zeros((2, 1, right)), jnp.zeros((2, 4, 3)), jnp.array([1, 2])
        )


def test_shapes_that_would_broadcast_in_silence_are_refused():
    x, row, t = jnp.zeros((2, 3)), jnp.zeros((1, 3)), jnp.array([1, 2])
    with pytest.raises(ValueError, match="shapes differ"):
        diffusion.q_sample(LINEAR, x, t, row)
    with pytest.raises(ValueError, match="shapes differ"):
        diffusion.q_posterior(LINEAR, x, row, t)
    with pytest.raises(ValueError, match="shapes differ"):
        diffusion.predict_target(Process(LINEAR), x, row, x, t)


@pytest.mark.parametrize("choice", [("noise", "fixed_large"), ("eps", "fixed")])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(ValueError, match="choose from"):
        Process(LINEAR, *choice)
