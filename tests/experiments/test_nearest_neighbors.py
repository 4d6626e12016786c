"""The neighbours of planted samples, against scikit-learn and distances by hand."""

import copy
import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from untrained_runs import untrained

from ddpm_jax import generation, runs
from ddpm_jax.config import RequestError
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import evaluators, neighbors, reference
from experiments import common, nearest_neighbors, sample_sets

NEVER = AssertionError("computed again")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "run", evaluation__count=40)


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Pictures are made in one test alone: they take longer than all else."""
    if "two_spaces" not in request.node.name:
        monkeypatch.setattr(common, "to_png", lambda figure: b"a picture")


def study(workdir, *flags, features="pixels"):
    """Runs the experiment; returns the exit code."""
    cache = f"--config.evaluation.cache_dir={workdir}/cache"
    features = [f"--features={features}"] if features else []
    return nearest_neighbors.main([f"--run={workdir}", cache, *features, *flags])


def table(workdir):
    with (workdir / "figures" / "nearest_neighbors.csv").open() as file:
        return list(csv.DictReader(file))


def images_of(workdir, split):
    source = open_source(runs.RunDirectory.of(workdir).load_config(), split)
    return source.images(np.arange(len(source)))


def flat(images):
    return np.float64(images.reshape(len(images), -1)) / 127.5 - 1


@pytest.fixture(scope="module")
def loaded(run):
    return runs.load(run)


@pytest.fixture
def plant(loaded, workdir):
    """Puts images in the place of the run's samples, as if its parameters had drawn them."""

    def put(images):
        run = dataclasses.replace(loaded, config=copy.deepcopy(loaded.config))
        run.config.sample.count = len(images)
        path = workdir / "samples" / generation.target(run, workdir).name
        path.parent.mkdir(exist_ok=True)
        protocol = json.dumps(generation.sampling_protocol(run))
        np.savez(path, images=images, outside=np.zeros(len(images), np.float32), protocol=protocol)

    return put


@pytest.fixture
def planted(plant, workdir):
    """Noise, but for three copies of training images and two that are almost copies."""
    rng, real = np.random.default_rng(0), images_of(workdir, "train")
    images = rng.integers(0, 256, size=(30, 8, 8, 1)).astype(np.uint8)
    images[[4, 11, 29]] = real[[700, 3, 1500]]
    images[[2, 20]] = real[[10, 20]] ^ np.uint8(4)
    plant(images)
    return images


def shown_by(workdir, monkeypatch, *flags):
    drawn = []
    keep = lambda shown, *rest: drawn.append((shown, *rest)) or draw(shown, *rest)  # noqa: E731
    draw = nearest_neighbors.draw
    monkeypatch.setattr(nearest_neighbors, "draw", keep)
    assert study(workdir, *flags) == 0
    return drawn[0]


def test_the_neighbours_are_scikit_learn_s(workdir, planted, monkeypatch):
    images, real = planted, images_of(workdir, "train")
    (one,), samples, split, held_out = shown_by(workdir, monkeypatch, "--neighbors=4")
    np.testing.assert_array_equal(samples, images)
    assert (split, held_out) == ("train", "test")
    finder = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(flat(real))
    distances, positions = finder.kneighbors(flat(images))
    np.testing.assert_allclose(one.distances, distances / 8, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(one.positions, positions)
    new, _ = finder.kneighbors(flat(images_of(workdir, "test")), n_neighbors=1)
    np.testing.assert_allclose(one.held_out, new[:, 0] / 8, rtol=1e-6, atol=1e-7)
    # The closest first: copies, then what is almost one.
    assert set(one.rows[:3]) == {4, 11, 29} and set(one.rows[3:5]) == {2, 20}
    np.testing.assert_array_equal(one.neighbors, real[positions[one.rows]])
    arrays = np.load(workdir / "evaluation" / one.arrays)
    np.testing.assert_array_equal(arrays["positions"], positions)


def test_memorisation_is_told(workdir, planted, monkeypatch, capsys):
    pictures = []
    monkeypatch.setattr(common, "to_png", lambda figure: pictures.append(figure) or b"a picture")
    images, real = flat(planted), flat(images_of(workdir, "train"))
    assert study(workdir) == 0
    (row,) = table(workdir)
    near = np.sqrt(np.square(images[:, None] - real).mean(-1)).min(axis=1)
    new = np.square(flat(images_of(workdir, "test"))[:, None] - real).mean(-1) ** 0.5
    new = np.sort(new.min(axis=1))
    limit = new[1] + 0.57 * (new[2] - new[1])  # The 257th parts end at the 256 images: 2.57th.
    assert float(row["copies"]) == 3 and float(row["held_out_copies"]) == (new == 0).sum()
    assert float(row["held_out_quantile_0.5"]) == pytest.approx(np.median(new), rel=1e-5)
    assert float(row["median"]) == pytest.approx(np.median(near), rel=1e-5)
    assert (near < limit).mean() == 5 / 30
    assert float(row["memorization_limit"]) == pytest.approx(limit, rel=1e-5)
    (figure,) = pictures
    above, below = figure.axes
    (line,) = [x for x in below.lines if x.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(limit, rel=1e-6)
    shown = [x for x in above.texts if x.get_text()[:2] in ("0.", "1.")]
    assert [x.get_color() == "tab:red" for x in shown] == [
        float(x.get_text()) < limit for x in shown
    ]
    assert len({x.get_color() for x in shown}) == 2
    assert float(row["memorization"]) == pytest.approx(5 / 30, rel=1e-5)
    assert row["samples"] == "30" and row["held_out_images"] == "256"
    said = capsys.readouterr().out
    share, error = 100 * 5 / 30, 100 * np.sqrt(5 / 30 * 25 / 30 / 29)
    assert f"{share:.1f} ± {error:.1f} % of the samples are closer" in said
    assert "3 of 30 samples are copies" in said
    # What an honest sample's share is expected to be, from many held-out sets of 256.
    draws = np.random.default_rng(1).uniform(size=(20_000, 256))
    below = np.quantile(draws, 0.01, axis=1, method="weibull")
    assert f"(expected: {100 * below.mean():.1f} ± {100 * below.std():.1f} %)" in said


def test_the_first_samples_can_be_shown(workdir, planted, monkeypatch):
    (one,), *_ = shown_by(workdir, monkeypatch, "--show=first")
    assert list(one.rows) == list(range(8)) and one.neighbors.shape == (8, 5, 8, 8, 1)


def test_mirror_images_and_parts_of_the_reference(workdir, plant, monkeypatch):
    real = images_of(workdir, "train")[np.arange(300) * 1541 // 300]
    both = np.concatenate([real, real[:, :, ::-1]])
    plant(both[[250, 299, 300, 450, 599]])
    flags = ("--config.evaluation.reference_count=300", "--config.evaluation.reference_mirror=1")
    (one,), *_ = shown_by(workdir, monkeypatch, *flags, "--neighbors=3", "--show=first")
    _, positions = NearestNeighbors(n_neighbors=3).fit(flat(both)).kneighbors(flat(both))
    np.testing.assert_array_equal(one.neighbors[:, 0], both[[250, 299, 300, 450, 599]])
    np.testing.assert_array_equal(one.neighbors, both[positions[[250, 299, 300, 450, 599]]])


def test_nothing_is_computed_twice(workdir, plant, monkeypatch, capsys):
    assert study(workdir) == 0
    first = (workdir / "figures" / "nearest_neighbors.csv").read_text()
    drawn = list((workdir / "samples").glob("*.npz"))
    assert [path.name.rpartition("_")[2] for path in drawn] == ["40.npz"]
    # Beside what the evaluation keeps, such as features: neighbours of samples and of new images.
    assert len(list((workdir / "evaluation").glob("*_nearest_neighbors_*.npz"))) == 2

    def never(*args, **kwargs):
        raise NEVER

    with monkeypatch.context() as patched:
        patched.setattr(generation, "draw", never)
        patched.setattr(nearest_neighbors, "neighbors_of", never)
        patched.setattr(evaluators, "neighbors_of", never)
        compile_extractor = reference.compile_extractor
        computed = lambda *a: compile_extractor(*a) and never  # noqa: E731
        patched.setattr(reference, "compile_extractor", computed)
        assert study(workdir, "--show=first") == 0
        assert (workdir / "figures" / "nearest_neighbors.csv").read_text() == first
        assert list((workdir / "samples").glob("*.npz")) == drawn
    # The largest set is taken, or that of the number asked for, or of the sampler.
    plant(np.zeros((50, 8, 8, 1), np.uint8))
    assert study(workdir) == 0 and table(workdir)[0]["samples"] == "50"
    assert study(workdir, "--count=40") == 0 and table(workdir)[0]["samples"] == "40"
    capsys.readouterr()
    assert study(workdir, "--config.sample.steps=7", "--count=12") == 0
    assert "drawing 12 with 7 of 20 steps" in capsys.readouterr().out


def test_of_other_parameters_no_samples_are_taken(workdir, planted):
    (path,) = (workdir / "samples").glob("*.npz")
    arrays = dict(np.load(path))
    protocol = json.loads(str(arrays["protocol"])) | {"parameters_crc32": "00000000"}
    np.savez(path.with_name("step9_other.npz"), **arrays | {"protocol": json.dumps(protocol)})
    path.unlink()
    assert study(workdir) == 0 and table(workdir)[0]["samples"] == "40"


def test_a_chain_is_shortened_where_it_can_be(workdir, loaded, monkeypatch, capsys):
    monkeypatch.setattr(sample_sets, "STEPS", 5)
    assert study(workdir) == 0
    assert "drawing 40 with 5 of 20 steps" in capsys.readouterr().out
    run = dataclasses.replace(loaded, config=copy.deepcopy(loaded.config))
    run.config.diffusion.variance = "learned"
    directory = runs.RunDirectory.of(workdir / "elsewhere")
    directory.save_config(run.config)
    learned = sample_sets.Study("a", run, directory, None, print)
    drawn = sample_sets.drawn_by(learned).config.sample
    assert (drawn.count, drawn.steps) == (sample_sets.COUNT_ALL_STEPS, 0)


def test_without_a_network_pixels_are_shown_alone(workdir, monkeypatch, capsys):
    make = sample_sets.make_extractor

    def missing(name, *rest):
        if name == "pixels":
            return make(name, *rest)
        raise RequestError(f"{name} is not installed")

    monkeypatch.setattr(sample_sets, "make_extractor", missing)
    assert study(workdir, features="") == 0
    assert [row["features"] for row in table(workdir)] == ["pixels"]
    assert "pixels alone: effnetlite0_64 is not installed" in capsys.readouterr().out
    assert study(workdir, features="pixels,effnetlite0_64") == 2
    assert "effnetlite0_64 is not installed" in capsys.readouterr().err
    assert study(workdir, "--config.evaluation.weights=/no/file", features="") == 2


def test_two_spaces_stand_beside_each_other(workdir, planted, plant, monkeypatch):
    """The second one looks at the images' upper half alone."""
    images = planted
    half = sample_sets.make_extractor("pixels")
    upper = lambda params, x: half.apply(params, x[:, :4])  # noqa: E731
    upper = dataclasses.replace(half, name="upper", identity={"network": "upper"}, apply=upper)
    make = lambda name, *rest: upper if name == "upper" else half  # noqa: E731
    monkeypatch.setattr(sample_sets, "make_extractor", make)
    plant(images[:25])
    monkeypatch.setattr(evaluators.names, "FEATURES", "pixels|upper")
    keep = []
    draw = nearest_neighbors.draw
    monkeypatch.setattr(nearest_neighbors, "draw", lambda *a: keep.append(a[0]) or draw(*a))
    assert study(workdir, features="pixels,upper") == 0
    ((whole, top),) = keep
    real = images_of(workdir, "train")
    for one, rows in ((whole, 8), (top, 4)):
        finder = NearestNeighbors(n_neighbors=1).fit(flat(real[:, :rows]))
        distances, _ = finder.kneighbors(flat(images[:, :rows]))
        np.testing.assert_allclose(
            one.distances[:, 0], distances[:, 0] / np.sqrt(8 * rows), rtol=1e-6, atol=1e-7
        )
    assert [row["features"] for row in table(workdir)] == ["pixels", "upper"]
    with Image.open(workdir / "figures" / "nearest_neighbors.png") as picture:
        assert min(picture.size) > 1000


def test_without_held_out_images_their_curve_is_left_out(workdir, planted, monkeypatch, capsys):
    (one,), *_, held_out = shown_by(workdir, monkeypatch, "--config.evaluation.split=train")
    assert one.held_out is None and held_out == ""
    said = capsys.readouterr().out
    assert "holds nothing out from train" in said and "no held-out images" in said
    (row,) = table(workdir)
    assert row["memorization"] == row["held_out_images"] == row["held_out_copies"] == ""
    assert float(row["copies"]) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--neighbors=0"], "--neighbors=0: at least 1"),
        (["--neighbors=1542"], "--neighbors=1542: train of digits gives 1541 images"),
        (["--count=1"], "--count=1: at least 2"),
        (["--features=pixel"], "no features are called pixel"),
        (["--features=,"], "--features is empty"),
        (["--config.evaluation.split=valid"], "digits has the splits train, test"),
        (["--config.evaluation.reference_count=2000"], "only 1541 images"),
        (["--show=best"], "invalid choice: 'best'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(workdir, capsys, flags, words):
    assert study(workdir, *flags, features="" if "--features" in flags[0] else "pixels") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (workdir / "figures" / "nearest_neighbors.png").exists()
    assert not list((workdir / "samples").glob("*.npz"))


def test_the_evaluation_s_number_is_the_figure_s(workdir, planted):
    """What the figure says is what `nearest_neighbors` makes of the same features."""
    images = planted
    assert study(workdir) == 0
    (path,) = (workdir / "evaluation").glob("*nearest_pixels_30_*.json")
    expected = neighbors.nearest_neighbors(
        flat(images), flat(images_of(workdir, "train")), flat(images_of(workdir, "test"))
    )
    assert json.loads(path.read_text())["value"] == pytest.approx(expected.value, rel=1e-6)
    shown = json.loads((workdir / "figures" / "nearest_neighbors.json").read_text())
    assert shown["protocol"]["spaces"]["pixels"]["samples"] == 30
