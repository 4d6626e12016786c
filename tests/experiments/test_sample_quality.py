"""The table of a run's results: manifests and distances by hand, and nothing measured twice."""

import copy
import csv
import json
import shutil

import numpy as np
import pytest
from scipy import linalg
from untrained_runs import untrained

from ddpm_jax import generation, runs
from ddpm_jax import main as program
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import evaluators, manifest, names, reference
from experiments import common, quality_table, sample_quality

CHAIN = {"num_steps": 1000, "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
REAL = {"data": "cifar10", "split": "train", "images": 50000, "of": 50000, "mirror": False}
BOUND = {
    "data": "cifar10",
    "split": "test",
    "images": 10000,
    "of": 10000,
    "parameters": "ema",
    "checkpoint": "given",
    "dtype": "float32",
    "chain": "all",
    "clip": True,
}
QUALITY = {
    "samples": 50000,
    "features": {"name": "inception"},
    "parameters": "ema",
    "checkpoint": "given",
    "dtype": "float32",
    "sampler": "ancestral",
    "chain": "all",
    "eta": 0.0,
    "clip": True,
    "reference": REAL,
}


def by_hand(name, value, error, protocol, crc="", objective="simple", prediction="eps", **more):
    """A manifest as a JSON object."""
    of_bound = "features" not in protocol
    config = {
        "data": {"name": "cifar10"},
        "diffusion": {"prediction": prediction, "variance": "fixed_large", **CHAIN},
        "train": {"objective": objective},
    }
    return {
        "name": name,
        "value": value,
        "standard_error": error,
        "unit": "bits/dim" if of_bound else "",
        "better": "lower",
        "protocol": protocol,
        "estimator": {"seed": 0, **({"terms": "all", "draws": 1} if of_bound else {})},
        "details": {} if of_bound else {"outside": 0.25},
        "subject": {"run": "r", "checkpoint": 10, "parameters_crc32": crc, "config": config},
        "provenance": {"time": "2026-01-01T00:00:00+00:00"},
        **more,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = {
        "evaluation__metrics": "bits_per_dim,fd_pixels,kd_pixels,nearest_pixels",
        "evaluation__split": "test",
        "evaluation__max_images": 20,
        "evaluation__count": 300,
        "sample__batch_size": 100,
        "evaluation__cache_dir": workdir / "cache",
    }
    return untrained(workdir, **settings)


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Pictures are made where the table is made first, and alone there: they take long."""
    if "missing" not in request.node.name:
        monkeypatch.setattr(common, "to_png", lambda figure: b"a picture")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    workdir = shutil.copytree(run, tmp_path_factory.mktemp("made") / "run")
    assert make(workdir) == 0
    return workdir


def make(workdir, *flags):
    """Runs the experiment; returns the exit code."""
    return sample_quality.main([f"--run={workdir}", *flags])


def table(workdir, files=""):
    """The table's lines by result, of manifests whose name contains this."""
    with (workdir / "figures" / "sample_quality.csv").open() as file:
        return {row["result"]: row for row in csv.DictReader(file) if files in row["file"]}


def put(workdir, *manifests):
    """Manifests of the run's parameters into its evaluation/, and images into its samples/."""
    run = runs.load(workdir)
    (workdir / "evaluation").mkdir(exist_ok=True)
    for k, content in enumerate(manifests):
        content["subject"]["parameters_crc32"] = runs.fingerprint(run.params)
        (workdir / "evaluation" / f"step10_hand{k}.json").write_text(json.dumps(content))
    (workdir / "samples").mkdir(exist_ok=True)
    run.config.sample.count = 20
    images = np.random.default_rng(0).integers(0, 256, size=(20, 8, 8, 1)).astype(np.uint8)
    outside = np.linspace(0, 0.19, 20).astype(np.float32)
    protocol = json.dumps(generation.sampling_protocol(run))
    path = workdir / "samples" / generation.target(run, workdir).name
    np.savez(path, images=images, outside=outside, protocol=protocol)
    return images


def test_what_is_missing_is_measured_and_shown(made):
    rows = table(made)
    there = [json.loads(path.read_text()) for path in (made / "evaluation").glob("*.json")]
    assert {m["name"] for m in there} == {
        *("bits_per_dim_test", "rate_test", "distortion_test", "rmse_test", "prior_test"),
        *("fd_pixels_300", "kd_pixels_300", "nearest_pixels_300"),
    }
    for m in there:
        row = rows[m["name"]]
        assert float(row["value"]) == pytest.approx(m["value"], rel=1e-5)
        assert float(row["standard_error"]) == pytest.approx(m["standard_error"], rel=1e-5)
        assert row["unit"] == m["unit"] and row["paper"] == ""
    words = rows["bits_per_dim_test"]["protocol"]
    assert "20 of 256 images of digits/test" in words and "chain of 20 steps, all terms" in words
    words = rows["fd_pixels_300"]["protocol"]
    assert words.startswith("300 samples: ancestral, all 20 steps, x̂_0 clipped")
    assert words.endswith("against all 1,541 images of digits/train; in pixels; seed 0")
    half = next(m for m in there if m["name"] == "nearest_pixels_300")["details"]
    real = float(rows["nearest_pixels_300"]["real"])
    assert real == pytest.approx(half["held_out_quantile_0.5"], rel=1e-5)


def flat(images):
    return np.float64(images.reshape(len(images), -1)) / 127.5 - 1


def fd(x, y):
    """Eigenvalues of a product of covariances are real; those of a singular one scatter about 0."""
    eigenvalues = linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real
    overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    traces = np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + traces - 2 * overlap


def kd(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("count", [256, 200])
def test_real_images_are_measured_at_equal_number(made, tmp_path, count):
    """Of more samples than the 256 held-out images in lines at 256, of fewer in their own."""
    workdir = made
    if count == 200:
        workdir = shutil.copytree(made, tmp_path / "run")
        shutil.rmtree(workdir / "samples")
        flags = ["--config.evaluation.count=200", "--config.evaluation.metrics=fd_pixels,kd_pixels"]
        assert make(workdir, *flags) == 0
    rows = table(workdir)
    (path,) = (workdir / "samples").glob("*.npz")
    samples = flat(generation.load_images(path)[0])
    assert len(samples) == (300 if count == 256 else 200)
    config = runs.RunDirectory.of(workdir).load_config()
    test, real = (flat(open_source(config, s).images(slice(None))) for s in ("test", "train"))
    test = test[np.arange(count) * 256 // count]
    for name, measure in {"fd": fd, "kd": kd}.items():
        row = rows[f"{name}_pixels_{count}"]
        assert float(row["value"]) == pytest.approx(measure(samples[:count], real), rel=2e-4)
        assert float(row["real"]) == pytest.approx(measure(test, real), rel=2e-4, abs=1e-7)
        assert (row["file"] == "") == (count == 256)
        assert float(row["real_standard_error"]) > 0
        assert f"{'the first ' if count == 256 else ''}{count} samples" in row["protocol"]
        assert rows[f"{name}_pixels_300"]["real"] == ""


def test_nothing_is_measured_twice(made, tmp_path, monkeypatch):
    workdir = shutil.copytree(made, tmp_path / "run")
    before = (workdir / "figures" / "sample_quality.csv").read_text()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    for evaluator in (evaluators.BoundEvaluator, evaluators.QualityEvaluator):
        monkeypatch.setattr(evaluator, "__call__", never)
    monkeypatch.setattr(generation, "draw", never)
    known = {name: (*least, never) for name, (*least, _) in quality_table.quality.METRICS.items()}
    monkeypatch.setattr(quality_table.quality, "METRICS", known)
    compile_extractor = reference.compile_extractor
    monkeypatch.setattr(reference, "compile_extractor", lambda *a: compile_extractor(*a) and never)
    assert make(workdir) == 0
    assert (workdir / "figures" / "sample_quality.csv").read_text() == before


def test_other_settings_of_the_evaluation_are_measured_beside(made, tmp_path):
    """A result of the same name does not stand for what is asked now."""
    workdir = shutil.copytree(made, tmp_path / "run")
    assert make(workdir, "--config.evaluation.max_images=12") == 0
    with (workdir / "figures" / "sample_quality.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["result"] == "bits_per_dim_test"]
    assert [row["protocol"].split(" of 256")[0] for row in rows] in (["12", "20"], ["20", "12"])


def test_a_larger_set_of_samples_is_taken(made, tmp_path, monkeypatch):
    workdir = shutil.copytree(made, tmp_path / "run")

    def never(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(generation, "draw", never)
    assert make(workdir, "--config.evaluation.count=100") == 0
    assert "fd_pixels_300" in table(workdir) and "fd_pixels_100" not in table(workdir)


def test_the_bound_is_not_measured_again_for_samples_of_another_seed(made, tmp_path):
    workdir = shutil.copytree(made, tmp_path / "run")
    flags = ["--config.seed=1", "--config.sample.count=310", "--config.sample.batch_size=100"]
    assert program.main([f"--workdir={workdir}", "--mode=sample", *flags]) == 0
    assert make(workdir) == 0
    with (workdir / "figures" / "sample_quality.csv").open() as file:
        rows = [(row["result"], row["protocol"][-6:]) for row in csv.DictReader(file)]
    assert [seed for name, seed in rows if name == "bits_per_dim_test"] == ["seed 0"]
    assert make(workdir, "--config.evaluation.count=310") == 0
    with (workdir / "figures" / "sample_quality.csv").open() as file:
        rows = [(row["result"], row["protocol"][-6:]) for row in csv.DictReader(file)]
    assert [seed for name, seed in rows if name == "bits_per_dim_test"] == ["seed 0"]
    assert ("kd_pixels_310", "seed 1") in rows


def test_another_sampler_is_measured_beside_the_first(made, tmp_path):
    workdir = shutil.copytree(made, tmp_path / "run")
    flags = ["--config.evaluation.metrics=kd_pixels", "--config.sample.steps=4"]
    assert make(workdir, *flags) == 0
    with (workdir / "figures" / "sample_quality.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["result"] == "kd_pixels_300"]
    manners = {row["protocol"].partition(" steps")[0] for row in rows}
    assert manners == {"300 samples: ancestral, all 20", "300 samples: ancestral, 4 of 20"}
    assert len({row["value"] for row in rows}) == 2


def test_manifests_by_hand_are_shown_with_the_paper_s_numbers(workdir, capsys, monkeypatch):
    images = put(
        workdir,
        *(by_hand(f"{name}_test", 3.7, 0.01, BOUND) for name in names.BOUND_RESULTS),
        by_hand("fid50k_inception", 3.2, 0.02, QUALITY),
        by_hand("is50k_inception", 9.5, 0.05, {k: QUALITY[k] for k in QUALITY if k != "reference"}),
    )
    other = by_hand("fd_pixels_10", 1.0, 0.1, QUALITY, crc="00000000")
    (workdir / "evaluation" / "step5_other.json").write_text(json.dumps(other))
    (workdir / "evaluation" / "step10_half.json").write_text('{"name": "fd')
    drawn, draw = [], sample_quality.draw
    monkeypatch.setattr(sample_quality, "draw", lambda *a: drawn.append(a) or draw(*a))
    assert make(workdir, "--config.evaluation.metrics=bits_per_dim", "--count=9") == 0
    rows = table(workdir, "hand") | {"out_of_range": table(workdir)["out_of_range"]}
    assert "left out" in capsys.readouterr().out and "fd_pixels_10" not in rows
    assert rows["bits_per_dim_test"]["paper"] == "≤ 3.75"
    assert rows["fid50k_inception"]["paper"] == "3.17"
    assert rows["is50k_inception"]["paper"] == "9.46 ± 0.11"
    assert float(rows["fid50k_inception"]["out_of_range"]) == 0.25
    outside = np.linspace(0, 19, 20)
    assert float(rows["out_of_range"]["value"]) == pytest.approx(9.5)
    error = outside.std(ddof=1) / np.sqrt(20)
    assert float(rows["out_of_range"]["standard_error"]) == pytest.approx(error, rel=1e-4)
    text = (workdir / "figures" / "sample_quality.md").read_text()
    assert "| result | value | paper | protocol |" in text
    assert "| fid50k_inception | 3.200 ± 0.020 | 3.17 | 3 |" in text
    assert "\n3. 50,000 samples: ancestral, all 1,000 steps, x̂_0 clipped; the parameters'" in text
    ((samples, real, *_),) = drawn
    np.testing.assert_array_equal(samples, images[:9])
    train_images = open_source(runs.RunDirectory.of(workdir).load_config(), "train").images(
        slice(None)
    )
    np.testing.assert_array_equal(real, train_images[np.arange(9) * 1541 // 9])


def read(content, tmp_path):
    (tmp_path / "step1.json").write_text(json.dumps(content))
    return manifest.load(tmp_path / "step1.json")


@pytest.mark.parametrize(
    "change",
    [
        {"chain": 100},
        {"dtype": "bfloat16"},
        {"clip": False},
        {"parameters": "raw"},
        {"sampler": "ddim"},
        {"reference": REAL | {"data": "digits"}},
        {"reference": REAL | {"split": "test"}},
        {"reference": REAL | {"images": 10000}},
        {"reference": REAL | {"mirror": True}},
    ],
)
def test_the_paper_s_number_stands_by_what_was_measured_alike(tmp_path, change):
    fid = lambda change, **of: quality_table.paper_s(  # noqa: E731
        read(by_hand("fid50k_inception", 3.2, 0.1, QUALITY | change, **of), tmp_path)
    )
    assert fid({}) == "3.17" and fid({}, objective="vlb") == "13.51"
    assert fid({}, prediction="mu") == fid({}, objective="hybrid") == ""
    assert fid(change) == ""
    other = by_hand("fid50k_inception", 3.2, 0.1, QUALITY)
    other["subject"]["config"]["diffusion"]["schedule"] = "cosine"
    assert quality_table.paper_s(read(other, tmp_path)) == ""
    learned = by_hand("fid50k_inception", 3.2, 0.1, QUALITY)
    learned["subject"]["config"]["diffusion"]["variance"] = "learned"
    assert quality_table.paper_s(read(learned, tmp_path)) == ""
    bits = by_hand("bits_per_dim_train", 3.7, 0.1, BOUND | {"split": "train"}, objective="vlb")
    assert quality_table.paper_s(read(bits, tmp_path)) == "≤ 3.69"
    for change in ({"chain": 100}, {"images": 1000}):
        other = copy.deepcopy(bits)
        other["protocol"] |= change
        assert quality_table.paper_s(read(other, tmp_path)) == ""


def test_the_protocol_is_told_in_words(tmp_path):
    ddim = QUALITY | {"sampler": "ddim", "chain": 50, "eta": 0.5, "clip": False, "samples": 5000}
    ddim |= {"parameters": "raw", "dtype": "bfloat16", "checkpoint": "best by fid50k_inception"}
    ddim |= {"reference": REAL | {"images": 2000, "mirror": True}}
    words = quality_table.in_words(read(by_hand("fd_inception_5k", 3, 1, ddim), tmp_path))
    assert words == (
        "5,000 samples: ddim, 50 of 1,000 steps, η = 0.5, x̂_0 not clipped; the parameters "
        "themselves, best by fid50k_inception, bfloat16; against 2,000 of 50,000 images of "
        "cifar10/train and their mirror images; in inception features; seed 0"
    )
    some = by_hand("bits_per_dim_test", 3, 1, BOUND | {"images": 100, "chain": 250})
    some["estimator"] |= {"terms": 30, "draws": 2}
    assert quality_table.in_words(read(some, tmp_path)) == (
        "100 of 10,000 images of cifar10/test; chain of 250 steps, 30 stratified terms an image at "
        "2 draws of the noise; x̂_0 clipped; the parameters' moving average; seed 0"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count=0"], "--count=0: at least 1"),
        (["--config.evaluation.reference=valid"], "digits has the splits train, test"),
        (["--config.evaluation.metrics=fid", "--config.evaluation.weights=/no"], "no weights"),
        (["--config.evaluation.metrics=fid2"], "no such metric"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(workdir, capsys, flags, words):
    assert make(workdir, *flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (workdir / "figures" / "sample_quality.md").exists()
    assert not list((workdir / "samples").glob("*.npz"))
