"""--mode=evaluate on a small run: numbers computed another way, manifests, bad requests."""

import json
import shutil
import signal
import socket

import jax
import numpy as np
import pytest
from runs_for_tests import arguments, start, train
from scipy import linalg

from ddpm_jax import files, generation, keys, likelihood, runs
from ddpm_jax.data import open_source, to_float
from ddpm_jax.evaluation import drawing, evaluators, features, manifest
from ddpm_jax.main import main

COUNT = 40
SMALL = {
    "evaluation.metrics": "bits_per_dim,fd_pixels,kd_pixels,nearest_pixels",
    "evaluation.split": "test",
    "evaluation.max_images": 50,
    "evaluation.count": COUNT,
    "evaluation.batch_size": 32,
    "sample.batch_size": 16,
}


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert train(workdir, train__steps=10) == 0
    return workdir


def evaluate(workdir, **overrides):
    """Evaluates; returns the exit code."""
    cache = {"evaluation.cache_dir": workdir / "cache"}
    settings = SMALL | cache | {key.replace("__", "."): v for key, v in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return main([f"--workdir={workdir}", "--mode=evaluate", *flags])


def found(workdir):
    """The manifests of a run, by name."""
    paths = (workdir / "evaluation").glob("*.json")
    return {json.loads(path.read_text())["name"]: json.loads(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def evaluated(run_directory, tmp_path_factory):
    workdir = shutil.copytree(run_directory, tmp_path_factory.mktemp("evaluated") / "run")
    assert evaluate(workdir) == 0
    return workdir


def samples_of(workdir):
    (path,) = (workdir / "samples").glob(f"*_{COUNT}.npz")
    return generation.load_images(path)[0]


def flat(images):
    return images.reshape(len(images), -1) / 127.5 - 1


def test_the_bound_is_that_of_the_images(evaluated):
    run = runs.load(evaluated)
    source = open_source(run.config, "test")
    positions = np.arange(50) * len(source) // 50
    x0 = to_float(source.images(positions))
    noise_keys = keys.example_keys(run.config.seed, "bound", 0, positions)
    bound = jax.jit(
        lambda: likelihood.vlb_terms(
            run.process, lambda x_t, t: run.apply(run.params, x_t, t), x0, noise_keys
        )
    )()
    terms = np.asarray(bound.terms, np.float64)
    results = found(evaluated)
    total = terms.sum(axis=1)
    assert results["bits_per_dim_test"]["value"] == pytest.approx(total.mean(), rel=1e-5)
    error = total.std(ddof=1) / np.sqrt(50)
    assert results["bits_per_dim_test"]["standard_error"] == pytest.approx(error, rel=1e-3)
    rate = terms[:, 1:].sum(axis=1).mean()
    assert results["rate_test"]["value"] == pytest.approx(rate, rel=1e-5)
    assert results["distortion_test"]["value"] == pytest.approx(terms[:, 0].mean(), rel=1e-5)
    rmse = 127.5 * np.sqrt(np.asarray(bound.x0_mse[:, 1], np.float64).mean())
    assert results["rmse_test"]["value"] == pytest.approx(rmse, rel=1e-5)
    arrays = results["bits_per_dim_test"]["details"]["arrays"]
    with np.load(evaluated / "evaluation" / arrays) as saved:
        np.testing.assert_allclose(saved["terms"], terms.mean(axis=0), rtol=1e-4, atol=1e-7)
        assert saved["total"].shape == (50, 1)


def test_sample_quality_is_that_of_the_samples(evaluated):
    results, samples = found(evaluated), flat(samples_of(evaluated))
    run = runs.load(evaluated)
    source = open_source(run.config, "train")
    real = flat(source.images(np.arange(len(source))))
    # Eigenvalues of a product of covariances are real; those of a singular one scatter about 0.
    product = linalg.eigvals(np.cov(samples.T) @ np.cov(real.T)).real
    overlap = np.sqrt(np.maximum(product, 0)).sum()
    traces = np.trace(np.cov(samples.T)) + np.trace(np.cov(real.T)) - 2 * overlap
    expected = ((samples.mean(axis=0) - real.mean(axis=0)) ** 2).sum() + traces
    assert results[f"fd_pixels_{COUNT}"]["value"] == pytest.approx(expected, rel=1e-4)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(samples), len(real)
    within = (kernel(samples, samples).sum() - np.trace(kernel(samples, samples))) / (n * (n - 1))
    reals = (kernel(real, real).sum() - np.trace(kernel(real, real))) / (m * (m - 1))
    expected = within + reals - 2 * kernel(samples, real).mean()
    assert results[f"kd_pixels_{COUNT}"]["value"] == pytest.approx(expected, rel=1e-4)
    distances = np.sqrt(((samples[:, None] - real) ** 2).mean(axis=-1)).min(axis=1)
    nearest = results[f"nearest_pixels_{COUNT}"]
    assert nearest["value"] == pytest.approx(np.median(distances), rel=1e-5)
    assert 0 <= nearest["details"]["memorization"] <= 1
    assert len(list((evaluated / "evaluation").glob("step10_nearest_pixels_40_*.png"))) == 1


def test_the_protocol_travels_with_the_number(evaluated):
    results, run = found(evaluated), runs.load(evaluated)
    one = results[f"fd_pixels_{COUNT}"]
    protocol = one["protocol"]
    assert protocol["reference"]["data"] == "digits" and protocol["reference"]["images"] == 1541
    assert protocol["features"]["name"] == "pixels" and protocol["samples"] == COUNT
    picked = ("sampler", "chain", "clip", "rounding", "parameters", "checkpoint")
    expected = ["ancestral", "all", True, "nearest of 256 levels", "ema", "given"]
    assert [protocol[key] for key in picked] == expected
    assert one["estimator"] == {"seed": 0} and one["better"] == "lower"
    assert one["standard_error"] > 0
    subject = one["subject"]
    assert subject["checkpoint"] == 10
    assert subject["parameters_crc32"] == runs.fingerprint(run.params)
    assert subject["config"]["diffusion"]["num_steps"] == 20
    assert one["provenance"]["devices"] == "1 cpu" and one["provenance"]["seconds"] > 0
    assert one["provenance"]["versions"]["jax"] == jax.__version__
    bound = results["bits_per_dim_test"]
    assert bound["protocol"]["images"] == 50 and bound["protocol"]["split"] == "test"
    assert bound["estimator"] == {"seed": 0, "terms": "all", "draws": 1}
    assert bound["unit"] == "bits/dim" and results["rmse_test"]["unit"] == "RMSE on 0–255"


def test_nothing_is_measured_twice(evaluated, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluators.bound, "measure", refuse)
    monkeypatch.setattr(generation, "generate", refuse)
    before = found(evaluated)
    assert evaluate(evaluated) == 0
    assert capsys.readouterr().out.count("measured before") == len(before) == 8
    assert found(evaluated) == before


def test_other_metrics_take_the_samples_and_features_that_are_there(
    evaluated, tmp_path, monkeypatch
):
    workdir = shutil.copytree(evaluated, tmp_path / "run")

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluators, "collect", refuse)
    monkeypatch.setattr(generation, "draw", refuse)
    assert evaluate(workdir, evaluation__metrics="prdc_pixels") == 0
    assert 0 <= found(workdir)[f"recall_pixels_{COUNT}"]["value"] <= 1


def test_parts_of_the_terms_and_several_draws(run_directory, tmp_path):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    metrics = {"evaluation__metrics": "bits_per_dim"}
    assert evaluate(workdir, **metrics) == 0
    whole = found(workdir)["bits_per_dim_test"]
    shutil.rmtree(workdir / "evaluation")
    assert evaluate(workdir, **metrics, evaluation__terms=10, evaluation__draws=8) == 0
    part = found(workdir)["bits_per_dim_test"]
    assert part["estimator"] == {"seed": 0, "terms": 10, "draws": 8}
    assert part["protocol"] == whole["protocol"]
    noise = part["details"]["noise_standard_error"]
    assert abs(part["value"] - whole["value"]) < 4 * np.hypot(noise, noise * np.sqrt(8))


def test_the_parameters_themselves_are_told_from_their_average(evaluated, tmp_path):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation")
    assert evaluate(workdir, evaluation__ema="false") == 0
    raw, ema = found(workdir), found(evaluated)
    assert raw["bits_per_dim_test"]["protocol"]["parameters"] == "raw"
    for name in raw:
        if not name.startswith("prior"):
            assert raw[name]["value"] != ema[name]["value"], name
    assert len(list((workdir / "samples").glob(f"*_{COUNT}.npz"))) == 2


@pytest.mark.parametrize("stage", ["_bound_", "samples", "_pixels_"])
def test_interrupted_it_goes_on(run_directory, evaluated, tmp_path, monkeypatch, capsys, stage):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    original = files.replace_with
    hit = []

    def interrupting(path, write):
        original(path, write)
        piece = path.suffix == ".npz" and path.parent.suffix == ".parts"
        here = stage in path.parent.name or stage == path.parent.parent.name
        if piece and here and not hit:
            hit.append(path)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "replace_with", interrupting)
    assert evaluate(workdir) == 75
    assert "the same command goes on" in capsys.readouterr().err and len(hit) == 1
    assert evaluate(workdir) == 0
    again, whole = found(workdir), found(evaluated)
    assert again.keys() == whole.keys()
    for name in whole:
        assert again[name]["value"] == whole[name]["value"], name
    assert not list(workdir.glob("*/*.parts"))


BAD = {
    "no such metric": ({"evaluation__metrics": "fjd"}, "fjd: no such metric; choose bits_per_dim"),
    "pixels classify": ({"evaluation__metrics": "is_pixels"}, "pixels are none"),
    "no metric": ({"evaluation__metrics": "()"}, "metrics is empty"),
    "too few": (
        {"evaluation__metrics": "fdinf_pixels", "evaluation__count": 20},
        "fdinf_pixels: 20 samples; it needs at least 1,280",
    ),
    "no split": ({"evaluation__split": "tst"}, "evaluation.split=tst: digits has the splits"),
    "few real": (
        {"evaluation__metrics": "prdc_pixels", "evaluation__reference_count": 5},
        "prdc_pixels: 5 real images; it needs at least 6",
    ),
    "odd checkpoint": ({"evaluation__checkpoint": "²"}, "choose newest, best, or a step"),
    "more than there are": ({"evaluation__max_images": 999}, "only 256 images"),
    "reference count": ({"evaluation__reference_count": 1600}, "only 1541 images"),
    "long chain": (
        {"evaluation__steps": 21},
        "evaluation.steps=21 is more than diffusion.num_steps=20",
    ),
    "one term": ({"evaluation__terms": 1}, "choose 2 or more"),
    "no weights": ({"evaluation__metrics": "fid"}, "pt_inception-2015-12-05-6726825d.pth"),
    "no best": ({"evaluation__checkpoint": "best"}, "train.keep_best"),
    "no checkpoint": ({"evaluation__checkpoint": "third"}, "choose newest, best, or a step"),
    "no statistics": ({"evaluation__statistics": "nowhere.npz"}, "no file nowhere.npz"),
    "another size": (
        {"data__image_size": 16, "evaluation__split": "test"},
        "data.image_size was 8, is 16",
    ),
    "flag": ({}, "--selftest belongs to --mode=evaluate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_clear_line(run_directory, tmp_path, capsys, case):
    overrides, message = BAD[case]
    if case == "flag":
        assert main([f"--workdir={run_directory}", "--mode=sample", "--selftest"]) == 2
    else:
        assert evaluate(run_directory, **overrides) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (run_directory / "evaluation").exists()


def test_arrays_and_picture_are_made_where_only_the_numbers_are(evaluated, tmp_path, capsys):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    (arrays,) = (workdir / "evaluation").glob("*_bound_test_*.npz")
    (picture,) = (workdir / "evaluation").glob("*_nearest_pixels_*.png")
    whole = np.load(arrays)["terms"]
    arrays.unlink(), picture.unlink()
    assert evaluate(workdir) == 0
    np.testing.assert_array_equal(np.load(arrays)["terms"], whole)
    assert picture.exists() and found(workdir).keys() == found(evaluated).keys()


def test_a_bound_that_is_there_gives_the_rest_of_its_results(evaluated, tmp_path, monkeypatch):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    for path in (workdir / "evaluation").glob("step10_r*_test_*.json"):
        path.unlink()

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluators.bound, "measure", refuse)
    assert evaluate(workdir, evaluation__metrics="bits_per_dim") == 0
    again, whole = found(workdir), found(evaluated)
    for name in ("rate_test", "rmse_test"):
        assert again[name]["value"] == whole[name]["value"]


def test_damaged_results_are_measured_again(evaluated, tmp_path, caplog):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    (manifest_file,) = (workdir / "evaluation").glob(f"step10_kd_pixels_{COUNT}_*.json")
    (features,) = (workdir / "evaluation").glob("step10_pixels_*.npz")
    manifest_file.write_text(manifest_file.read_text()[:100])
    features.write_bytes(features.read_bytes()[:-50])
    assert evaluate(workdir) == 0
    again, whole = found(workdir), found(evaluated)
    name = f"kd_pixels_{COUNT}"
    assert again[name]["value"] == whole[name]["value"]
    assert "measured again" in caplog.text and "cannot be read" in caplog.text


def test_a_result_of_another_process_is_another(evaluated, tmp_path):
    workdir = shutil.copytree(evaluated, tmp_path / "run")
    config = workdir / "config.json"
    config.write_text(config.read_text().replace("fixed_small", "fixed_large"))
    assert evaluate(workdir, evaluation__metrics="bits_per_dim") == 0
    files_of_it = (workdir / "evaluation").glob("step10_bits_per_dim_test_*.json")
    values = {json.loads(path.read_text())["value"] for path in files_of_it}
    assert len(values) == 2


def test_samples_are_drawn_once_for_all_networks(run_directory, tmp_path, monkeypatch):
    run = runs.load(run_directory)
    run.config.evaluation.update(count=6, cache_dir=str(tmp_path), metrics=("fd_pixels",))
    calls = []
    original = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *a, **k: calls.append(1) or original(*a, **k))
    drawer = drawing.Drawer(print)
    for name in ("one", "two"):
        own = features.from_function(name, lambda x: x.reshape(len(x), -1)[:, :3] / 1.0)
        evaluator = evaluators.QualityEvaluator(run, own, ["fd"], print, drawer)
        results = dict(evaluator(run.step, run.params))
        assert results[f"fd_{name}_6"] > 0 and results[f"fd_{name}_6"].standard_error > 0
    assert calls == [1]


def test_a_place_that_cannot_be_written_is_one_line(run_directory, capsys):
    metrics = {"evaluation__metrics": "fd_pixels", "evaluation__count": 4}
    assert evaluate(run_directory, **metrics, evaluation__cache_dir="/proc/nowhere") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: /proc/nowhere") and error.count("\n") == 1


def test_a_selftest_without_weights_names_them(tmp_path, capsys):
    cache = f"--config.evaluation.cache_dir={tmp_path}"
    assert main(["--mode=evaluate", "--selftest", cache]) == 2
    error = capsys.readouterr().err
    assert "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2" in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_does_not_exist_is_named(run_directory, capsys):
    assert evaluate(run_directory, evaluation__checkpoint=7) == 1
    assert "no checkpoint 7" in capsys.readouterr().err


def test_statistics_of_another_protocol_are_refused(evaluated, run_directory, tmp_path, capsys):
    (cached,) = (evaluated / "cache").glob("pixels_digits_train_*.npz")
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    only = {"evaluation__metrics": "fd_pixels", "evaluation__statistics": cached}
    assert evaluate(workdir, **only) == 0
    assert found(workdir)[f"fd_pixels_{COUNT}"]["value"] == pytest.approx(
        found(evaluated)[f"fd_pixels_{COUNT}"]["value"], rel=1e-12
    )
    shutil.rmtree(workdir / "evaluation")
    assert evaluate(workdir, **only, evaluation__reference_mirror="true") == 2
    error = capsys.readouterr().err
    assert "holds features with mirror=False, not True" in error and error.count("\n") == 1
    cut = tmp_path / "cut.npz"
    cut.write_bytes(cached.read_bytes()[:-40])
    assert evaluate(workdir, **only | {"evaluation__statistics": cut}) == 2
    error = capsys.readouterr().err
    assert "cut.npz" in error and error.count("\n") == 1


@pytest.mark.slow
def test_eight_devices_measure_the_same(evaluated, run_directory, tmp_path):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    settings = {key.replace(".", "__"): value for key, value in SMALL.items()}
    argv = arguments(
        workdir, "evaluate", train__steps=10, evaluation__cache_dir=tmp_path / "c", **settings
    )
    process = start(argv[1:], devices=8)
    assert process.wait(timeout=300) == 0, process.communicate()
    eight, one = found(workdir), found(evaluated)
    assert eight["bits_per_dim_test"]["provenance"]["devices"] == "8 cpu"
    for name in ("bits_per_dim_test", "rate_test", "distortion_test", "rmse_test"):
        assert eight[name]["value"] == pytest.approx(one[name]["value"], rel=1e-5), name
    # Samples agree but for values that rounding puts on the other side of a level.
    for name in (f"fd_pixels_{COUNT}", f"kd_pixels_{COUNT}", f"nearest_pixels_{COUNT}"):
        assert eight[name]["value"] == pytest.approx(one[name]["value"], rel=1e-2), name


def test_a_number_is_written_to_the_digits_that_its_error_leaves():
    assert manifest.Measured(4.4801, 0.0213, "bits/dim").text() == "4.480 ± 0.021 bits/dim"
    assert manifest.Measured(123.4, 12.3).text() == "123 ± 12"
    assert manifest.Measured(1.25).text() == "1.25"
    assert manifest.Measured(1.2e-9, 3e-11).text() == "1.2e-09 ± 3e-11"


@pytest.mark.slow
def test_two_hosts_measure_the_same(evaluated, run_directory, tmp_path):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {key.replace(".", "__"): value for key, value in SMALL.items()}
    argv = arguments(
        workdir, "evaluate", train__steps=10, evaluation__cache_dir=tmp_path / "c", **settings
    )
    hosts = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [start([*argv[1:], *hosts, f"--process_id={k}"]) for k in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, out + error
    two, one = found(workdir), found(evaluated)
    assert two.keys() == one.keys()
    assert two["bits_per_dim_test"]["provenance"]["hosts"] == 2
    for name in ("bits_per_dim_test", "rate_test", "distortion_test", "rmse_test"):
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-5), name
    for name in (f"fd_pixels_{COUNT}", f"kd_pixels_{COUNT}", f"nearest_pixels_{COUNT}"):
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-2), name
    assert not list(workdir.glob("*/*.parts"))
