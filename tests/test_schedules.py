"""Schedules against 50 digits of mpmath."""

from fractions import Fraction

import jax
import numpy as np
import pytest
import reference

from ddpm_jax import schedules

# The cast to float32 alone costs 5.96e-8.
TOLERANCE = 6e-8
DERIVED = [
    "beta",
    "alpha",
    "alpha_bar",
    "one_minus_alpha_bar",
    "sqrt_alpha_bar",
    "sqrt_one_minus_alpha_bar",
    "log_one_minus_alpha_bar",
    "posterior_mean_x0",
    "posterior_mean_xt",
    "posterior_mean_xt_minus_1",
    "posterior_variance",
    "log_beta",
    "log_posterior_variance",
]
KEPT = {
    "one": (1000,),
    "seven": (1, 168, 334, 500, 667, 834, 1000),
    "early": (1, 2, 3, 4, 700),
    "late": (400, 401, 900, 999, 1000),
    "all_but_one": tuple(t for t in range(1, 1001) if t != 500),
}


def float64(field):
    return np.asarray(field, dtype=np.float64)


def assert_equal_fields(schedule, expected, tolerance):
    for name in DERIVED:
        field = getattr(schedule, name)
        assert field.dtype == np.float32, name
        assert field.shape == expected.beta.shape, name
        np.testing.assert_allclose(
            float64(field)[1:], getattr(expected, name)[1:], rtol=tolerance, atol=0, err_msg=name
        )


@pytest.mark.parametrize("num_steps", [10, 100, 1000, 4000])
@pytest.mark.parametrize("name", reference.SCHEDULES)
def test_every_field_equals_mpmath_to_float32_rounding_e4_e11(name, num_steps):
    schedule = getattr(schedules, name)(num_steps)
    assert_equal_fields(schedule, reference.chain(name, num_steps), TOLERANCE)
    np.testing.assert_array_equal(schedule.mu_scale, 1)
    np.testing.assert_array_equal(schedule.mu_shift, 0)


@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_any_betas_equal_mpmath(num_steps):
    betas = 10 ** np.random.default_rng(0).uniform(-6, -0.05, num_steps)
    assert_equal_fields(schedules.from_betas(betas), reference.derive(betas), TOLERANCE)


def test_alpha_bar_equals_exact_fractions():
    betas = [Fraction(1, 7), Fraction(1, 1000), Fraction(2, 3), Fraction(1, 50)]
    schedule = schedules.from_betas([float(b) for b in betas])
    alpha_bar = Fraction(1)
    for t, beta in enumerate(betas, start=1):
        before, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        assert float(schedule.alpha_bar[t]) == pytest.approx(float(alpha_bar), rel=1e-7)
        variance = float(beta * (1 - before) / (1 - alpha_bar))
        assert float(schedule.posterior_variance[t]) == pytest.approx(variance, rel=1e-7)


@pytest.mark.parametrize("name", reference.SCHEDULES)
def test_arrays_are_indexed_by_the_paper_s_t_e32(name):
    schedule = schedules.SCHEDULES[name](100)
    assert schedule.num_steps == 100
    assert schedule.alpha_bar[0] == 1
    assert schedule.one_minus_alpha_bar[0] == 0
    assert schedule.beta[0] == 0
    assert schedule.posterior_variance[1] == 0
    assert schedule.posterior_mean_x0[1] == 1
    np.testing.assert_array_equal(schedule.timesteps, np.arange(101))
    assert schedule.timesteps.dtype == np.int32
    for leaf in jax.tree.leaves(schedule):
        assert leaf.shape == (101,)
        assert np.isfinite(leaf).all()


def test_the_paper_s_schedule_has_its_known_values_s1():
    schedule = schedules.linear()
    assert schedule.num_steps == 1000
    assert float(schedule.beta[1]) == pytest.approx(1e-4)
    assert float(schedule.beta[1000]) == pytest.approx(0.02)
    assert float(schedule.alpha_bar[1000]) == pytest.approx(4.036e-5, rel=1e-3)
    first = np.exp(float64(schedule.log_posterior_variance)[1])
    assert first / 1e-4 == pytest.approx(0.5453, abs=5e-5)
    assert first == pytest.approx(float(schedule.posterior_variance[2]), rel=1e-6)


@pytest.mark.parametrize(
    "betas",
    [[0.0, 0.1], [0.1, 1.0], [-0.1], [1.5], [np.nan], [0.1, np.inf], [], [[0.1, 0.2]], 0.1],
    ids=str,
)
def test_betas_outside_the_open_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match=r"beta"):
        schedules.from_betas(betas)


@pytest.mark.parametrize("name", ["linear", "quadratic", "constant"])
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="at least one"):
        getattr(schedules, name)(0)


def test_linear_betas_scaled_by_1000_over_t_are_refused_with_the_reason_e38():
    with pytest.raises(ValueError, match=r"t = 6 of 10 is 1\.1\d+; .* needs a lower beta_end"):
        schedules.linear(10, beta_start=0.01, beta_end=2.0)


def test_alpha_bar_that_does_not_fall_is_refused():
    with pytest.raises(ValueError, match="must fall"):
        schedules.from_betas([0.1, 1e-30, 0.1])


def test_alpha_bar_below_float32_is_refused():
    with pytest.raises(ValueError, match="smallest float32"):
        schedules.constant(10000)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_respaced_chain_equals_mpmath_e13(name, kept):
    """β' comes from ratios of ᾱ, and β̃'_2 at the first step is the short chain's own."""
    schedule = schedules.respace(getattr(schedules, name)(1000), kept)
    assert_equal_fields(schedule, reference.chain(name, 1000, kept), 1e-6)
    np.testing.assert_array_equal(schedule.timesteps, (0, *kept))
    assert schedule.alpha_bar[0] == 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("twice", [False, True])
def test_an_exact_mean_of_the_trained_chain_becomes_that_of_the_short_one(name, kept, twice):
    schedule = getattr(schedules, name)(1000)
    if twice:
        between = sorted({*kept, 2, 300, 450, 998})
        schedule = schedules.respace(schedule, between)
        schedule = schedules.respace(schedule, [1 + between.index(t) for t in kept])
    else:
        schedule = schedules.respace(schedule, kept)
    full, short = reference.chain(name, 1000), reference.chain(name, 1000, kept)
    t = np.asarray(kept)
    for x0, x_t in ((0.3, 1.7), (-1.0, 0.2), (1.0, -2.5)):
        trained = full.posterior_mean_x0[t] * x0 + full.posterior_mean_xt[t] * x_t
        expected = short.posterior_mean_x0[1:] * x0 + short.posterior_mean_xt[1:] * x_t
        got = float64(schedule.mu_scale)[1:] * trained + float64(schedule.mu_shift)[1:] * x_t
        error = np.abs(got - expected) / short.mu_scale[1:]
        assert error.max() < 1e-6


def test_respacing_twice_equals_respacing_once():
    first = [1, 5, 10, 300, 301, 777, 1000]
    twice = schedules.respace(schedules.respace(schedules.linear(), first), [2, 4, 7])
    assert_equal_fields(twice, reference.chain("linear", 1000, (5, 300, 1000)), 1e-6)
    np.testing.assert_array_equal(twice.timesteps, [0, 5, 300, 1000])


def test_keeping_every_time_changes_nothing():
    schedule = schedules.linear(20)
    jax.tree.map(
        np.testing.assert_array_equal, schedules.respace(schedule, np.arange(1, 21)), schedule
    )


@pytest.mark.parametrize(
    "kept", [[], [0, 5], [5, 5], [7, 3], [3, 21], [-1, 3], [1.0, 2.0], [[1, 2]], 3], ids=str
)
def test_times_that_do_not_increase_within_1_to_t_are_refused(kept):
    with pytest.raises(ValueError, match="timesteps must"):
        schedules.respace(schedules.linear(20), kept)


def test_spaced_times_visit_both_ends_and_increase_e14():
    for num_steps in (*range(1, 40), 1000):
        for count in range(1, num_steps + 1) if num_steps < 40 else (1, 2, 7, 50, 300, 999, 1000):
            times = schedules.spaced(num_steps, count)
            assert times.shape == (count,)
            assert times[-1] == num_steps
            assert count == 1 or times[0] == 1
            gaps = np.diff(times)
            assert (gaps >= 1).all()
            assert count == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("count", [0, -1, 21])
def test_more_or_fewer_times_than_there_are_are_refused(count):
    with pytest.raises(ValueError, match="cannot choose"):
        schedules.spaced(20, count)


def test_a_schedule_passes_through_jit():
    schedule = schedules.linear(5)
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(schedule)
    assert isinstance(doubled, schedules.Schedule)
    np.testing.assert_array_equal(doubled.beta, 2 * schedule.beta)
