"""Samplers against distributions known in closed form, and against their own steps in a loop.

With Gaussian data and the exact network every step is affine in (x_t, noise). Its coefficients are
read off by calling the step at a few points, at all t together; means and variances then follow
without Monte Carlo.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import PREDICTIONS, VARIANCES
from scipy import stats

from ddpm_jax import diffusion, keys, sampling, schedules
from ddpm_jax.diffusion import Process

LINEAR = schedules.linear()
SHORT = schedules.linear(12, 1e-3, 0.5)
SHORT_EXACT = reference.derive(np.linspace(1e-3, 0.5, 12))
LENGTHS = (1, 7, 50, 1000)
ETAS = (0.0, 0.5, 1.0)
METHODS = [("ancestral", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]


def linear_chain(steps):
    """The paper's chain over `steps` times: the library's, and float64's."""
    if steps == 1000:
        return LINEAR, reference.chain("linear", 1000)
    kept = tuple(int(t) for t in np.round(np.linspace(1, 1000, steps))) if steps > 1 else (1000,)
    return schedules.respace(LINEAR, kept), reference.chain("linear", 1000, kept)


def normal_keys(count, seed=0):
    return keys.example_keys(seed, "sample", 0, jnp.arange(count))


def coefficients(c, process, mean, variance, log_variance, method, eta):
    """As `reference.reverse_step`, read off the library's step with the exact network."""
    t = np.arange(1, len(c.beta))
    step = {
        "ancestral": sampling.ancestral_step,
        "ddim": functools.partial(sampling.ddim_step, eta=eta),
    }[method]

    def call(x, noise):
        x_t = np.full((len(t), 1), x)
        x0_hat, _ = reference.denoise_gaussian(c, mean, variance, t, x_t)
        eps = x_t - reference.at(c.sqrt_alpha_bar, t, x_t) * x0_hat
        eps /= reference.at(c.sqrt_one_minus_alpha_bar, t, x_t)
        output = reference.target(c, process.prediction, x0_hat, eps, x_t, t)
        if process.learns_variance:
            output = np.concatenate([output, log_variance[1:, None]], axis=1)
        output, x_t, noise = (jnp.float32(a) for a in (output, x_t, np.full_like(x_t, noise)))
        return np.float64(step(process, output, x_t, t, noise, clip=False))[:, 0]

    offset = call(0, 0)
    slope, scale = call(1, 0) - offset, call(0, 1) - offset
    # It is affine: any other point follows.
    bound = 2e-5 + 4e-6 * c.mu_scale[1:] * (process.prediction == "mu")
    assert (np.abs(call(2, -3) - (2 * slope - 3 * scale + offset)) < bound).all()
    return [np.append(0.0, a) for a in (slope, scale, offset)]


def tolerance(c, prediction):
    """A predicted mean's rounding is multiplied on a respaced chain."""
    return 3e-5 + 1e-6 * c.mu_scale.max() * (prediction == "mu")


SIGMAS = [*(("ancestral", v, 0.0) for v in VARIANCES), *(("ddim", "fixed_small", e) for e in ETAS)]


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("method, sigma, eta", SIGMAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mean_and_variance_at_every_index_e12_e13_e27_e28(prediction, method, sigma, eta, steps):
    """From x_T ~ N(0, 1) down to 0, for data N(0.3, 0.2), on trained and strided chains."""
    schedule, c = linear_chain(steps)
    raw = np.log(c.beta + 1e-30) - 0.3 if sigma == "learned" else np.full(steps + 1, 0.2)
    log_sigma2 = reference.log_variance(c, sigma, raw, np.arange(steps + 1), np.zeros(steps + 1))
    process = Process(schedule, prediction, sigma)
    got = coefficients(c, process, 0.3, 0.2, raw, method, eta)
    expected = reference.reverse_step(c, 0.3, 0.2, np.exp(log_sigma2), method, eta)
    bound = tolerance(c, prediction)
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    got_marginals, exact = (reference.marginals(a, 0, 1) for a in (got, expected))
    np.testing.assert_allclose(got_marginals, exact, rtol=0, atol=bound)
    assert got[1][1] == 0  # No noise at the last step.


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_optimal_variance_keeps_the_forward_process_s_marginals(prediction, steps):
    """σ_t² = β̃_t + Eq. 7's share² · Var[x_0|x_t] makes p_θ(x_{t−1}|x_t) the true reverse step.

    So x at every index is distributed as q's, N(√ᾱ m, ᾱ v + 1 − ᾱ), on every subset of the times,
    and the noiseless last step gives E[x_0|x_1]: variance v − Var[x_0|x_1].
    """
    schedule, c = linear_chain(steps)
    mean, variance = -0.2, 0.4
    index = np.arange(steps + 1)
    unexplained = reference.denoise_gaussian(c, mean, variance, index, np.zeros(steps + 1))[1]
    sigma2 = c.posterior_variance + c.posterior_mean_x0**2 * unexplained
    process = Process(schedule, prediction, "learned")
    got = coefficients(c, process, mean, variance, np.log(sigma2 + 1e-30), "ancestral", 0)
    means = c.sqrt_alpha_bar * mean
    variances = c.alpha_bar * variance + c.one_minus_alpha_bar
    variances[0] -= unexplained[1]
    got = reference.marginals(got, means[-1], variances[-1])
    bound = 2 * tolerance(c, prediction)
    np.testing.assert_allclose(got, (means, variances), rtol=0, atol=bound)


def test_the_paper_s_fixed_variances_are_optimal_where_it_says():
    """§3.2: β_t for x_0 ~ N(0, I), β̃_t for one point; each keeps q's marginals there."""
    schedule, c = linear_chain(1000)
    large = coefficients(c, Process(schedule), 0, 1, None, "ancestral", 0)
    variances = reference.marginals(large, 0, 1)[1]
    # The step at t = 1 draws nothing.
    np.testing.assert_allclose(variances, [1 - 1e-4, *np.ones(1000)], atol=3e-5)
    small = Process(schedule, variance="fixed_small")
    affine = coefficients(c, small, 0.7, 0, None, "ancestral", 0)
    exact = 0.7 * c.sqrt_alpha_bar, c.one_minus_alpha_bar
    got = reference.marginals(affine, exact[0][-1], exact[1][-1])
    np.testing.assert_allclose(got, exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", LENGTHS)
def test_ddim_keeps_the_marginals_of_one_point_for_every_eta_e13_e28(steps, eta):
    """The family of Song et al. is built so that q_σ(x_s|x_0) does not depend on σ."""
    schedule, c = linear_chain(steps)
    affine = coefficients(c, Process(schedule, "x0"), -0.6, 0, None, "ddim", eta)
    exact = -0.6 * c.sqrt_alpha_bar, c.one_minus_alpha_bar
    got = reference.marginals(affine, exact[0][-1], exact[1][-1])
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", ETAS)
def test_ddim_takes_the_noise_that_belongs_to_the_clipped_x0_e15(eta):
    t, c = np.arange(1, 13), SHORT_EXACT
    x_t, noise = np.random.default_rng(0).standard_normal((2, 12, 5))
    got = sampling.ddim_step(
        Process(SHORT, "x0"), np.full((12, 5), 3.0), np.float32(x_t), t, np.float32(noise), eta
    )
    sigma2 = eta**2 * c.posterior_variance[t]
    eps = (x_t - c.sqrt_alpha_bar[t][:, None]) / c.sqrt_one_minus_alpha_bar[t][:, None]
    direction = np.sqrt(np.maximum(1 - c.alpha_bar[t - 1] - sigma2, 0))[:, None]
    expected = np.sqrt(c.alpha_bar[t - 1])[:, None] + direction * eps
    np.testing.assert_allclose(got, expected + np.sqrt(sigma2)[:, None] * noise, atol=1e-5)


POINTS = np.array([[0.6, 0.6], [0.6, -0.6], [-0.6, 0.6], [-0.6, -0.6]])[:, None, None, :]


@pytest.mark.parametrize("method, eta, steps", [("ancestral", 0, 0), *((*m, 20) for m in METHODS)])
def test_samples_of_a_few_points_land_on_them_and_on_each_alike(method, eta, steps):
    """400 samples on four points: each has 100 ± 8.7; five standard errors are allowed."""
    process = Process(schedules.linear(100, 1e-3, 0.2), "x0", "fixed_small")
    exact = reference.points_denoiser(reference.derive(np.linspace(1e-3, 0.2, 100)), POINTS)
    shape, key = (400, 1, 1, 2), normal_keys(400)
    images = sampling.sample(process, exact, shape, key, method, steps, eta)
    distance = np.abs(np.asarray(images)[:, None] - POINTS).max(axis=(2, 3, 4))
    assert distance.min(axis=1).max() < 1e-3
    count = np.bincount(distance.argmin(axis=1), minlength=4)
    assert np.abs(count - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("method, eta", METHODS[::2])
@pytest.mark.parametrize("steps", [0, 1, 5, 12])
def test_the_network_is_called_at_the_spaced_times_from_t_down_to_1_e14_e16(steps, method, eta):
    recorded, calls = reference.recording(lambda x, t: 0 * x)
    key = normal_keys(2)
    sampling.sample(Process(SHORT, "x0"), recorded, (2, 1, 1, 3), key, method, steps, eta)
    jax.effects_barrier()
    spaced = {0: range(1, 13), 1: [12], 5: [1, 4, 6, 9, 12], 12: range(1, 13)}[steps]
    expected = [[t, t] for t in reversed(spaced)]
    np.testing.assert_array_equal([t for t, _ in calls], expected)
    assert calls[0][0].dtype == np.int32
    np.testing.assert_allclose(calls[0][1], keys.normal(key, 0, (1, 1, 3)), rtol=1e-6)


@pytest.mark.parametrize("steps, start", [(12, None), (12, 8), (12, 1), (5, None), (7, 4)])
def test_each_step_ends_where_the_next_begins_e12_e13(steps, start):
    """Towards one point DDIM keeps ε: (x_t − √ᾱ_t p)/√(1−ᾱ_t), with the trained chain's ᾱ at the
    time that the network is told, is the same at each call; the last step ends on the point."""
    point, c = 0.4, SHORT_EXACT
    process = sampling.shorten(Process(SHORT, "x0"), steps)
    recorded, calls = reference.recording(lambda x, t: 0 * x + point)
    key = normal_keys(3)
    index = steps if start is None else start
    times = jnp.full(3, index)
    eps = keys.normal(key, 99, (2, 1, 1))
    x_t = diffusion.q_sample(process.schedule, jnp.full((3, 2, 1, 1), point), times, eps)
    images = sampling.reverse(process, recorded, x_t, key, start, "ddim")
    jax.effects_barrier()
    assert len(calls) == index
    assert [t[0] for t, _ in calls] == list(np.asarray(process.schedule.timesteps)[index:0:-1])
    for t, x in calls:
        got = (x - c.sqrt_alpha_bar[t[0]] * point) / c.sqrt_one_minus_alpha_bar[t[0]]
        np.testing.assert_allclose(got, eps, atol=2e-5)
    np.testing.assert_allclose(images, point, atol=1e-6)


def noise_only(x_t, t):
    """With `mu` and `learned`: mean 0 and log variance 0, so that x_{t−1} is the step's noise."""
    return jnp.concatenate([0 * x_t, 0 * x_t], axis=-1)


def recorded_noise(start, seed=0):
    recorded, calls = reference.recording(noise_only)
    key = normal_keys(4, seed)
    x_t = jnp.zeros((4, 5, 5, 2))
    images = sampling.reverse(Process(SHORT, "mu", "learned"), recorded, x_t, key, start)
    jax.effects_barrier()
    np.testing.assert_array_equal(images, 0)  # The mean, without noise.
    return {int(t[0]): x for t, x in calls[1:]}


def test_every_step_and_image_has_noise_of_its_own_e2():
    """Standard normal, uncorrelated (|r| < 5/√50), the same when the chain starts later (E12)."""
    noise = recorded_noise(12)
    rows = np.array(list(noise.values())).reshape(-1, 50)
    assert rows.shape == (44, 50)
    assert np.abs(np.corrcoef(rows) - np.eye(44)).max() < 5 / np.sqrt(50)
    assert stats.kstest(rows.ravel(), "norm").pvalue > 1e-3
    late = recorded_noise(6)
    np.testing.assert_equal(late, {t: noise[t] for t in range(1, 6)})
    assert (recorded_noise(6, seed=1)[3] != late[3]).all()


def network(x, t):
    return jnp.sin(2 * x) + t[:, None, None, None] / 20


LOOPS = [
    ("eps", "fixed_large", "ancestral", 0.0, True, 0),
    ("v", "learned_range", "ancestral", 0.0, False, 5),
    ("mu", "learned", "ancestral", 0.0, True, 5),
    ("eps", "fixed_small", "ddim", 0.0, True, 5),
    ("x0", "learned", "ddim", 0.7, False, 0),
]


@pytest.mark.parametrize("prediction, variance, method, eta, clip, steps", LOOPS)
def test_the_compiled_loop_is_a_loop_of_its_steps_e17(
    prediction, variance, method, eta, clip, steps
):
    """Also the path of x̂_0, in the order asked for."""
    process = Process(SHORT, prediction, variance)
    key, shape, x0_at = normal_keys(3), (3, 2, 2, 2), (4, 1, 5, 2)

    def denoiser(x, t):
        parts = [network(x, t), 0.1 * x - 1]
        return jnp.concatenate(parts, axis=-1) if process.learns_variance else parts[0]

    got = sampling.sample(process, denoiser, shape, key, method, steps, eta, clip, x0_at)
    short = sampling.shorten(process, steps) if steps else process
    x, path = keys.normal(key, 0, (2, 2, 2)), {}
    for index in range(short.schedule.num_steps, 0, -1):
        t = jnp.full(3, index)
        output = denoiser(x, short.schedule.timesteps[t])
        noise = keys.normal(key, index, (2, 2, 2))
        path[index] = diffusion.p_distribution(short, output, x, t, clip)[1]
        if method == "ancestral":
            x = sampling.ancestral_step(short, output, x, t, noise, clip)
        else:
            x = sampling.ddim_step(short, output, x, t, noise, eta, clip)
    assert got.images.dtype == got.x0_path.dtype == jnp.float32
    np.testing.assert_allclose(got.images, x, rtol=1e-4, atol=1e-4)
    expected = np.stack([path[index] for index in x0_at])
    np.testing.assert_allclose(got.x0_path, expected, rtol=1e-4, atol=1e-4)
    if prediction != "mu":
        assert (np.abs(got.x0_path).max() <= 1) == clip


def test_the_path_holds_every_index_asked_for_even_twice():
    got = sampling.sample(Process(SHORT), network, (2, 2, 2, 1), normal_keys(2), x0_at=(3, 7, 3))
    np.testing.assert_array_equal(got.x0_path[0], got.x0_path[2])
    assert (got.x0_path != 0).all()


@pytest.mark.parametrize("method, eta", METHODS[::2])
def test_an_image_is_the_same_alone_and_among_others_e27(method, eta):
    key = normal_keys(7)

    @jax.jit
    def draw(key):
        return sampling.sample(Process(SHORT), network, (2, 2, 3), key, method, 0, eta)

    seven = draw(key)
    assert seven.shape == (7, 2, 2, 3)
    for k in (0, 3, 6):
        np.testing.assert_array_equal(draw(key[k : k + 1])[0], seven[k])
    assert len(np.unique(np.asarray(seven).reshape(7, -1), axis=0)) == 7


def test_a_single_key_is_folded_with_each_image_s_place():
    process, key = Process(SHORT), jax.random.key(5)
    one = sampling.sample(process, network, (3, 2, 2, 1), key)
    folded = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(3))
    np.testing.assert_array_equal(one, sampling.sample(process, network, (3, 2, 2, 1), folded))
    alone = sampling.sample(process, network, (2, 2, 1), key)
    np.testing.assert_array_equal(alone, one[:1])


def test_a_bfloat16_network_is_sampled_in_float32_e3():
    half = lambda x, t: network(x, t).astype(jnp.bfloat16)  # noqa: E731
    for method in sampling.METHODS:
        images = sampling.sample(Process(SHORT), half, (2, 2, 2, 1), normal_keys(2), method)
        assert images.dtype == jnp.float32
        assert (images.astype(jnp.bfloat16) != images).any()


@pytest.mark.parametrize("share_noise", [False, True])
def test_interpolation_mixes_two_diffused_images_and_decodes_them_e12_s7(share_noise):
    """The first call sees (1−λ) x_t + λ x'_t, whose noises are the same for every λ and, unless
    shared, independent of each other; the ends decode to what each would alone."""
    c, t, key = SHORT_EXACT, 7, normal_keys(4)
    ends = np.float32(np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 1)))
    recorded, calls = reference.recording(network)
    process = Process(SHORT)
    images = sampling.interpolate(process, recorded, *ends, (0.0, 0.3, 1.0), t, key, share_noise)
    jax.effects_barrier()
    assert images.shape == (3, 4, 8, 8, 1)
    np.testing.assert_array_equal([s for s, _ in calls], [[s] * 12 for s in range(7, 0, -1)])
    first = calls[0][1].reshape(3, 4, 8, 8, 1)
    np.testing.assert_allclose(first[1], 0.7 * first[0] + 0.3 * first[2], atol=1e-6)
    noise = (first[[0, 2]] - c.sqrt_alpha_bar[t] * ends) / c.sqrt_one_minus_alpha_bar[t]
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(*noise.reshape(2, -1))[0, 1]
    assert correlation > 0.9999 if share_noise else abs(correlation) < 5 / np.sqrt(256)
    decode = jax.jit(lambda x_t: sampling.reverse(process, network, x_t, key, t))
    for k in (0, 2):
        alone = decode(jnp.float32(first[k]))
        np.testing.assert_allclose(images[k], alone, rtol=1e-4, atol=1e-4)


def test_interpolation_shares_the_reverse_steps_noise_among_fractions_s7():
    recorded, calls = reference.recording(noise_only)
    zeros = jnp.zeros((2, 3, 3, 1))
    process = Process(SHORT, "mu", "learned")
    sampling.interpolate(process, recorded, zeros, zeros + 1, (0.0, 0.5, 1.0), 5, normal_keys(2))
    jax.effects_barrier()
    diffused, *steps = (x.reshape(3, -1) for _, x in calls)
    for x in steps:
        np.testing.assert_array_equal(x, x[:1].repeat(3, axis=0))
        # Nor is it the noise that diffused the ends.
        assert np.abs(np.corrcoef(x[0], diffused[[0, 2]])[0, 1:]).max() < 0.95


def test_x0_is_clipped_unless_told_otherwise_e17():
    process, key, x = Process(SHORT, "x0"), normal_keys(2), jnp.zeros((2, 1, 1, 1))
    far, one = lambda x, t: 0 * x + 3.0, jnp.ones(2, int)
    draw = [
        lambda **clip: sampling.ancestral_step(process, x + 3, x, one, x, **clip),
        lambda **clip: sampling.ddim_step(process, x + 3, x, one, x, **clip),
        lambda **clip: sampling.sample(process, far, x.shape, key, **clip),
        lambda **clip: sampling.interpolate(process, far, x, x, (0.5,), 3, key, **clip),
    ]
    for function in draw:
        np.testing.assert_allclose(function(), 1.0, atol=1e-5)
        np.testing.assert_allclose(function(clip=False), 3.0, atol=1e-5)


BAD = {
    "unknown method": ("choose from", {"method": "euler"}),
    "keys of another batch": ("as many keys", {"keys": normal_keys(3)}),
    "too many steps": ("cannot choose", {"steps": 13}),
    "negative steps": ("cannot choose", {"steps": -1}),
    "eta beyond 1": ("eta must", {"method": "ddim", "eta": 1.5}),
    "negative eta": ("eta must", {"method": "ddim", "eta": -0.1}),
    "x0_at zero": ("x0_at must", {"x0_at": (0,)}),
    "x0_at beyond T": ("x0_at must", {"x0_at": (13,)}),
    "x0_at beyond the short chain": ("x0_at must", {"steps": 5, "x0_at": (6,)}),
}


@pytest.mark.parametrize("reason, wrong", BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_refused(reason, wrong):
    arguments = {"keys": normal_keys(2)} | wrong
    with pytest.raises(ValueError, match=reason):
        sampling.sample(Process(SHORT), lambda x, t: x, (2, 1, 1, 1), **arguments)


@pytest.mark.parametrize("t", [0, -1, 13])
def test_times_outside_the_chain_are_refused_e27(t):
    x, times, process = jnp.zeros((1, 1, 1, 2)), jnp.array([t]), Process(SHORT)
    for step in (sampling.ancestral_step, sampling.ddim_step):
        with pytest.raises(ValueError, match="t must"):
            step(process, x, x, times, x)
    with pytest.raises(ValueError, match="start must"):
        sampling.reverse(process, network, x, normal_keys(1), t)
    with pytest.raises(ValueError, match="must lie"):
        sampling.interpolate(process, network, x, x, (0.5,), t, normal_keys(1))
