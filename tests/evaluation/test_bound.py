"""The bound over a set: each image once, any batch, unbiased parts, honest errors; oracles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ddpm_jax import keys, likelihood, oracles, schedules
from ddpm_jax.data import to_float
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import bound
from ddpm_jax.interruption import Interrupted
from ddpm_jax.training.metrics import NonFiniteError

T = 12
PROCESS = Process(schedules.linear(T, 1e-3, 0.4), "eps", "fixed_small")
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 1), dtype=np.uint8)


def network(x_t, t):
    """Wrong, and wrong in another way at each t."""
    return 0.9 * x_t + 0.02 * t[:, None, None, None]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def by_hand():
    """The terms of each image alone, from `likelihood.vlb_terms`: [7, T+1] each."""
    one = jax.jit(lambda x0, k: likelihood.vlb_terms(PROCESS, network, x0, k))
    rows = [
        one(to_float(IMAGES[k : k + 1]), keys.example_keys(5, "bound", 0, jnp.array([k])))
        for k in range(len(IMAGES))
    ]
    return [np.concatenate([np.asarray(row[i], np.float64) for row in rows]) for i in range(3)]


def measured(batch=3, **arguments):
    return bound.bits_per_dim(PROCESS, network, IMAGES, seed=5, batch=batch, say=quiet, **arguments)


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_each_image_counts_once_in_batches_of_any_size(by_hand, batch):
    terms, x0_mse, eps_mse = by_hand
    got = measured(batch)
    close = dict(rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(got.total[:, 0], terms.sum(axis=1), **close)
    np.testing.assert_allclose(got.decoder[:, 0], terms[:, 0], **close)
    np.testing.assert_allclose(got.prior, terms[:, T], **close)
    np.testing.assert_allclose(got.x0_mse_1[:, 0], x0_mse[:, 1], **close)
    for name, values in (("terms", terms), ("x0_mse", x0_mse), ("eps_mse", eps_mse)):
        np.testing.assert_allclose(getattr(got, name), values.mean(axis=0), **close)
        error = values.std(axis=0, ddof=1) / np.sqrt(7)
        np.testing.assert_allclose(getattr(got, f"{name}_error"), error, rtol=2e-3, atol=1e-7)
    rate = terms[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(got.rate, rate.mean(axis=0), **close)
    np.testing.assert_allclose(
        got.rate_error, rate.std(axis=0, ddof=1) / np.sqrt(7), rtol=2e-3, atol=1e-7
    )


def test_the_summary_is_the_paper_s_rate_and_distortion(by_hand):
    terms, x0_mse, _ = by_hand
    summary = measured().summary()
    each = {
        "bits_per_dim": terms.sum(axis=1),
        "rate": terms[:, 1:].sum(axis=1),
        "distortion": terms[:, 0],
        "prior": terms[:, T],
    }
    for name, values in each.items():
        expected = values.mean(), values.std(ddof=1) / np.sqrt(7)
        np.testing.assert_allclose(summary[name], expected, rtol=1e-4)
    # On 0–255 a difference of x is 127.5 times as large.
    squares = x0_mse[:, 1] * 127.5**2
    root = np.sqrt(squares.mean())
    slope = (np.sqrt(squares.mean() + 1e-3) - np.sqrt(squares.mean() - 1e-3)) / 2e-3
    expected = root, slope * squares.std(ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(summary["rmse"], expected, rtol=1e-4)


@pytest.mark.parametrize(("num_steps", "count"), [(1000, 50), (1000, 2), (12, 5), (12, 12), (3, 2)])
def test_every_time_belongs_to_one_part_with_its_weight(num_steps, count):
    edges, weight = bound.strata(num_steps, count), bound.weights(num_steps, count)
    assert len(weight) == count and weight[0] == 1
    # Whatever the term's values: Σ over parts of width × mean is their sum.
    values = np.random.default_rng(1).normal(size=num_steps + 1)
    means = [values[a:b].mean() for a, b in itertools.pairwise(edges)]
    assert edges[0] == 2 and edges[-1] == num_steps + 1
    np.testing.assert_allclose(weight[1:] @ means, values[2:].sum(), atol=1e-10)


def test_times_are_drawn_evenly_from_each_part():
    draws = 20_000
    several = jax.jit(jax.vmap(lambda key: bound.chosen_times(key, 40, 5)))
    times = np.asarray(several(jax.random.split(jax.random.key(3), draws)))
    assert (times[:, 0] == 1).all()
    edges = bound.strata(40, 5)
    for part in range(4):
        width = edges[part + 1] - edges[part]
        counts = np.bincount(times[:, part + 1], minlength=42)[edges[part] : edges[part + 1]]
        assert counts.sum() == draws
        assert (np.abs(counts / draws - 1 / width) < 5 / np.sqrt(draws * width)).all()


def test_a_part_of_the_terms_are_terms_of_the_whole_and_unbiased(by_hand):
    terms, _, _ = by_hand
    whole = measured(draws=300).total.mean(axis=1)
    part = measured(terms=5, draws=300)
    error = part.total.std(axis=1, ddof=1) / np.sqrt(300)
    assert (np.abs(part.total.mean(axis=1) - whole) < 5 * error).all()
    np.testing.assert_allclose(part.decoder[:, 0], terms[:, 0], rtol=2e-5)
    assert (error > 0).all()


def test_times_that_nobody_drew_are_told_from_zeros():
    got = bound.bits_per_dim(PROCESS, network, IMAGES[:1], seed=5, terms=3, say=quiet)
    assert np.isnan(got.terms[1:T]).sum() == T - 3 and np.isfinite(got.total).all()
    assert np.isfinite(got.rate).all()


def test_the_rate_of_a_part_of_the_terms_is_unbiased():
    # Every choice of times once, each as likely as the others: their mean is the expectation.
    edges, values = bound.strata(T, 4), np.random.default_rng(3).normal(size=T + 1)
    parts = [range(a, b) for a, b in itertools.pairwise(edges)]
    drawn = []
    for others in itertools.product(*parts):
        times = np.array([[1, *others]])
        drawn.append(bound.Terms(times, values[times], times * 0.1, times * 0.2, np.array([0.7])))
    assert len(drawn) > 10
    found = bound._piece(drawn, bound.weights(T, 4), T)
    terms = np.append(values[1:], 0.7)  # L_0 … L_T.
    np.testing.assert_allclose(found["rate_sum"][0], terms[::-1].cumsum()[::-1], atol=1e-12)
    np.testing.assert_allclose(found["total"].mean(), terms.sum(), atol=1e-12)
    np.testing.assert_allclose(found["terms_sum"][0], terms, atol=1e-12)
    np.testing.assert_allclose(found["x0_mse_sum"][0], np.arange(T + 1) * 0.1, atol=1e-12)


def test_as_many_terms_as_there_are_is_all_of_them_and_one_is_too_few():
    np.testing.assert_array_equal(measured(terms=50).total, measured().total)
    for terms in (1, -1):
        with pytest.raises(ValueError, match="choose 2 or more"):
            measured(terms=terms)


def test_the_errors_are_the_spread_over_draws_and_over_images():
    draws = measured(draws=400)
    per_draw = draws.total.mean(axis=0)
    # One draw's mean over the images scatters with the noise's part of the error alone.
    single = np.sqrt(draws.total.var(axis=1, ddof=1).sum()) / len(IMAGES)
    assert np.std(per_draw, ddof=1) == pytest.approx(single, rel=0.15)
    assert draws.noise_error() == pytest.approx(single / np.sqrt(400), rel=1e-9)
    assert measured().noise_error() is None
    first, second = measured(draws=2).total.T
    np.testing.assert_array_equal(first, draws.total[:, 0])
    assert np.abs(first - second).min() > 0


def test_interrupted_it_goes_on_to_the_bit(tmp_path):
    compute = bound.compile_terms(bound.make_layout("jit"), PROCESS, lambda p, x, t: network(x, t))
    kept = {"directory": epath.Path(tmp_path / "parts"), "protocol": {"a": 1}}
    arguments = (compute, None, IMAGES.__getitem__, np.arange(7), 3, T, 0, 1, quiet)
    whole = bound.measure(*arguments)
    answers = iter([False, True])
    with pytest.raises(Interrupted, match="3 of 7 images are in"):
        bound.measure(*arguments, stop=lambda: next(answers), **kept)
    calls = []

    def counting(*args):
        calls.append(args[2].tolist())
        return compute(*args)

    again = bound.measure(counting, *arguments[1:], **kept)
    assert calls == [[3, 4, 5], [6, 6, 6]]
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_points_whose_bound_is_known(clip, variance):
    pixels = np.array([40, 90, 200], np.uint8)
    points = oracles.Points(np.asarray(to_float(pixels), np.float64).reshape(3, 1, 1, 1))
    process = Process(schedules.linear(20, 1e-3, 0.3), "v", variance)
    exact = oracles.bound(points, process, clip)
    images = np.tile(pixels, 1500).reshape(-1, 1, 1, 1)
    got = bound.bits_per_dim(
        process, oracles.denoiser(points, process), images, clip=clip, batch=4500, say=quiet
    )
    value, error = got.summary()["bits_per_dim"]
    assert abs(value - exact.sum()) < 4 * got.total.std() / np.sqrt(len(images))
    assert error > 0
    z = (got.terms - exact)[:-1] / np.maximum(got.terms_error[:-1], 1e-6)
    assert np.abs(z).max() < 4.5
    # −log2 of the points' true probability, 1/3, is below any bound.
    assert value > np.log2(3) - 1e-3


def test_a_strided_chain_is_measured_as_such():
    from ddpm_jax.sampling import shorten

    short = shorten(PROCESS, 4)
    got = bound.bits_per_dim(short, network, IMAGES, seed=5, say=quiet)
    noise_keys = keys.example_keys(5, "bound", 0, jnp.arange(7))
    direct = jax.jit(lambda: likelihood.vlb_terms(short, network, to_float(IMAGES), noise_keys))()
    np.testing.assert_allclose(got.terms, direct.terms.mean(axis=0), rtol=2e-5)
    assert got.terms.shape == (5,)


def test_a_bound_that_is_no_number_is_refused():
    def broken(x_t, t):
        return x_t * jnp.where(x_t[:, :1, :1] > 0, 1.0, jnp.nan)

    with pytest.raises(NonFiniteError, match=r"of 3 images is not finite, first of number \d"):
        bound.bits_per_dim(PROCESS, broken, IMAGES, batch=3, say=quiet)


def test_images_that_are_none_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        bound.bits_per_dim(PROCESS, network, IMAGES / 255)
