"""Figs. 6 and 7: the images are those of --mode=sample, the numbers what they are said to be."""

import argparse
import csv
import dataclasses
import json
import pathlib
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import start
from untrained_runs import untrained

from ddpm_jax import files, generation, keys, oracles, parts, runs, sampling, schedules
from ddpm_jax.config import default_config, override
from ddpm_jax.data import open_source, to_uint8
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation.features import make_extractor
from ddpm_jax.evaluation.quality import compare_images
from ddpm_jax.main import main
from ddpm_jax.parallel import make_layout
from experiments import continuations, interpolation, quality_curve
from experiments import progressive_generation as experiment
from experiments.common import Study, chain_indices

BETAS = np.linspace(1e-3, 0.4, 12)


def toy_study(tmp_path, denoiser, process, flags=None, **sample):
    """A study of a network that is any function (x_t, t) -> output, of images 8x8x1."""
    config = default_config()
    settings = {"data.image_size": 8, "data.channels": 1, "diffusion.num_steps": 12}
    for key, value in {**settings, **{f"sample.{k}": v for k, v in sample.items()}}.items():
        override(config, key, value)
    network = lambda variables, x, t: denoiser(x, t)  # noqa: E731
    model = SimpleNamespace(apply=network, dtype=jnp.float32)
    run = runs.Run(config, process, model, {}, 1, make_layout("jit"))
    directory = runs.RunDirectory.of(tmp_path)
    return Study("toy", run, directory, argparse.Namespace(**(flags or {})), lambda line: None)


def wavy(x, t):
    return jnp.sin(2 * x) + t[:, None, None, None] / 20


@pytest.mark.parametrize("method, eta, steps", [("ancestral", 0.0, 0), ("ddim", 0.6, 7)])
def test_a_chain_cut_at_any_index_is_the_chain(tmp_path, method, eta, steps):
    process = Process(schedules.from_betas(BETAS), "eps", "fixed_small")
    how = {"method": method, "eta": eta, "clip": False}
    study = toy_study(tmp_path, wavy, process, **how, steps=steps)
    short = sampling.shorten(process, steps) if steps else process
    key = keys.example_keys(3, "sample", 0, jnp.arange(4))
    other = keys.example_keys(3, "continuation", 0, jnp.arange(4))
    advance = continuations.compile_advance(study.run, short)
    x, length = keys.normal(key, 0, (8, 8, 1)), short.schedule.num_steps
    whole = sampling.sample(process, wavy, (8, 8, 1), key, method, steps, eta, clip=False)
    np.testing.assert_allclose(advance({}, x, key, length, 0), whole, rtol=1e-4, atol=1e-4)
    x_t = advance({}, advance({}, x, key, length, 5), key, 5, 3)
    np.testing.assert_array_equal(x_t, advance({}, x, key, length, 3))
    np.testing.assert_allclose(advance({}, x_t, key, 3, 0), whole, rtol=1e-4, atol=1e-4)
    expected = sampling.reverse(short, wavy, x_t, other, 3, method, eta, clip=False)
    np.testing.assert_allclose(advance({}, x_t, other, 3, 0), expected, rtol=1e-4, atol=1e-4)
    x0_hat = continuations.compile_x0_hat(study.run, short)({}, x_t, 3)
    found = sampling.reverse(short, wavy, x_t, other, 3, method, eta, clip=False, x0_at=(3,))
    np.testing.assert_allclose(x0_hat, found.x0_path[0], rtol=1e-4, atol=1e-4)


def linear_chain(variance):
    """x_{t-1} = gain_t x_t + sigma_t noise: the ancestral chain, β̃_t, of the exact network for
    pixels N(0, variance). float64 [T+1]."""
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETAS)])
    gain, sigma2 = np.zeros((2, len(alpha_bar)))
    for t in range(1, len(alpha_bar)):
        beta, rest = BETAS[t - 1], 1 - alpha_bar[t]
        x0 = np.sqrt(alpha_bar[t]) * variance / (alpha_bar[t] * variance + rest)
        gain[t] = np.sqrt(alpha_bar[t - 1]) * beta / rest * x0
        gain[t] += np.sqrt(1 - beta) * (1 - alpha_bar[t - 1]) / rest
        sigma2[t] = beta * (1 - alpha_bar[t - 1]) / rest
    return gain, sigma2


def variance_from(start, gain, sigma2, variance):
    for t in range(start, 0, -1):
        variance = gain[t] ** 2 * variance + sigma2[t]
    return variance


def test_the_variance_fixed_at_t_is_that_of_a_gaussian_s_chain(tmp_path):
    """Pixels N(0, 0.2²): what is open at t follows from the chain's gains and noise alone."""
    data = oracles.Gaussian(np.zeros((8, 8, 1)), 0.04 * np.eye(64))
    process = Process(schedules.from_betas(BETAS), "eps", "fixed_small")
    flags = {"chains": 40, "continuations": 3}
    network = oracles.denoiser(data, process)
    study = toy_study(tmp_path, network, process, flags, clip=False, batch_size=33)
    key = keys.example_keys(0, "sample", 0, jnp.arange(200))
    samples = np.asarray(to_uint8(sampling.sample(process, network, (8, 8, 1), key, clip=False)))
    forks = [12, 9, 4, 1]
    shared = continuations.share(study, process, {}, forks, samples)
    assert shared.times == forks
    chain = linear_chain(0.04)
    total = variance_from(12, *chain, 1.0)
    for fork, (fixed, error), (rms, rms_error) in zip(
        forks, shared.fixed, shared.difference, strict=True
    ):
        open_variance = variance_from(fork, *chain, 0.0)
        assert abs(fixed - (1 - open_variance / total)) < 4 * error + 1e-4
        assert error < 0.03
        assert abs(rms - 127.5 * np.sqrt(2 * open_variance)) < 4 * rms_error + 0.5
    assert shared.fixed[-1] == (1.0, 0.0)  # The last step has no noise.
    images, x_t = shared.arrays["images"], shared.arrays["x_t"]
    assert images.shape == (40, 4, 3, 8, 8, 1) and x_t.shape == (40, 4, 8, 8, 1)
    # Chain k is that of sample k.
    np.testing.assert_allclose(images[:, 3, 0].astype(int), samples[:40], atol=1)
    # What is drawn from one x_t differs by noise that no two chains or continuations share.
    rest = images[:, 0].astype(float) - images[:, 0].mean(axis=1, keepdims=True)
    noise = rest[:, :2].reshape(80, 64)
    correlation = np.corrcoef(noise) - np.eye(80)
    pairs = np.arange(0, 80, 2)
    correlation[pairs, pairs + 1] = correlation[pairs + 1, pairs] = 0  # Of one mean.
    assert np.abs(correlation).max() < 5.5 / 8


def test_share_and_errors_hold_for_nested_gaussians():
    """Variance 4 between groups and 1 within: 0.8 is fixed; errors are those of repeats."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        centres = 2 * rng.standard_normal((12, 1, 1, 2, 1, 1))
        images = centres + rng.standard_normal((12, 1, 3, 2, 1, 1))
        samples = np.sqrt(5) * rng.standard_normal((30, 2, 1, 1))
        found.append([x[0] for x in continuations.variance_fixed(images, samples)])
    fixed, difference = np.moveaxis(np.array(found), 1, 0)
    for values, truth in ((fixed, 0.8), (difference, np.sqrt(2))):
        assert abs(np.median(values[:, 0]) - truth) < 0.02
        assert values[:, 1].mean() == pytest.approx(values[:, 0].std(), rel=0.2)


def test_the_times_kept_hold_those_measured_and_both_ends():
    path = experiment.Path.of(Process(schedules.linear(1000)))
    assert len(path.indices) == 39 and path.times == path.indices
    assert path.indices[0] == 1000 and path.indices[-1] == 1
    assert path.indices == sorted(path.indices, reverse=True)
    assert np.diff(path.indices).max() <= -26
    np.testing.assert_array_equal(path.points, np.arange(0, 39, 2))
    short = sampling.shorten(Process(schedules.linear(1000)), 5)
    path = experiment.Path.of(short)
    assert path.indices == [5, 4, 3, 2, 1] and path.times == [1000, 750, 500, 251, 1]
    np.testing.assert_array_equal(path.points, np.arange(5))


NAME = "progressive_generation"
FLAGS = ["--count=10", "--chains=3", "--continuations=2", "--config.sample.batch_size=4"]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "run")


def call(workdir, *flags):
    cache = f"--config.evaluation.cache_dir={workdir}/cache"
    return experiment.main([f"--run={workdir}", cache, *FLAGS, *flags])


def table(workdir):
    with (workdir / "figures" / "progressive_generation.csv").open() as file:
        return list(csv.DictReader(file))


def drawn_arrays(workdir):
    """The file of the samples and their path."""
    found = [parts.read(p) for p in (workdir / "evaluation").glob("*progressive*.npz")]
    return next(arrays for arrays in found if "path" in arrays)


@pytest.fixture(scope="module")
def made(run_directory, tmp_path_factory):
    workdir = shutil.copytree(run_directory, tmp_path_factory.mktemp("made") / "run")
    assert call(workdir) == 0
    return workdir


def test_image_k_is_that_of_mode_sample(made):
    flags = ["--config.sample.count=10", "--config.sample.batch_size=4"]
    assert main([f"--workdir={made}", "--mode=sample", *flags]) == 0
    (path,) = (made / "samples").glob("*_10.npz")
    expected, _ = generation.load_images(path)
    images = drawn_arrays(made)["images"]
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_frames_go_from_the_first_x0_hat_to_the_sample(made):
    content = json.loads((made / "figures" / "progressive_generation.json").read_text())
    saved = parts.read(runs.RunDirectory.of(made).evaluation / content["arrays"])
    np.testing.assert_array_equal(saved["times"], np.arange(20, -1, -1))
    frames = saved["frames"]
    assert frames.dtype == np.uint8 and frames.shape == (21, 10, 8, 8, 1)
    run = runs.load(made)
    key = keys.example_keys(0, "sample", 0, jnp.arange(10))
    network = lambda x, t: run.apply(run.params, x, t)  # noqa: E731
    expected = jax.jit(
        lambda: sampling.sample(run.process, network, (8, 8, 1), key, x0_at=range(20, 0, -1))
    )()
    difference = np.abs(frames[:20].astype(int) - to_uint8(expected.x0_path))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    np.testing.assert_array_equal(frames[20], drawn_arrays(made)["images"])


def test_the_curve_is_the_metric_of_each_set_of_images(made):
    arrays, rows = drawn_arrays(made), table(made)
    source = {s: open_source(runs.load(made).config, s) for s in ("train", "test")}
    real = source["train"].images(np.arange(1541))
    held_out = source["test"].images(np.arange(10) * 256 // 10)
    pixels = make_extractor("pixels")
    curve = [row for row in rows if row["quantity"] == "fd_pixels"]
    assert [row["of"] for row in curve] == ["x0_hat"] * 20 + ["samples", "held-out images"]
    assert [row["t"] for row in curve] == [*map(str, range(20, -1, -1)), ""]
    sets = {0: arrays["path"][:, 0], 7: arrays["path"][:, 7], 20: arrays["images"], 21: held_out}
    for k, images in sets.items():
        (expected,) = compare_images(images, real, pixels, ("fd",)).values()
        assert float(curve[k]["value"]) == pytest.approx(expected.value, rel=1e-4)
        assert float(curve[k]["standard_error"]) == pytest.approx(expected.standard_error, rel=1e-4)
    assert [row["t"] for row in rows if row["quantity"] == "rms_difference"] == [
        *("20", "15", "10", "5")
    ]


def test_nothing_is_computed_twice_and_another_metric_takes_the_same_images(
    made, capsys, monkeypatch, tmp_path
):
    made = shutil.copytree(made, tmp_path / "run")
    before = {p: p.read_bytes() for p in (made / "evaluation").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(experiment, "compile_sampler", lambda *_: pytest.fail)
    monkeypatch.setattr(continuations, "compile_advance", lambda *_: pytest.fail)
    assert call(made) == 0
    assert capsys.readouterr().out.count("computed before") == 4
    assert call(made, "--metric=prdc_pixels") == 0
    assert {row["quantity"] for row in table(made)} >= {"precision_pixels", "coverage_pixels"}
    assert before.items() <= {p: p.read_bytes() for p in (made / "evaluation").iterdir()}.items()


def test_an_interrupted_figure_goes_on_to_the_bit(
    made, run_directory, tmp_path, monkeypatch, capsys
):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    original, written = files.replace_with, []

    def interrupting(path, write):
        original(path, write)
        ours = path.parent.suffix == ".parts" and "progressive" in path.parent.name
        if ours and path.suffix == ".npz" and not written:
            written.append(path)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "replace_with", interrupting)
    assert call(workdir) == 75
    assert "4 of 10 samples are in" in capsys.readouterr().err
    assert not (workdir / "figures" / "progressive_generation.png").exists()
    assert call(workdir) == 0
    names = ("progressive_generation.csv", "progressive_generation.png")
    for name in names:
        assert (workdir / "figures" / name).read_bytes() == (made / "figures" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_two_devices_draw_what_one_does(made, run_directory, tmp_path):
    """In a process of its own, Figs. 6 to 9; images differ by rounding, by a level at most."""
    code = "import sys; import test_progressive_generation as t; t.figures_6_to_9(*sys.argv[1:])"
    two = shutil.copytree(run_directory, tmp_path / "two")
    tests = str(pathlib.Path(__file__).parent)
    process = start([str(two)], 2, f"import sys; sys.path.append({tests!r}); {code}")
    assert process.wait() == 0, process.stderr.read()
    one = shutil.copytree(made, tmp_path / "one")
    figures_6_to_9(one)
    found = []
    for workdir in (one, two):
        arrays = {p.name: parts.read(p) for p in (workdir / "evaluation").glob("*.npz")}
        found.append({(n, k): x for n, a in arrays.items() for k, x in a.items()})
    assert found[0].keys() == found[1].keys()
    images = [key for key, x in found[0].items() if x.dtype == np.uint8]
    assert {name.split("_")[1] for name, _ in images} == {"progressive", "interpolation"}
    for key in images:
        assert np.abs(found[0][key].astype(int) - found[1][key]).max() <= 1


def figures_6_to_9(workdir):
    """On the devices that there are."""
    assert call(workdir) == 0
    assert interpolation.main([f"--run={workdir}", "--pairs=3", "--times=9"]) == 0


def test_a_shorter_chain_is_followed_at_its_own_times_and_one_without_noise_has_no_fig_7(
    run_directory, tmp_path
):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    assert call(workdir, "--config.sample.method=ddim", "--config.sample.steps=5") == 0
    rows = table(workdir)
    assert [row["t"] for row in rows] == ["20", "15", "10", "6", "1", "0", ""]
    content = json.loads((workdir / "figures" / "progressive_generation.json").read_text())
    assert "no Fig. 7" in content["notes"][-1]
    assert content["protocol"]["chain"] == 5


def test_without_images_held_out_x0_hat_stands_alone(made, capsys, tmp_path):
    """As for CelebA-HQ, which has one split; or where a metric needs more than are held out."""
    workdir = shutil.copytree(made, tmp_path / "run")
    assert call(workdir, "--config.evaluation.split=train") == 0
    assert "holds nothing out from train" in capsys.readouterr().out
    assert [row["of"] for row in table(workdir) if row["quantity"] == "fd_pixels"][-1] == "samples"
    study = toy_study(tmp_path, wavy, Process(schedules.from_betas(BETAS)), {"count": 1300})
    override(study.run.config, "data.name", "digits")
    study.flags.metric = "fdinf_pixels"
    study.run.config.evaluation.update(split=("test",), cache_dir=str(tmp_path))
    said = []
    quality = quality_curve.Quality.of(dataclasses.replace(study, say=said.append))
    assert len(quality.held_out) == 0 and "256 samples; it needs at least" in "".join(said)


def test_the_metric_of_large_images_needs_no_covariance():
    assert quality_curve.default_metric((32, 32, 3)) == "fd_pixels"
    assert quality_curve.default_metric((256, 256, 3)) == "kd_pixels"


def test_times_are_found_on_any_chain():
    whole = schedules.linear(1000)
    assert chain_indices(whole, "", "--times") == [1000, 750, 500, 250]
    assert chain_indices(whole, "3,1000", "--times") == [1000, 3]
    short = schedules.respace(whole, np.array([1, 40, 300, 700, 1000]))
    assert chain_indices(short, "40,700", "--times") == [4, 2]
    assert chain_indices(short, "", "--times") == [5, 4, 2, 1]
    assert chain_indices(schedules.respace(whole, np.array([1000])), "", "--times") == [1]


BAD = {
    "time 0": (["--times=0"], "t=0 does not lie in 1..20"),
    "time beyond T": (["--times=10,21"], "t=21 does not lie in 1..20"),
    "no times": (["--times=a"], "expected integers"),
    "a time that the chain passes by": (
        ["--config.sample.steps=5", "--times=7"],
        "does not stop at t=7, the nearest is 6",
    ),
    "times of a deterministic chain": (
        ["--config.sample.method=ddim", "--times=5"],
        "set --config.sample.eta=1",
    ),
    "one sample": (["--count=1"], "--count=1: choose at least 2"),
    "one chain": (["--chains=1"], "--chains=1: choose at least 2"),
    "one continuation": (["--continuations=1"], "--continuations=1: choose at least 2"),
    "no metric": (["--metric=beauty"], "--metric=beauty: no such metric"),
    "no metric of samples": (["--metric=bits_per_dim"], "is not of samples"),
    "too few samples": (["--metric=fdinf_pixels"], "--count=10: fdinf_pixels: 10 samples"),
    "no weights": (["--metric=fid"], "config.evaluation.weights"),
    "no split": (["--config.evaluation.split=valid"], "config.evaluation.split=valid"),
    "no reference": (["--config.evaluation.reference=dev"], "config.evaluation.reference=dev"),
    "too many of the reference": (["--config.evaluation.reference_count=9999"], "9999"),
}


@pytest.mark.parametrize("flags, reason", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_in_one_line_before_any_work(run_directory, capsys, flags, reason):
    assert call(run_directory, *flags) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
    assert not (run_directory / "figures" / "progressive_generation.png").exists()
    assert not list(run_directory.glob("evaluation/*"))


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    process = Process(schedules.from_betas(BETAS))
    flags = {"chains": 2, "continuations": 2}
    broken = lambda x, t: jnp.full_like(x, jnp.nan)  # noqa: E731
    study = toy_study(tmp_path, broken, process, flags, clip=False)
    with pytest.raises(experiment.NonFiniteError, match="not finite"):
        continuations.share(study, process, {}, [3], np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(experiment.NonFiniteError, match="not finite"):
        study.flags.count = 2
        experiment.draw(study, experiment.Path.of(process))
