"""Figs. 8 and 9: what lies between two images, against what a Gaussian's chain must give."""

import argparse
import csv
import json
import shutil
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from untrained_runs import untrained

from ddpm_jax import files, keys, oracles, runs, sampling, schedules
from ddpm_jax.config import RequestError, default_config, override
from ddpm_jax.data import ArraySource, open_source
from ddpm_jax.diffusion import Process
from ddpm_jax.parallel import make_layout
from experiments import interpolation as experiment
from experiments.common import Study

BETAS = np.linspace(1e-3, 0.4, 12)
ALPHA_BAR = np.concatenate([[1.0], np.cumprod(1 - BETAS)])
PROCESS = Process(schedules.from_betas(BETAS), "eps", "fixed_small")
RNG = np.random.default_rng(5)


def toy_study(tmp_path, denoiser, lambdas=5, shared_noise=False, **sample):
    """A study of a network that is any function (x_t, t) -> output, of images 8x8x1."""
    config = default_config()
    settings = {"data.image_size": 8, "data.channels": 1, "diffusion.num_steps": 12}
    for key, value in {**settings, **{f"sample.{k}": v for k, v in sample.items()}}.items():
        override(config, key, value)
    model = SimpleNamespace(apply=lambda variables, x, t: denoiser(x, t))
    run = runs.Run(config, PROCESS, model, {}, 1, make_layout("jit"))
    flags = argparse.Namespace(lambdas=lambdas, shared_noise=shared_noise)
    directory = runs.RunDirectory.of(tmp_path)
    return Study("toy", run, directory, flags, lambda line: None)


def decode(study, t, sources, name="x"):
    return experiment.decode(study, PROCESS, t, sources, {"t": t, "name": name})


def affine_decoder(t, variance):
    """x_0 = gain x_t + noise of variance `rest`: the chain with β̃_t of the exact network for
    pixels N(0, variance), in float64."""
    gain, rest = 1.0, 0.0
    for s in range(t, 0, -1):
        beta, left = BETAS[s - 1], 1 - ALPHA_BAR[s]
        x0 = np.sqrt(ALPHA_BAR[s]) * variance / (ALPHA_BAR[s] * variance + left)
        step = np.sqrt(ALPHA_BAR[s - 1]) * beta / left * x0
        step += np.sqrt(1 - beta) * (1 - ALPHA_BAR[s - 1]) / left
        noise = beta * (1 - ALPHA_BAR[s - 1]) / left
        gain, rest = gain * step, rest * step**2 + noise
    return gain, rest


@pytest.mark.parametrize("t, shared", [(9, False), (9, True), (4, False), (1, False)])
def test_the_numbers_are_those_of_a_gaussian_s_chain(tmp_path, t, shared):
    """Every distance follows from the decoder's gain A and noise V, and the noise that diffused.

    Reconstruction: (A√ᾱ − 1)² s² + A²(1 − ᾱ) + V. Between λ's δ apart:
    A²δ² (ᾱ (s' − s)² + 2 (1 − ᾱ)), without the last where the noise is shared.
    """
    variance = 0.04
    data = oracles.Gaussian(np.zeros((8, 8, 1)), variance * np.eye(64))
    network = oracles.denoiser(data, PROCESS)
    sources = np.rint(127.5 + 127.5 * RNG.uniform(-0.4, 0.4, (60, 2, 8, 8, 1))).astype(np.uint8)
    study = toy_study(tmp_path, network, shared_noise=shared, clip=False, batch_size=200)
    images = decode(study, t, sources)
    assert images.shape == (60, 5, 8, 8, 1) and images.dtype == np.uint8
    found = experiment.measure(sources, images)
    (gain, rest), s = affine_decoder(t, variance), sources / 127.5 - 1
    signal, diffused = ALPHA_BAR[t], 1 - ALPHA_BAR[t]
    between = signal * np.mean((s[:, 0] - s[:, 1]) ** 2) + (0 if shared else 2 * diffused)
    expected = {
        "reconstruction": (gain * np.sqrt(signal) - 1) ** 2 * np.mean(s**2)
        + gain**2 * diffused
        + rest,
        "step": (gain / 4) ** 2 * between,
        "ends": gain**2 * between,
    }
    for name, square in expected.items():
        value, error = found[f"{name}_rmse"], found[f"{name}_rmse_error"]
        # Rounding to levels adds up to 1/12 to an image's square, twice to a difference's.
        assert abs(value - 127.5 * np.sqrt(square)) < 4 * error + 1 / (12 * value) + 0.02
        assert error < 0.05 * value


def test_points_decode_to_points_and_little_noise_to_the_source(tmp_path):
    """The exact network of four images returns one of them whatever it starts from; from t = 1
    or 2 it returns the source."""
    points = np.where(RNG.uniform(size=(4, 8, 8, 1)) < 0.5, -0.6, 0.6)
    levels = np.rint((points + 1) * 127.5)
    network = oracles.denoiser(oracles.Points(points), PROCESS)
    sources = levels[[[0, 1], [2, 3], [3, 0]]].astype(np.uint8)
    study = toy_study(tmp_path, network)
    for t in (1, 2, 12):
        images = decode(study, t, sources).astype(float)
        distance = np.abs(images[:, :, None] - levels).max(axis=(3, 4, 5))
        assert distance.min(axis=2).max() <= 1
        if t <= 2:
            assert np.abs(images[:, [0, -1]] - sources).max() <= 1


def wavy(x, t):
    return jnp.sin(2 * x) + t[:, None, None, None] / 20


def test_the_ends_decode_x_t_itself_with_one_noise_for_all_t(tmp_path):
    sources = RNG.integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8)
    study = toy_study(tmp_path, wavy, batch_size=10)  # Two pairs at a time.
    key = keys.example_keys(0, "interpolation", 0, jnp.arange(3))
    for t in (3, 8):
        images = decode(study, t, sources)
        for end in (0, 1):  # Noise from beyond the chain's own places.
            noise = np.asarray(keys.normal(key, 13 + end, (8, 8, 1)), np.float64)
            x_t = np.sqrt(ALPHA_BAR[t]) * (sources[:, end] / 127.5 - 1)
            x_t += np.sqrt(1 - ALPHA_BAR[t]) * noise
            alone = sampling.reverse(PROCESS, wavy, jnp.float32(x_t), key, t)
            expected = np.clip(np.rint((np.asarray(alone) + 1) * 127.5), 0, 255)
            assert np.abs(images[:, -end].astype(int) - expected).max() <= 1


def test_exchanging_the_images_reverses_lambda_if_they_share_the_noise(tmp_path):
    sources = RNG.integers(0, 256, (2, 2, 8, 8, 1), dtype=np.uint8)
    for shared in (True, False):
        study = toy_study(tmp_path, wavy, shared_noise=shared)
        there = decode(study, 7, sources, f"{shared}").astype(int)
        back = decode(study, 7, sources[:, ::-1], f"{shared} back").astype(int)
        difference = np.abs(there - back[:, ::-1])
        assert difference.max() <= 1 if shared else difference.max() > 5
        # A pair of one image, with one noise, is the same for every λ.
        same = decode(study, 7, sources[:, [0, 0]], f"{shared} same").astype(int)
        assert (np.abs(same - same[:, :1]).max() <= 1) == shared


def test_measures_are_root_mean_squares_with_errors_over_pairs():
    sources = RNG.integers(0, 256, (5, 2, 3, 4, 2), dtype=np.uint8)
    images = RNG.integers(0, 256, (5, 4, 3, 4, 2), dtype=np.uint8)
    found = experiment.measure(sources, images)
    squares = {"reconstruction": [], "step": [], "ends": []}
    for y, x in zip(sources.astype(float), images.astype(float), strict=True):
        squares["reconstruction"].append(
            (np.mean((x[0] - y[0]) ** 2) + np.mean((x[3] - y[1]) ** 2)) / 2
        )
        steps = [np.mean((x[k + 1] - x[k]) ** 2) for k in range(3)]
        squares["step"].append(sum(steps) / 3)
        squares["ends"].append(np.mean((x[0] - x[3]) ** 2))
    for name, values in squares.items():
        rms = np.sqrt(np.mean(values))
        assert found[f"{name}_rmse"] == pytest.approx(rms)
        error = np.std(values, ddof=1) / np.sqrt(5) / (2 * rms)
        assert found[f"{name}_rmse_error"] == pytest.approx(error)
    assert experiment.measure(sources[:1], images[:1])["step_rmse_error"] is None
    still = np.repeat(images[:, :1], 4, axis=1)
    assert experiment.measure(sources, still)["step_rmse_error"] == 0


def source_of(labels):
    n = len(labels)
    return ArraySource("toys", "test", np.zeros((n, 8, 8, 1), np.uint8), np.array(labels))


def test_pairs_are_of_different_classes_and_no_image_comes_twice():
    for n, count in ((256, 5), (30, 15), (41, 9)):
        labels = RNG.integers(0, 4, n) if n > 30 else np.arange(n) % 3
        pairs = experiment.choose_pairs(source_of(labels), count)
        assert pairs.shape == (count, 2) and len(np.unique(pairs)) == 2 * count
        assert (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
        np.testing.assert_array_equal(pairs, experiment.choose_pairs(source_of(labels), count))
    # 0 with 3, 1 with 4, 2 with 5; 2's partner is of its class and the next one is 6.
    pairs = experiment.choose_pairs(source_of([0, 0, 1, 1, 1, 1, 0]), 3)
    np.testing.assert_array_equal(pairs[:, 0], [0, 1, 2])
    assert pairs[2, 1] == 6
    for labels in (None, [7] * 9):  # Without classes: spread evenly.
        source = ArraySource("toys", "test", np.zeros((9, 8, 8, 1), np.uint8), labels)
        if labels:
            source = source_of(labels)
        np.testing.assert_array_equal(experiment.choose_pairs(source, 2), [[0, 4], [2, 6]])
    with pytest.raises(RequestError, match="no image left of another class"):
        experiment.choose_pairs(source_of([0, 0, 0, 0, 0, 1]), 3)
    with pytest.raises(RequestError, match="needs 2 images; toys/test has 1"):
        experiment.choose_pairs(source_of([0]), 1)


def test_labels_are_read_only_as_far_as_the_search_goes(monkeypatch):
    """Of a source that decodes an image for each: 20 partners' and firsts', and a few beyond."""
    read = []
    original = ArraySource.labels
    monkeypatch.setattr(
        ArraySource, "labels", lambda self, at: read.extend(at) or original(self, at)
    )
    experiment.choose_pairs(source_of(np.arange(100_000) % 10), 10)
    assert 0 < len(read) < 60
    read.clear()
    half = source_of(np.arange(100_000) >= 50_007)  # The next of another class is 7 on.
    assert experiment.choose_pairs(half, 1).tolist() == [[0, 50_007]] and len(read) < 20
    read.clear()
    experiment.choose_pairs(source_of(np.zeros(5000, int)), 10)  # Around it once, not ten times.
    assert len(read) == 5000 + 10


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "run")


def call(workdir, *flags):
    settings = ["--pairs=3", "--lambdas=4", "--config.sample.batch_size=8"]
    return experiment.main([f"--run={workdir}", *settings, *flags])


def results(workdir):
    figures = workdir / "figures"
    with (figures / "interpolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((figures / "interpolation.json").read_text())


def test_the_figure_of_a_run_is_made_once_and_goes_on(run_directory, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    original, written = files.replace_with, []

    def interrupting(path, write):
        original(path, write)
        if path.parent.suffix == ".parts" and path.suffix == ".npz":
            written.append(path)
            if len(written) == 1:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "replace_with", interrupting)
    assert call(workdir, "--times=3") == 75
    assert "2 of 3 pairs are in" in capsys.readouterr().err
    assert not (workdir / "figures" / "interpolation.csv").exists()
    assert call(workdir, "--times=3") == 0
    assert [path.name for path in written] == ["00000000_2.npz", "00000002_1.npz"]
    rows, content = results(workdir)
    assert [row["t"] for row in rows] == ["3"]
    protocol = content["protocol"]
    labels = open_source(runs.load(workdir).config, "test").labels(np.array(protocol["positions"]))
    assert labels.shape == (3, 2) and (labels[:, 0] != labels[:, 1]).all()
    assert (protocol["data"], protocol["split"], protocol["chain"]) == ("digits", "test", "all")
    assert "a noise of its own" in content["notes"][0]
    assert (workdir / "figures" / "interpolation.png").stat().st_size > 10_000
    capsys.readouterr()
    monkeypatch.setattr(experiment, "compile_decoder", lambda *_: pytest.fail)
    assert call(workdir, "--times=3") == 0
    assert capsys.readouterr().out.count("computed before") == 1


def test_what_decodes_is_said(run_directory, tmp_path, capsys):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    how = ["--config.sample.steps=5", "--times=6", "--shared_noise"]
    assert call(workdir, *how) == 0
    rows, content = results(workdir)
    assert [row["t"] for row in rows] == ["6"] and content["protocol"]["chain"] == 5
    assert "the ancestral chain of 5 of 20 steps" in content["notes"][0]
    assert "one noise for both" in content["notes"][0] and content["protocol"]["shared_noise"]
    run = runs.load(workdir)
    run.config.sample.update(method="ddim", steps=5)
    process, words = experiment.choose_process(run)
    assert process is run.process
    assert "all 20 steps, not config.sample.method=ddim" in words
    run.config.sample.update(method="ancestral", steps=20)
    assert experiment.choose_process(run) == (run.process, "the ancestral chain of all 20 steps")


BAD = {
    "a split that is not there": (
        ["--config.evaluation.split=valid"],
        "config.evaluation.split=valid",
    ),
    "time 0": (["--times=0,5"], "t=0 does not lie in 1..20"),
    "time beyond T": (["--times=21"], "t=21 does not lie in 1..20"),
    "a time that the chain passes by": (
        ["--config.sample.steps=5", "--times=7"],
        "does not stop at t=7, the nearest is 6",
    ),
    "no pair": (["--pairs=0"], "--pairs=0: choose at least 1"),
    "too many pairs": (["--pairs=129"], "needs 258 images; digits/test has 256"),
    "one lambda": (["--lambdas=1"], "--lambdas=1: choose at least 2"),
    "no number": (["--pairs=many"], "invalid int value"),
    "too many steps": (["--config.sample.steps=21"], "more than diffusion.num_steps"),
}


@pytest.mark.parametrize("flags, reason", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_in_one_line_before_any_work(run_directory, capsys, flags, reason):
    assert call(run_directory, *flags) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
    assert not (run_directory / "figures" / "interpolation.png").exists()
    assert not list(run_directory.glob("evaluation/*"))


def test_a_learned_variance_of_single_steps_is_not_decoded_in_longer_ones(
    run_directory, tmp_path, capsys
):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["diffusion"]["variance"] = "learned"
    config["train"]["objective"] = "vlb"
    (workdir / "config.json").write_text(json.dumps(config))
    assert call(workdir, "--config.sample.steps=5") == 2
    assert "variance=learned is the variance of single steps" in capsys.readouterr().err


def test_images_that_are_no_numbers_are_refused(tmp_path):
    study = toy_study(tmp_path, lambda x, t: jnp.full_like(x, jnp.nan), clip=False)
    with pytest.raises(experiment.NonFiniteError, match="not finite"):
        decode(study, 3, np.zeros((2, 2, 8, 8, 1), np.uint8))
