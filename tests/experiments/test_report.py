"""The report of a run: what it says is what the files say."""

import base64
import csv
import html
import importlib.util
import io
import itertools
import json
import os
import re
import urllib.parse

import numpy as np
import pytest
import report_data as made
from PIL import Image

from ddpm_jax import figures
from experiments import report
from experiments.reporting.html import data, el, plain, reduced
from experiments.reporting.plots import thinned
from experiments.reporting.reading import Table
from experiments.reporting.run_page import STUDIES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = made.full_run(tmp_path_factory.mktemp("runs") / "a <b>run</b> & more")
    assert report.main([f"--run={directory.path}"]) == 0
    return directory, made.Page(directory.path / "report.html")


def shown(run):
    assert report.main([f"--run={run.path}"]) == 0
    return made.Page(run.path / "report.html")


def pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_curves_are_those_of_the_metrics(whole):
    (choice,) = whole[1].plot("loss")["choices"]
    assert choice["series"][0]["x"] == [*made.STEPS, 40]
    assert choice["series"][0]["y"] == pytest.approx([1 / 10, 1 / 20, 1 / 30, 0.01], rel=1e-5)
    assert made.HOSTILE in {spec["choices"][0]["label"] for spec in whole[1].json("spec")}
    (evaluated,) = whole[1].plot("evaluated")["choices"]
    (series,) = evaluated["series"]
    assert (series["x"], series["y"], series["error"]) == ([30], [4.0], [0.5])


def test_bits_per_t_skip_times_without_images_and_name_the_decoder_t_1(whole):
    plot = whole[1].plot("bits-per-t")
    (series,) = plot["choices"][0]["series"]
    assert series["x"] == [1, 2, 3, 4, 6, 7, 8, 9, 10]  # L_4, of t = 5, was not measured.
    assert series["y"][0] == 2.0
    assert series["y"][-1] == pytest.approx(2.0 - 9 * 0.19, rel=1e-5)  # L_9; L_T is in the note.
    assert series["error"][0] == 0.2
    assert series["error"][4] is None  # L_5 is of one image.
    assert series["name"] == "test, step 30, chain all"
    assert "L_T in bits/dim, 0.1 (test, step 30, chain all)" in whole[1].text
    assert plot["x"]["title"] == "t, index of the chain"


def test_the_errors_and_the_rate_over_t_belong_to_x_t(whole):
    _, x0, eps, rate = whole[1].plot("bits-per-t")["choices"]
    for choice, at_1, at_10, error in (
        (x0, 127.5**2 * 0.001, 127.5**2 * 0.01, 127.5**2 * 0.0001),
        (eps, 0.85, 0.4, 0.085),
        (rate, 4.7, 2.0, 0.47),
    ):
        (series,) = choice["series"]
        assert series["x"] == list(range(1, 11))
        assert (series["y"][0], series["y"][-1]) == pytest.approx((at_1, at_10), rel=1e-5)
        assert series["error"][0] == pytest.approx(error, rel=1e-5)


def test_results_of_other_protocols_stand_beside_each_other(tmp_path):
    run = made.make_run(tmp_path / "run")
    split = {"split": "test"}
    arrays = made.bound_arrays()
    made.add_result(run, "bits_per_dim_test", 3.0, arrays=arrays, chain="all", clip=True, **split)
    short = {"diffusion": {"num_steps": 1000}, "evaluation": {"steps": 100, "metrics": ["fid"]}}
    path = made.add_result(
        run, "bits_per_dim_test", 5.0, "2027", 31, arrays, short, chain=100, clip=True, **split
    )
    made.add_result(run, "bits_per_dim_test", 4.0, step=20, arrays=arrays, chain=100, clip=False)
    page = shown(run)
    assert {"3.000 ± 0.020 bits/dim", "5.000 ± 0.020 bits/dim"} <= {*page.cells}
    assert "chain 100; clip True; split test. Estimated with terms 30, draws 2" in page.text
    assert dict(page.tiles)["bits_per_dim_test"] == "3.000 ± 0.020 bits/dim"  # The config's own.
    names = [s["name"] for s in page.plot("bits-per-t")["choices"][0]["series"]]
    assert [name[:27].rstrip(",") for name in names if "step 30" in name] == [
        "test, step 30, chain all, c"
    ]
    assert sorted(name.partition(", ")[2].partition(", clip")[0] for name in names) == [
        *("step 20, chain 100", "step 30, chain all", "step 31, chain 100")
    ]
    for other in run.evaluation.glob("*.json"):
        if other.name != path.name:
            other.unlink()
    assert dict(shown(run).tiles)["bits_per_dim_test, evaluation.steps 100"].startswith("5.000")


def test_the_newest_result_of_a_name_counts_and_has_its_error(whole):
    assert "4.560 ± 0.020" in whole[1].text
    assert "9.87" not in whole[1].text


def test_rate_and_distortion_leave_out_what_was_not_measured(whole):
    both, _, rate = whole[1].plot("rate-distortion")["choices"]
    (series,) = both["series"]
    assert (series["x"], series["y"]) == ([0.1, 0.5], [60, 20])
    assert series["error"] == [1, None]
    assert rate["series"][0]["y"] == [0.1, 0.5, 1.5]


def test_points_of_single_times_say_so_and_may_all_be_missing(whole, tmp_path):
    assert "averages neighbouring times" in whole[1].text
    run = made.make_run(tmp_path / "run")
    header = "steps_done,rate,rate_error,rmse,rmse_error,images\n"
    made.add_study(run, "progressive_coding", "Compression", f"{header}1,,,,,0\n2,,,,,1\n")
    page = shown(run)
    assert "Compression" in page.text
    assert "rate-distortion" not in {a.get("id") for _, a in page.elements}


def test_a_study_says_by_which_protocol_and_what_the_config_has_otherwise(whole):
    text = whole[1].text
    assert "Protocol: chain 100; shape 8×8×1; times 0, 1, …, 49 (50 in all); of.split test" in text
    assert (
        "Made at step 30. Other than in the run's config: evaluation.metrics fid; "
        "evaluation.steps 100." in text
    )


def test_the_newest_samples_are_those_drawn_as_the_config_says(tmp_path):
    run = made.make_run(tmp_path / "run")
    made.add_samples(run, "step30_ancestral1000_seed0_4", 1)
    made.add_samples(run, "step30_ancestral1000_unclipped_seed0_4", 2, clip=False)
    made.add_samples(run, "step9_ancestral1000_seed0_4", 3)
    for age, path in enumerate(sorted(run.samples.glob("*_grid_*"))):
        os.utime(path, (age, age))  # The one of step 9 is youngest, then the unclipped one.
    page = shown(run)
    (image,) = [a for a in page.all("img") if a["alt"] == "Grid of the newest samples"]
    np.testing.assert_array_equal(pixels(image["src"]), figures.grid(made.images(4, 1))[..., 0])
    assert "step30_ancestral1000_seed0_4: sampler ancestral; steps 1000; eta 0.0; clip" in page.text


def test_of_many_grids_some_are_shown_and_the_last_is(tmp_path):
    run = made.make_run(tmp_path / "run", steps=range(1, 101))
    page = shown(run)
    (frames,) = page.json("frames")
    assert len(frames["texts"]) == 40
    assert (frames["texts"][0], frames["texts"][-1]) == ("step 1", "step 100")
    assert "40 of 100 grids" in page.text


@pytest.mark.parametrize(("steps", "end"), [(30, ", at the end of training."), (60, ".")])
def test_the_end_of_training_is_named_only_where_it_is(tmp_path, steps, end):
    run = made.make_run(tmp_path / "run", steps=(30,), **{"train.steps": steps})
    figures.save_png(run.figures / "training.png", figures.grid(made.images(2)))
    text = shown(run).text
    assert f"Drawn at step 30{end}" in text
    assert ("x̂_0 at the end of training" in text) == (steps == 30)


def test_the_slider_goes_from_noise_to_samples(whole):
    training, path = whole[1].json("frames")
    assert training["texts"] == ["step 10", "step 20", "step 30"]
    assert path["texts"] == ["t = 10", "t = 5", "t = 0"]
    for t, source in zip((10, 5, 0), path["sources"], strict=True):
        expected = figures.grid(made.images(4, 100 + t))[..., 0]
        np.testing.assert_array_equal(pixels(source), expected)
    for step, source in zip(made.STEPS, training["sources"], strict=True):
        np.testing.assert_array_equal(pixels(source), figures.grid(made.images(4, step))[..., 0])


def test_the_config_marks_what_differs_from_the_default(whole):
    text = (whole[0].path / "report.html").read_text()
    rows = re.findall(r'<tr class="differs"><th scope="row"><code>(.+?)</code>', text)
    assert rows == ["data.name", "data.image_size", "data.channels"]


def test_names_from_files_are_text_and_never_markup(whole):
    directory, page = whole
    assert made.HOSTILE in page.text
    assert made.HOSTILE in html.unescape((directory.path / "report.html").read_text())
    assert directory.path.name in page.text
    assert not [a for a in page.all("img") if not a["src"].startswith("data:image/png")]
    assert "b" not in {tag for tag, _ in page.elements}
    assert el("p", "<i>", title='"<') == '<p title="&quot;&lt;">&lt;i&gt;</p>'


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_the_page_can_be_read_by_everybody(whole, tmp_path, kind):
    page = whole[1]
    if kind == "sweep":
        made.make_sweep(tmp_path / "sweep")
        assert report.main([f"--sweep={tmp_path}/sweep"]) == 0
        page = made.Page(tmp_path / "sweep/report.html")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(a["alt"].strip() for a in page.all("img"))
    assert {a["for"] for a in page.all("label") if "for" in a} <= set(ids)
    for _, a in page.elements:
        assert a.get("aria-labelledby", ids[0]) in ids
        assert not a.get("href", "#").startswith(("http", "//"))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"


def test_a_table_can_be_downloaded_whole():
    rows = [[str(k), 'a "b", c\nd' if k % 2 else "#ü%20"] for k in range(150)]
    text = data(Table(["k", "text, with comma"], rows), "T", "t.csv")
    (uri,) = re.findall(r'href="data:text/csv;charset=utf-8,(.+?)"', text)
    found = list(csv.reader(io.StringIO(urllib.parse.unquote(html.unescape(uri)))))
    assert found == [["k", "text, with comma"], *rows]
    assert text.count("<tr>") == 61  # With the header.


def test_what_is_missing_is_named_with_its_command(tmp_path):
    run = made.make_run(tmp_path / "a run")
    page = shown(run)
    for name in STUDIES:
        assert f"python -m experiments.{name} --run='{run.path}'" in page.text
    assert f"ddpm_jax.main --mode=evaluate --workdir='{run.path}'" in page.text
    assert "bits-per-t" not in {a.get("id") for _, a in page.elements}


def test_the_commands_named_exist():
    assert all(importlib.util.find_spec(f"experiments.{name}") for name in STUDIES)


def test_enlarged_pictures_are_reduced_without_a_change():
    rng = np.random.default_rng(0)
    for factor, shape in ((1, (5, 7)), (4, (5, 7)), (6, (4, 6, 3)), (8, (1, 3))):
        small = rng.integers(0, 256, shape, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small.repeat(factor, 0).repeat(factor, 1)).save(buffer, format="PNG")
        png, width = reduced(buffer.getvalue())
        assert width == shape[1]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), small)


def test_json_has_null_for_what_is_no_number():
    content = {"a": [float("nan"), np.float32("inf"), np.float64(1.23456789), np.int64(3)]}
    assert json.loads(json.dumps(plain(content), allow_nan=False)) == {
        "a": [None, None, 1.23457, 3]
    }


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    values = np.sin(np.arange(100_000) / 1000)
    values[54_321], values[12_345], values[7] = 50, -50, np.nan
    values[:3], values[-3:] = (0, 9, -9), (9, -9, 0)  # The ends are no extremes.
    kept = thinned(values.tolist(), most=500)
    assert len(kept) <= 500
    assert {0, 54_321, 12_345, 99_999} <= {*kept}
    assert kept == sorted(set(kept))
    assert thinned([1.0, 2.0], most=500) == [0, 1]
