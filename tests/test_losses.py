"""Objectives against NumPy, term by term; timestep samplers against counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import PREDICTIONS, VARIANCES
from scipy import stats

from ddpm_jax import losses, schedules
from ddpm_jax.diffusion import Process

LEARNED = ("learned", "learned_range")
SHAPE = (3, 2, 2)


def draw(c, times, seed=0):
    """float32 x0, ε, x_t and a network's imperfect guesses: its error, and a variance output."""
    rng = np.random.default_rng(seed)
    x0 = np.float32(rng.integers(0, 256, (len(times), *SHAPE)) / 127.5 - 1)
    eps, error = (np.float32(rng.standard_normal(x0.shape)) for _ in range(2))
    x_t = np.float32(reference.diffuse(c, x0, eps, times))
    return x0, eps, x_t, 0.3 * error, np.float32(rng.uniform(-1, 1, x0.shape))


def network(c, process, times, seed=0):
    """x0, ε, x_t and an output near the exact one, with the variance's channels if any."""
    x0, eps, x_t, error, raw = draw(c, times, seed)
    exact = reference.target(c, process.prediction, *(np.float64(a) for a in (x0, eps, x_t)), times)
    if process.prediction == "mu":
        error = error * reference.at(np.sqrt(c.posterior_variance), times, x0)
    output = np.float32(exact + error)
    if process.variance == "learned":
        raw = np.float32(reference.at(c.log_beta, times, x0) + 0.3 * raw)
    return x0, eps, x_t, np.concatenate([output, raw], -1) if process.learns_variance else output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_unweighted_error_of_what_is_predicted_e9_e31(prediction):
    """Eq. 14 to the digit for ε, ‖μ̃ − μ̃_θ‖² for μ̃; also the default."""
    times = np.array([1, 2, 50, 600, 1000])
    c, process = reference.chain("linear", 1000), Process(schedules.linear(), prediction)
    x0, eps, x_t, *_ = draw(c, times)
    output = np.random.default_rng(7).standard_normal(x0.shape).astype(np.float32)
    seen = []

    def denoiser(x, t):
        seen.append((x, t))
        return jnp.asarray(output)

    got = losses.training_loss(process, denoiser, x0, times, eps)
    exact = reference.target(c, prediction, *(np.float64(a) for a in (x0, eps, x_t)), times)
    expected = ((exact - output) ** 2).reshape(5, -1).mean(axis=1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(seen[0][0], x_t, atol=5e-7)
    np.testing.assert_array_equal(seen[0][1], times)


def test_the_network_sees_its_trained_integers_on_a_respaced_chain_e16():
    process = Process(schedules.respace(schedules.linear(), [3, 40, 1000]))
    seen = []

    def denoiser(x, t):
        seen.append(t)
        return x

    x = jnp.zeros((3, 2))
    losses.training_loss(process, denoiser, x, jnp.array([2, 3, 1]), x)
    assert seen[0].dtype == jnp.int32
    np.testing.assert_array_equal(seen[0], [40, 1000, 3])


def test_vlb_is_the_weighted_error_of_eq_12_in_bits_per_dim_s5():
    """L_{t−1} = β_t²/(2 σ_t² α_t (1−ᾱ_t)) ‖ε − ε_θ‖² + C with σ_t² = β_t; no factor T."""
    times = np.arange(2, 1001)
    c, process = reference.chain("linear", 1000), Process(schedules.linear())
    x0, eps, _, output = network(c, process, times)
    got = losses.training_loss(process, lambda x, t: output, x0, times, eps, "vlb")
    sigma2, beta_tilde = c.beta[times], c.posterior_variance[times]
    weight = c.beta[times] ** 2 / (2 * sigma2 * c.alpha[times] * c.one_minus_alpha_bar[times])
    squares = ((np.float64(eps) - output) ** 2).reshape(len(times), -1).sum(axis=1)
    constant = 0.5 * (beta_tilde / sigma2 - 1 - np.log(beta_tilde / sigma2))
    dimensions = np.prod(SHAPE)
    expected = (weight * squares + dimensions * constant) / (dimensions * np.log(2))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_t_times_the_mean_over_t_is_the_bound_less_its_prior_term_s5(prediction, variance):
    """For one image, with every t once: T · mean_t = Σ_t L_{t−1} + L_0."""
    num_steps = 100
    times = np.arange(1, num_steps + 1)
    c = reference.chain("linear", num_steps)
    process = Process(schedules.linear(num_steps), prediction, variance)
    x0 = np.broadcast_to(draw(c, times)[0][:1], (num_steps, *SHAPE))
    _, eps, _, output = network(c, process, times)
    x_t = np.float32(reference.diffuse(c, x0, eps, times))
    got = losses.training_loss(process, lambda x, t: output, x0, times, eps, "vlb")
    expected = reference.vlb_term(c, process, output, x0, x_t, times)
    assert num_steps * float(got.mean()) == pytest.approx(expected.sum(), rel=1e-4)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_losses_do_not_clip_x0_s2():
    c, process = reference.chain("linear", 1000), Process(schedules.linear(), "x0")
    times = np.array([1, 2, 500])
    x0, eps, x_t, _, _ = draw(c, times)
    output = 1.5 * x0
    got = losses.training_loss(process, lambda x, t: output, x0, times, eps, "vlb")
    expected = reference.vlb_term(c, process, output, x0, x_t, times)
    clipped = reference.vlb_term(c, process, output, x0, x_t, times, clip=True)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert (np.abs(expected - clipped) > 0.02 * clipped).all()


@pytest.mark.parametrize("num_steps", [50, 1000])
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_adds_the_bound_for_the_variance_alone_e6(prediction, variance, num_steps):
    """simple + T/1000 · L_{t−1}: the mean learns from the first part, the variance from the second.

    ∂L_{t−1}/∂log σ² = ½ (1 − (β̃_t + ‖μ̃ − μ_θ‖²)/σ²) in each dimension.
    """
    # Later the range of `learned_range` is narrower than float32 can tell.
    times = np.array([2, 3, 7, num_steps // 4, num_steps // 2])
    c = reference.chain("linear", num_steps)
    process = Process(schedules.linear(num_steps), prediction, variance)
    x0, eps, x_t, output = network(c, process, times)
    exact = [np.float64(a) for a in (x0, eps, x_t)]

    def loss(output):
        value = losses.training_loss(process, lambda x, t: output, x0, times, eps, "hybrid")
        return value.sum(), value

    gradient, value = jax.grad(loss, has_aux=True)(jnp.asarray(output))
    mean_output, raw = np.split(np.float64(output), 2, axis=-1)
    error = mean_output - reference.target(c, prediction, *exact, times)
    simple = (error**2).reshape(5, -1).mean(axis=1)
    term = reference.vlb_term(c, process, output, x0, x_t, times)
    np.testing.assert_allclose(value, simple + num_steps / 1000 * term, rtol=1e-4)

    for_mean, for_variance = np.split(np.asarray(gradient), 2, axis=-1)
    dimensions = np.prod(SHAPE)
    np.testing.assert_allclose(for_mean, 2 * error / dimensions, rtol=1e-3, atol=1e-6)
    log_sigma2 = reference.log_variance(c, variance, raw, times, exact[2])
    mean, _ = reference.model(c, prediction, mean_output, exact[2], times)
    excess = (reference.posterior_mean(c, exact[0], exact[2], times) - mean) ** 2
    excess = excess + reference.at(c.posterior_variance, times, excess)
    slope = 0.5 * (1 - excess * np.exp(-log_sigma2)) / (dimensions * np.log(2))
    if variance == "learned_range":
        slope *= reference.at(c.log_beta - c.log_posterior_variance, times, slope) / 2
    expected = num_steps / 1000 * slope
    scale = np.abs(expected).reshape(5, -1).max(axis=1).reshape(5, 1, 1, 1)
    np.testing.assert_allclose(for_variance / scale, expected / scale, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_combination_trains_or_is_refused_e7(prediction, variance, objective):
    """Value and gradient are finite at both ends of the chain, from a network that knows nothing.

    Refused are a learned variance that nothing trains and a fixed one that asks to be trained.
    """
    process = Process(schedules.linear(), prediction, variance)
    x0 = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    times, eps = jnp.array([1, 2, 1000]), jnp.ones((3, 2))

    def loss(weight):
        def denoiser(x, t):
            return jnp.concatenate([weight * x] * (1 + process.learns_variance), axis=-1)

        return losses.training_loss(process, denoiser, x0, times, eps, objective).sum()

    if objective == {True: "simple", False: "hybrid"}[process.learns_variance]:
        with pytest.raises(ValueError, match="choose"):
            loss(0.0)
        return
    for weight in (0.0, 0.5):
        value, gradient = jax.value_and_grad(loss)(weight)
        assert np.isfinite(value)
        assert np.isfinite(gradient)
        assert gradient != 0 or weight == 0


def test_an_unknown_objective_is_refused():
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="choose from"):
        losses.training_loss(
            Process(schedules.linear()), lambda x, t: x, x, jnp.array([1]), x, "elbo"
        )


@pytest.mark.parametrize("t", [0, 1001])
def test_times_outside_the_chain_are_refused_e27(t):
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="t must"):
        losses.training_loss(Process(schedules.linear()), lambda x, t: x, x, jnp.array([t]), x)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000, 1024, 4000])
def test_times_cover_exactly_1_to_t_and_each_alike(num_steps):
    largest = np.nextafter(np.float32(1), np.float32(0))
    ends = losses.timesteps(jnp.array([0.0, largest, 1.0]), num_steps)
    np.testing.assert_array_equal(ends, [1, num_steps, num_steps])
    u = (np.arange(8 * num_steps) + 0.5) / (8 * num_steps)
    times = losses.timesteps(jnp.asarray(u, jnp.float32), num_steps)
    assert times.dtype == jnp.int32
    np.testing.assert_array_equal(np.bincount(times, minlength=num_steps + 1)[1:], 8)


@pytest.mark.parametrize("name", losses.TIMESTEPS)
def test_each_time_is_drawn_equally_often(name):
    """χ² over 25 times, 40,000 draws in shuffled batches of 16; p < 0.001 would fail."""
    u = jax.random.uniform(jax.random.key(0), (2500, 16))
    position = losses.TIMESTEPS[name](u, jnp.arange(16), 16)
    times = np.asarray(losses.timesteps(position, 25))
    assert stats.chisquare(np.bincount(times.ravel(), minlength=26)[1:]).pvalue > 1e-3
    # An independent draw says nothing of the next; a stratified one leaves each part one time.
    parts = np.sort(np.asarray(position), axis=1) * 16
    one_in_each = (np.floor(parts) == np.arange(16)).all(axis=1).mean()
    assert one_in_each == (1 if name == "stratified" else 0)


def test_independent_positions_are_the_uniform_numbers_themselves():
    u = jnp.array([0.25, 0.0, 0.75])
    np.testing.assert_array_equal(losses.independent(u, jnp.arange(3), 3), u)


@pytest.mark.parametrize("batch_size", [8, 128, 1000])
def test_stratified_times_cover_every_part(batch_size):
    index = np.random.default_rng(0).permutation(batch_size)
    u = jax.random.uniform(jax.random.key(1), (batch_size,), minval=0.01, maxval=0.99)
    position = losses.stratified(u, index, batch_size)
    np.testing.assert_allclose(position, (index + np.asarray(u)) / batch_size, rtol=1e-6)
    times = np.asarray(losses.timesteps(position, 1000))
    parts = np.sort(times - 1) * batch_size / 1000
    np.testing.assert_array_less(np.abs(parts - np.arange(batch_size)), 1 + batch_size / 1000)
    if batch_size == 1000:
        np.testing.assert_array_equal(np.sort(times), np.arange(1, 1001))


def test_stratified_batches_vary_less():
    """The variance of the mean of t over a batch of 16: 1/16² of the independent draw's."""
    u = jax.random.uniform(jax.random.key(2), (2000, 16))
    spread = {
        name: np.std(np.mean(sample(u, jnp.arange(16), 16), axis=1))
        for name, sample in losses.TIMESTEPS.items()
    }
    assert spread["stratified"] / spread["independent"] == pytest.approx(1 / 16, rel=0.1)
