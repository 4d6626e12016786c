"""The cost of a fixed Σ: against exact optima, brute-force minima, and the run's own bound."""

import csv
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from scipy import optimize, stats
from untrained_runs import untrained

from ddpm_jax import keys, oracles, parts
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import bound
from ddpm_jax.main import main
from ddpm_jax.parallel import make_layout
from ddpm_jax.schedules import from_betas
from experiments import common, fixed_variance_cost, variance_choices
from experiments.variance_choices import Errors

BETAS = np.linspace(0.02, 0.4, 6)
T, SCHEDULE, EXACT = 6, from_betas(BETAS), reference.derive(BETAS)
FLOOR = EXACT.log_posterior_variance[1]
LARGE = EXACT.log_beta - EXACT.log_posterior_variance
ALONE = np.arange(-1, T)  # Each time is its own group.
PIXELS = np.array([[100, 255], [140, 0]], np.uint8)


def errors_of(process, network, images, terms=0, clip=True, seed=3):
    """The errors of a network that is no run's."""
    run = SimpleNamespace(
        layout=make_layout("jit"),
        params_sharding=None,
        params=(),
        apply=lambda _, x, t: network(x, t),
    )
    compute = variance_choices.compile_errors(run, process, terms, seed, clip)
    found = compute(images, np.arange(len(images)))
    doubles = {name: np.float64(x) for name, x in found.items() if name != "times"}
    return Errors(times=found["times"], weights=bound.weights(T, terms), **doubles)


def bad_network(x_t, t):
    """Far from exact, out of [−1, 1], with a variance of its own, in every prediction."""
    size = 1.7 + 0.05 * t[:, None, None, None]
    return jnp.concatenate([x_t * size, 0.3 * x_t - 0.5], axis=-1)


CASES = [
    ("eps", "fixed_large", False, 0),
    ("mu", "fixed_large", True, 4),
    ("v", "learned_range", True, 4),
]


@pytest.mark.parametrize("prediction, variance, clip, terms", CASES)
def test_under_its_own_variance_it_is_the_run_s_own_bound(prediction, variance, clip, terms):
    """Image by image and term by term, whatever is predicted and clipped, of all or some terms."""
    process = Process(SCHEDULE, prediction, variance)
    network = bad_network
    if not process.learns_variance:
        network = lambda x, t: bad_network(x, t)[..., :1]  # noqa: E731
    images = np.random.default_rng(0).integers(0, 256, (50, 2, 3, 1), dtype=np.uint8)
    expected = bound.bits_per_dim(
        process, network, images, seed=3, terms=terms, clip=clip, say=lambda _: None
    )
    errors = errors_of(process, network, images, terms, clip)
    found = variance_choices.choices(errors, process, ALONE)
    assert ("learned" in found) == process.learns_variance
    mine = found["learned" if process.learns_variance else variance]
    np.testing.assert_allclose(
        variance_choices.total(errors, mine), expected.total[:, 0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(mine.terms[:, 0], expected.decoder[:, 0], rtol=1e-5, atol=1e-6)
    for t in range(2, T + 1):
        at_t = mine.terms[errors.times == t]
        assert at_t.mean() == pytest.approx(expected.terms[t - 1], rel=1e-5)
    np.testing.assert_allclose(errors.prior, expected.prior, rtol=1e-6)
    by_name = common.over_images(variance_choices.total(errors, mine))
    assert (float(by_name), by_name.standard_error) == pytest.approx(
        expected.summary()["bits_per_dim"], rel=1e-4
    )


def test_the_exact_network_s_costs_are_the_exact_ones():
    """Points of two pixels: the best variances are the oracle's, Bao et al.'s Theorem 1, and the
    bounds with both fixed choices and the learned one its integrals. 4 standard errors."""
    data = oracles.Points((PIXELS / 127.5 - 1).reshape(2, 1, 2, 1))
    process = Process(SCHEDULE, "mu", "learned")
    images = np.tile(PIXELS, (2000, 1)).reshape(-1, 1, 2, 1)
    errors = errors_of(process, oracles.denoiser(data, process), images)
    found = variance_choices.choices(errors, process, ALONE)
    best = oracles.optimal_variance(data, SCHEDULE)[2:] / EXACT.posterior_variance[2:]
    spread = errors.excess[:, 1:].std(axis=0) / np.sqrt(len(images))
    ratio = np.exp(found["best"].log_ratio[2:])
    assert (np.abs(ratio - best) < 4 * spread + 1e-5).all() and (ratio > 1).all()
    for name in ("fixed_large", "fixed_small", "learned"):
        exact = oracles.bound(data, Process(SCHEDULE, "mu", name))
        terms = found[name].terms
        error = terms.std(axis=0) / np.sqrt(len(images))
        assert (np.abs(terms.mean(axis=0) - exact[:-1]) < 4 * error + 2e-5).all()
    # What is lost is ½ (ρ − 1 − log ρ), the KL from the best to β̃_t.
    lost = (found["fixed_small"].terms - found["best"].terms)[:, 1:]
    error = lost.std(axis=0) / np.sqrt(len(images))
    exact = (best - 1 - np.log(best)) / 2 / np.log(2)
    assert (np.abs(lost.mean(axis=0) - exact) < 4 * error).all()
    assert (error[2:] < 0.1 * exact[2:]).all()


def test_the_kl_is_that_of_two_gaussians():
    rng = np.random.default_rng(2)
    log_ratio, difference = rng.normal(size=(2, 100))
    small = np.log(0.03)
    nats = reference.gaussian_kl(difference, small, 0, small + log_ratio)
    got = variance_choices.kl(log_ratio, difference**2 / 0.03)
    np.testing.assert_allclose(got, nats / np.log(2), rtol=1e-12)


def test_the_best_variances_are_those_of_a_brute_force_search():
    """Each t alone, and times that share one: SciPy's minimum of the mean of the written-out KL;
    at t = 1 of Eq. 13's decoder, as differences of CDFs of the network's own means."""
    images = np.random.default_rng(5).integers(40, 216, (200, 2, 1, 1), dtype=np.uint8)
    process = Process(SCHEDULE, "x0", "fixed_large")
    network = lambda x_t, t: 0.97 * x_t  # noqa: E731
    errors = errors_of(process, network, images)
    shared = np.array([-1, 0, 1, 2, 2, 3, 3])
    times = np.arange(1, T + 1)
    x0 = np.float64(images)[:, None] / 127.5 - 1
    example = keys.example_keys(3, "bound", 0, jnp.arange(len(images)))
    noise = [keys.normal(example, int(t), x0.shape[2:]) for t in times]
    noise = np.stack([np.float64(n) for n in noise], axis=1)
    shape = (1, T, 1, 1, 1)
    root, rest = (a[1:].reshape(shape) for a in (EXACT.sqrt_alpha_bar, EXACT.one_minus_alpha_bar))
    x0_hat = np.clip(0.97 * (root * x0 + np.sqrt(rest) * noise), -1, 1)
    mean_x0 = EXACT.posterior_mean_x0[1:].reshape(shape)
    difference = mean_x0 * (x0 - x0_hat)

    def cost(log_ratio, group, group_of):
        total = 0.0
        for t in np.flatnonzero(group_of == group):
            if t == 1:
                sigma = np.exp((FLOOR + log_ratio) / 2)
                high, low = ((x0 - x0_hat + s / 255)[:, 0] / sigma for s in (1, -1))
                total -= np.log2(stats.norm.cdf(high) - stats.norm.cdf(low)).mean()
                continue
            small = EXACT.log_posterior_variance[t]
            nats = reference.gaussian_kl(difference[:, t - 1], small, 0, small + log_ratio)
            total += nats.mean() / np.log(2)
        return total

    for group_of in (ALONE, shared):
        choice = variance_choices.best_isotropic(errors, group_of, FLOOR)
        found = choice.log_ratio
        for group in range(group_of.max() + 1):
            least = optimize.minimize_scalar(
                cost, bounds=(-3, 8), args=(group, group_of), method="bounded",
                options={"xatol": 1e-9},
            )  # fmt: skip
            inside = np.flatnonzero(group_of == group)
            np.testing.assert_allclose(found[inside], least.x, atol=2e-4)
            reached = choice.terms[:, inside - 1].mean(axis=0).sum()
            assert reached == pytest.approx(least.fun, rel=2e-6)


def test_a_decoder_that_errs_within_its_bins_wants_next_to_no_variance_and_costs_nothing():
    sigma = np.exp(variance_choices.LOG_SIGMA2 / 2)
    inside = stats.norm.cdf(0.4 / 255 / sigma) - stats.norm.cdf(-1.6 / 255 / sigma)
    decoder = np.tile(-np.log2(inside), (3, 1))
    times = np.tile(np.arange(1, T + 1), (3, 1))
    none, nothing = times * 0, np.zeros(3)
    errors = Errors(times, np.ones(T), 0.1 * times, decoder, nothing, nothing, none, none)
    best = variance_choices.best_isotropic(errors, ALONE, FLOOR)
    assert best.log_ratio[1] + FLOOR < 2 * np.log(0.4 / 255 / 5)
    assert best.terms[:, 0] == pytest.approx(0, abs=1e-9)


def test_a_first_variance_far_below_a_bin_is_measured_as_it_is():
    """β̃_2 = 1e-10, a thousandth of a bin: L_0 of both fixed choices against Eq. 13 by hand."""
    betas = np.array([1e-10, 0.05, 0.1, 0.2, 0.3, 0.4])
    schedule, small = from_betas(betas), 1e-10 * 0.05 / (1 - (1 - 1e-10) * 0.95)
    assert np.log(small) < variance_choices.LOG_SIGMA2[0] - 5
    process = Process(schedule, "x0", "fixed_large")
    images = np.random.default_rng(8).integers(40, 216, (6, 2, 1, 1), dtype=np.uint8)
    network = lambda x_t, t: x_t + 0.0045  # noqa: E731, half a bin and some more.
    errors = errors_of(process, network, images)
    found = variance_choices.choices(errors, process, ALONE)
    example = keys.example_keys(3, "bound", 0, jnp.arange(6))
    noise = np.float64(keys.normal(example, 1, (2, 1, 1)))
    x0 = images / 127.5 - 1
    mean = np.sqrt(1 - 1e-10) * x0 + 1e-5 * noise + 0.0045
    # The bin lies far in the lower tail, where Φ(low) is nothing beside Φ(high).
    high = (x0 - mean + 1 / 255) / np.sqrt(small)
    expected = -stats.norm.logcdf(high).mean(axis=(1, 2, 3)) / np.log(2)
    assert expected.min() > 500
    for name in ("fixed_large", "fixed_small"):
        np.testing.assert_allclose(found[name].terms[:, 0], expected, rtol=1e-3)
    lost = found["fixed_small"].terms[:, 0] - found["best"].terms[:, 0]
    assert (lost > 500).all() and (found["best"].terms[:, 0] < 3).all()


def test_the_table_adds_up_and_its_errors_are_those_of_differences():
    """Images of which some are hard under every choice: the losses' errors are far smaller."""
    rng = np.random.default_rng(7)
    n, terms = 400, 3
    pick = jax.vmap(lambda key: bound.chosen_times(key, T, terms))
    times = np.asarray(pick(jax.random.split(jax.random.key(0), n)))
    hard = rng.gamma(4, 0.25, (n, 1))
    grid = np.log(np.cosh((variance_choices.LOG_SIGMA2 - FLOOR - 1) / 3)) + 10 * hard
    fixed = np.log(np.cosh(-1 / 3)) + 10 * hard[:, 0]
    none = np.zeros(times.shape)
    errors = Errors(
        times, bound.weights(T, terms), hard / times, grid, fixed, hard[:, 0], none, none
    )
    process = Process(SCHEDULE, "eps", "fixed_small")
    group_of = variance_choices.grouped(T, terms, n)
    found = variance_choices.choices(errors, process, group_of)
    *rows, whole = fixed_variance_cost.table(errors, found, group_of, np.exp(LARGE))
    assert sum(row["images"] for row in rows) == n * terms and whole["images"] == n
    assert [row["t"] for row in rows] == [1, *(r["t_last"] + 1 for r in rows[:-1])]
    for name in ("fixed_large", "fixed_small"):
        # Σ_t of the mean loss of an image's terms, each for all the times of its stratum.
        loss = np.zeros(n)
        for k, weight in enumerate(bound.weights(T, terms)):
            loss += weight * (found[name].terms[:, k] - found["best"].terms[:, k])
        assert whole[f"{name}_lost"] == pytest.approx(loss.mean())
        assert whole[f"{name}_lost_error"] == pytest.approx(loss.std(ddof=1) / np.sqrt(n))
        assert rows[-1][f"{name}_lost_cumulative"] == pytest.approx(loss.mean())
        assert whole[name] - whole["best"] == pytest.approx(loss.mean())
        assert whole[f"{name}_lost_error"] < 0.1 * whole[f"{name}_error"]
        assert 0 < rows[0][f"{name}_lost_cumulative"] == pytest.approx(rows[0][f"{name}_lost"])
    np.testing.assert_allclose(rows[0]["best_over_posterior_variance"], np.e, rtol=1e-3)
    assert rows[1]["beta_over_posterior_variance"] == pytest.approx(
        np.exp(LARGE)[rows[1]["t"] : rows[1]["t_last"] + 1].mean()
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of random parameters: with a fixed variance, and with a learned one."""
    parent = tmp_path_factory.mktemp("runs")
    untrained(parent / "run", evaluation__max_images=12)
    learned = {"diffusion__variance": "learned", "train__objective": "vlb", "seed": 1}
    untrained(parent / "other", evaluation__max_images=12, **learned)
    return parent


@pytest.fixture
def parent(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def run(parent, *flags, name="run"):
    return fixed_variance_cost.main([f"--run={parent}/{name}", *flags])


def rows_of(parent, name="run"):
    with (parent / name / "figures" / "fixed_variance_cost.csv").open() as file:
        return list(csv.DictReader(file))


def bound_of(parent, name, *flags):
    """The test split's bound by --mode=evaluate, and its error."""
    flags += "--config.evaluation.metrics=bits_per_dim", "--config.evaluation.split=test"
    assert main([f"--workdir={parent}/{name}", "--mode=evaluate", *flags]) == 0
    (path,) = (parent / name / "evaluation").glob("*bits_per_dim_test*.json")
    content = json.loads(path.read_text())
    return content["value"], content["standard_error"]


@pytest.mark.long
def test_another_run_s_learned_variance_stands_beside(parent, monkeypatch, capsys):
    """From the command line: the other run's total is what --mode=evaluate measures of it, and
    what is there is not computed again."""
    assert run(parent, f"--learned={parent}/other") == 0
    *rows, whole = rows_of(parent)
    # Of the same draws as in the first run, whose seed is another.
    value, error = bound_of(parent, "other", "--config.seed=0")
    assert float(whole["learned"]) == pytest.approx(value, rel=1e-4)
    assert float(whole["learned_error"]) == pytest.approx(error, rel=1e-3)
    assert [int(row["t"]) for row in rows] == list(range(1, 21))
    assert float(whole["fixed_large_lost"]) > 0 and float(whole["fixed_small_lost"]) > 0
    picture = parent / "run" / "figures" / "fixed_variance_cost.png"
    Image.open(picture).verify()
    notes = json.loads(picture.with_suffix(".json").read_text())["notes"]
    assert any("other (another network)" in note for note in notes)
    assert any(note.startswith("With the means of other") for note in notes)
    assert not list((parent / "other").glob("figures/fixed_variance_cost*"))
    monkeypatch.setattr(parts, "collect", None)
    capsys.readouterr()
    assert run(parent, f"--learned={parent}/other") == 0
    assert capsys.readouterr().out.count("computed before") == 2


def test_a_run_that_learned_its_variance_has_it_beside(parent):
    assert run(parent, "--terms=4", name="other") == 0
    *rows, whole = rows_of(parent, "other")
    assert float(whole["learned"]) > float(whole["best"]) > 0
    assert float(rows[1]["learned_over_posterior_variance_geometric_mean"]) > 0
    assert sum(int(row["images"]) for row in rows) == 12 * 4
    content = json.loads((parent / "other" / "figures" / "fixed_variance_cost.json").read_text())
    assert content["protocol"]["terms"] == 4 and content["protocol"]["learned"] == "this network"


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("run", ["--learned={0}/run"], "variance is fixed_small; name one with learned"),
        ("other", ["--learned={0}/other"], "is learned itself; leave it out"),
        ("run", ["--learned={0}/nothing"], "no run there"),
        ("run", ["--terms=1"], "--terms=1: one is always the decoder's"),
        ("run", ["--split=all"], "error: --split=all: digits has the splits train, test"),
        ("run", ["--config.evaluation.steps=1"], "a chain of one step"),
    ],
)
def test_a_wrong_request_is_one_line(parent, capsys, monkeypatch, name, flags, said):
    monkeypatch.setattr(parts, "collect", None)
    assert run(parent, *(flag.format(parent) for flag in flags), name=name) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_learned_run_of_another_chain_is_refused(parent, capsys):
    config = parent / "other" / "config.json"
    content = json.loads(config.read_text())
    content["diffusion"]["beta_end"] = 0.3
    config.write_text(json.dumps(content))
    assert run(parent, f"--learned={parent}/other") == 2
    assert "diffusion.beta_end is 0.3, not 0.4 as in --run" in capsys.readouterr().err
