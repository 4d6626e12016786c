"""Rate and distortion over time: Shannon's function for Gaussians, raw terms, the paper's pairs."""

import csv
import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs_for_tests import ROOT
from scipy import integrate, stats
from untrained_runs import untrained

from ddpm_jax import oracles, schedules
from ddpm_jax.config import load_file, override
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import bound
from ddpm_jax.parallel import make_layout
from experiments import common, progressive_coding

T = 12
SCHEDULE = schedules.linear(T, 1e-2, 0.4)
PROCESS = Process(SCHEDULE, "eps", "learned")
V = 0.2
DATA = oracles.Gaussian(np.zeros((1, 1, 1)), V)


def quiet(line):
    pass


def exact_bound():
    """The bound of the exact network on N(0, V), by closed forms: no images, so no errors."""
    terms = oracles.bound(DATA, PROCESS, clip=False)
    alpha_bar = np.float64(SCHEDULE.alpha_bar)
    mse = V * (1 - alpha_bar) / (alpha_bar * V + 1 - alpha_bar)
    none = np.zeros(T + 1)
    rate = terms[::-1].cumsum()[::-1]
    columns = terms, none, mse, none, none, none, rate, none
    return bound.Bound(*np.zeros((3, 1000, 1)), np.zeros(1000), *columns)


def test_what_is_sent_of_gaussian_data_is_shannon_s_function_of_the_distortion():
    """With the exact reverse Σ_{j≥t} L_j = I(x_0; x_t) + KL(q(x_T) ‖ p(x_T)), Eq. 16, so that the
    mean square of x̂_0(x_t) is V 2^(−2I): no other pairing of the two columns gives it."""
    found = progressive_coding.curve(
        exact_bound(), np.full(T + 1, 1000), progressive_coding.neighbors(T, 0, 1000)
    )
    end = float(SCHEDULE.alpha_bar[-1])
    total = end * V + 1 - end
    excess = 0.5 * (total - 1 - np.log(total)) / np.log(2)
    np.testing.assert_allclose(
        (found.rmse / 127.5) ** 2, V * 2 ** (-2 * (found.rate - excess)), rtol=1e-5
    )
    np.testing.assert_array_equal(found.t, np.arange(1, T + 1))
    # One step done: x_T alone is there.
    np.testing.assert_array_equal(found.steps, np.arange(T, 0, -1))
    assert found.rate[0] > 0.5 and found.rate[-1] < 0.05


def network(x_t, t):
    return jnp.concatenate([0.8 * x_t, 0.1 * x_t - 3], axis=-1)


def measured(terms, draws, positions):
    images = np.random.default_rng(1).integers(0, 256, (1000, 1, 2, 1), dtype=np.uint8)
    compute = bound.compile_terms(
        make_layout("jit"), PROCESS, lambda _, x, t: network(x, t), None, 4, terms
    )
    arguments = None, images.__getitem__, positions, len(positions), T, terms, draws, quiet
    raw = [compute(None, images[positions], positions, draw) for draw in range(draws)]
    return bound.measure(compute, *arguments), raw


@pytest.mark.parametrize("terms", [0, 3])
def test_points_are_means_over_their_images_with_the_error_of_those(terms):
    """Against the terms of each image as they come: 300 of them, their numbers not from 0 on."""
    positions = np.arange(300) * 3 + 5
    got, (raw,) = measured(terms, 1, positions)
    counts = progressive_coding.images_at(T, terms, 4, positions, 1)
    np.testing.assert_array_equal(counts, np.bincount(raw.times.ravel(), minlength=T + 1))
    groups = progressive_coding.neighbors(T, terms, 300)
    found = progressive_coding.curve(got, counts, groups)
    assert (len(groups) == T) if not terms else (max(b - a for a, b in groups) >= 1)
    for k, (first, last) in enumerate(groups):
        inside = (raw.times >= first) & (raw.times <= last)
        squares = np.float64(raw.x0_mse[inside]) * 127.5**2
        error = squares.std(ddof=1) / np.sqrt(len(squares))
        assert found.images[k] == len(squares) == inside.sum()
        assert found.rmse[k] == pytest.approx(np.sqrt(squares.mean()), rel=1e-9)
        assert found.rmse_error[k] == pytest.approx(error / 2 / np.sqrt(squares.mean()), rel=1e-6)
        times = raw.times[inside]
        assert found.t[k] == pytest.approx(times.mean())
        assert found.rate[k] == pytest.approx(got.rate[times].mean())
        assert found.rate_error[k] == pytest.approx(got.rate_error[times].mean())


def test_an_image_that_is_drawn_twice_at_a_time_is_one():
    positions = np.arange(40)
    got, raw = measured(4, 3, positions)
    counts = progressive_coding.images_at(T, 4, 4, positions, 3)
    there = [{int(t) for r in raw for t in r.times[k]} for k in range(40)]
    assert counts.tolist() == [sum(t in times for times in there) for t in range(T + 1)]
    assert counts.sum() < sum(r.times.size for r in raw)
    # Three draws of an image are no three images.
    groups = [(1, 1), (2, T)]
    found = progressive_coding.curve(got, counts, groups)
    values = np.repeat(got.x0_mse[2:], counts[2:])
    assert found.rmse_error[1] > 127.5 * values.std() / np.sqrt(40) / 2 / np.sqrt(values.mean())


@pytest.mark.parametrize(
    "num_steps, terms, images", [(1000, 30, 256), (1000, 30, 10_000), (1000, 0, 5), (50, 7, 20)]
)
def test_neighbours_are_parts_of_the_strata_with_a_hundred_images_each(num_steps, terms, images):
    groups = progressive_coding.neighbors(num_steps, terms, images)
    assert groups[0] == (1, 1) and groups[-1][1] == num_steps
    assert all(b + 1 == c for (_, b), (c, _) in itertools.pairwise(groups))
    if not terms:
        assert len(groups) == num_steps
        return
    edges = bound.strata(num_steps, terms)
    assert set(edges[:-1]) <= {first for first, _ in groups}
    for first, last in groups[1:]:
        part = np.searchsorted(edges, first, side="right") - 1
        width = edges[part + 1] - edges[part]
        share = (last - first + 1) / width
        # Whole times: a hundred on average, give or take the one that a division rounds off.
        assert images * (share + 1 / width) >= 100 or share == 1


def test_the_paper_s_last_pair_is_all_but_l_0_and_x0_hat_of_x_1():
    """§4.3: rate 1.78, distortion 1.97, RMSE 0.95. A Gaussian error of that RMSE costs Eq. 13's
    decoder with σ_1² = β̃_2 those 1.97 bits: it is the error at t = 1, after all 1000 steps."""
    steps, rate, rmse = progressive_coding.PAPER[0]
    assert steps == 1000 and (round(rate, 2), round(rmse, 2)) == (1.78, 0.95)
    beta_1, beta_2 = 1e-4, 1e-4 + (0.02 - 1e-4) / 999
    sigma = np.sqrt(beta_2 * beta_1 / (1 - (1 - beta_1) * (1 - beta_2)))

    def cost(error):
        inside = stats.norm.cdf((error + 1 / 255) / sigma) - stats.norm.cdf(
            (error - 1 / 255) / sigma
        )
        return -np.log2(inside) * stats.norm.pdf(error, scale=rmse / 127.5)

    assert integrate.quad(cost, -0.05, 0.05)[0] == pytest.approx(1.97, abs=0.01)


@pytest.fixture
def figure(monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "to_png", lambda figure: drawn.append(figure) or b"")
    return drawn


@pytest.mark.parametrize("paper", [True, False])
def test_the_panels_show_the_curve_and_the_paper_s_points(figure, paper):
    exact = exact_bound()
    groups = progressive_coding.neighbors(T, 0, 1000)
    found = progressive_coding.curve(exact, np.full(T + 1, 1000), groups)
    progressive_coding.draw(found, exact, paper, "oracle")
    panels = figure[0].axes
    x, y = zip(*(panel.lines[0].get_data() for panel in panels[:3]), strict=True)
    np.testing.assert_array_equal(x[0], found.steps)
    np.testing.assert_array_equal(y[0], found.rmse)
    np.testing.assert_array_equal(x[1], found.steps)
    np.testing.assert_allclose(y[1], found.rate, rtol=1e-12)
    np.testing.assert_array_equal(x[2], found.rate)
    np.testing.assert_array_equal(y[2], found.rmse)
    steps, rates, rmses = np.array(progressive_coding.PAPER).T
    for panel, points in zip(
        panels, [(steps, rmses), (steps, rates), (rates, rmses)], strict=False
    ):
        shown = [line.get_data() for line in panel.lines[1:]]
        assert len(shown) == paper
        if paper:
            np.testing.assert_array_equal(shown[0], points)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "run", evaluation__max_images=9)


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def run(workdir, *flags):
    return progressive_coding.main([f"--run={workdir}", *flags])


def rows(workdir):
    with (workdir / "figures" / "progressive_coding.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_picture_a_table_and_its_totals(workdir, monkeypatch, capsys):
    """Of 4 of 20 terms of 9 images: times that no image was at have empty cells."""
    flags = ("--config.evaluation.terms=4", "--split=train")
    assert run(workdir, *flags) == 0
    found = rows(workdir)
    assert [int(r["t"]) for r in found] == list(range(20, 0, -1))
    assert [int(r["steps_done"]) for r in found] == list(range(1, 21))
    results = {
        path.name.split("_")[1]: json.loads(path.read_text())
        for path in (workdir / "evaluation").glob("*_train_*.json")
    }
    for column, name in (("rate", "rate"), ("rmse", "rmse"), ("term", "distortion")):
        assert float(found[-1][column]) == pytest.approx(results[name]["value"], rel=1e-5)
        error = results[name]["standard_error"]
        assert float(found[-1][f"{column}_error"]) == pytest.approx(error, rel=1e-4)
    assert float(found[0]["rate"]) == pytest.approx(results["prior"]["value"], rel=1e-5)
    counts = [int(r["images"]) for r in found]
    assert 0 in counts and counts[-1] == 9 and sum(counts) == 9 * 4
    for row, count in zip(found, counts, strict=True):
        assert (row["rmse"] == "") == (count == 0) == (row["term"] == "")
        assert (row["rmse_error"] == "") == (count < 2)
        assert float(row["rate"]) > 0
    Image.open(workdir / "figures" / "progressive_coding.png").verify()
    content = json.loads((workdir / "figures" / "progressive_coding.json").read_text())
    assert content["protocol"]["split"] == "train" and content["protocol"]["terms"] == 4
    notes = content["notes"]
    assert f"rate {results['rate']['value']:.0f} ±" in notes[0] and "9 images" in notes[0]
    assert any("means over neighbouring times" in note for note in notes)
    assert "paper" not in "".join(notes)
    # What is there is not measured again.
    monkeypatch.setattr(bound, "measure", None)
    assert run(workdir, *flags) == 0
    assert "measured before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--split=validation"], "error: --split=validation: digits has the splits train, test"),
        (["--config.evaluation.split=all"], "error: config.evaluation.split=all: digits has the"),
        (["--config.evaluation.terms=1"], "choose 2 or more"),
        (["--steps=3"], "unknown argument --steps=3"),
    ],
)
def test_a_wrong_request_is_one_line(workdir, capsys, flags, said):
    assert run(workdir, *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(workdir.glob("figures/progressive_coding*"))


@pytest.mark.parametrize(
    "key, value, belongs",
    [
        ("evaluation.steps", 1000, True),
        ("evaluation.steps", 100, False),
        ("data.name", "cifar100", False),
        ("diffusion.num_steps", 500, False),
        ("diffusion.schedule", "cosine", False),
        ("diffusion.beta_start", 1e-3, False),
        ("diffusion.beta_end", 0.01, False),
        ("diffusion.prediction", "mu", False),
    ],
)
def test_the_paper_s_points_are_for_its_data_and_chain(key, value, belongs):
    config = load_file(f"{ROOT}/configs/cifar10.py")
    shown = lambda split="test", whole=True: progressive_coding.is_the_paper_s(  # noqa: E731
        config, split, whole
    )
    assert shown() and not shown(split="train") and not shown(whole=False)
    override(config, key, value)
    assert shown() == belongs


def test_the_paper_s_share_of_the_last_tenth_is_that_of_its_table():
    table = {steps: rate for steps, rate, _ in progressive_coding.PAPER}
    assert f"{1 - table[900] / table[1000]:.0%}" == "93%"
    groups = progressive_coding.neighbors(T, 0, 1000)
    found = progressive_coding.curve(exact_bound(), np.full(T + 1, 1000), groups)
    with_paper, without = (
        progressive_coding.notes(exact_bound(), "test", found, paper)[1] for paper in (True, False)
    )
    assert "steps (Table 4: 93 %)." in with_paper and "paper" not in without + with_paper
