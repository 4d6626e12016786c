"""The report: what it says is what the files say; what is wrong is said in a line."""

import base64
import csv
import html
import html.parser
import importlib.util
import io
import itertools
import json
import re
import statistics
import sys
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
from experiments.reporting.sweep_page import label


class Page(html.parser.HTMLParser):
    """A parsed page: its elements as (tag, attributes), texts of scripts, headings; balanced."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.scripts, self.text = [], [], [], ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs).get("class"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        elif "style" not in self.open:
            self.text += f"{data}\n" if self.open and self.open[-1] in ("td", "th") else data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def json(self, kind):
        return [json.loads(text) for name, text in self.scripts if name == kind]

    def plot(self, key):
        return next(spec for spec in self.json("spec") if spec["key"] == key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = made.full_run(tmp_path_factory.mktemp("runs") / "a <b>run</b> & more")
    assert report.main([f"--run={directory.path}"]) == 0
    return directory, Page(directory.path / "report.html")


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
    choice = whole[1].plot("bits-per-t")["choices"][0]
    (series,) = choice["series"]
    assert series["x"] == [1, 2, 3, 4, 6, 7, 8, 9, 10]  # L_4, of t = 5, was not measured.
    assert series["y"][0] == 2.0
    assert series["y"][-1] == pytest.approx(2.0 - 9 * 0.19, rel=1e-5)  # L_9; L_T is in the note.
    assert "L_T = 0.1 (test)" in whole[1].text


def test_the_newest_result_of_a_name_counts_and_has_its_error(whole):
    assert "4.560 ± 0.020" in whole[1].text
    assert "9.87" not in whole[1].text


def test_rate_and_distortion_leave_out_what_was_not_measured(whole):
    both, _, rate = whole[1].plot("rate-distortion")["choices"]
    (series,) = both["series"]
    assert (series["x"], series["y"]) == ([0.1, 0.5], [60, 20])
    assert series["error"] == [1, None]
    assert rate["series"][0]["y"] == [0.1, 0.5, 1.5]


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
        page = Page(tmp_path / "sweep/report.html")
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
    assert report.main([f"--run={run.path}"]) == 0
    page = Page(run.path / "report.html")
    for name in STUDIES:
        assert f"python -m experiments.{name} --run='{run.path}'" in page.text
    assert f"ddpm_jax.main --mode=evaluate --workdir='{run.path}'" in page.text
    assert "bits-per-t" not in {a.get("id") for _, a in page.elements}


def test_the_commands_named_exist():
    assert all(importlib.util.find_spec(f"experiments.{name}") for name in STUDIES)


def damage(directory, what):
    """Spoils a run in a way; returns what the error must name."""
    if what == "no config":
        directory.config.unlink()
        return "no run there (no config.json)"
    if what == "no metrics":
        directory.metrics.unlink()
        return "no metrics yet"
    if what == "metrics of nothing":
        directory.metrics.write_text('{"step": 3, "lo')
        return "no metrics yet"
    if what == "cut grid":
        path = directory.samples / "step_00000010.png"
    elif what == "cut figure":
        path = directory.figures / "other.png"
    elif what == "cut study":
        path = directory.figures / "other.json"
    elif what == "cut result":
        path = directory.evaluation / "step30_bits_per_dim_test_2025.json"
    elif what == "cut path":
        path = directory.evaluation / "path.npz"
    elif what == "cut bound":
        path = directory.evaluation / "step30_bound_test_x.npz"
    else:
        path = directory.figures / "other.csv"
        path.unlink()
        return "other.csv, which is gone; make it again with python -m experiments.other"
    path.write_bytes(path.read_bytes()[:-20])
    return path.name


@pytest.mark.parametrize(
    "what",
    [
        *("no config", "no metrics", "metrics of nothing", "cut grid", "cut figure", "cut study"),
        *("cut result", "cut path", "cut bound", "no table"),
    ],
)
def test_a_damaged_run_is_said_in_a_line_and_nothing_is_written(tmp_path, capsys, what):
    directory = made.full_run(tmp_path / "run")
    named = damage(directory, what)
    assert report.main([f"--run={directory.path}", f"--out={tmp_path}/out.html"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no results of a sweep there"),
        ("a,b\n1,2\n", "no runs"),
        ("cell,seed,status\n", "no"),
    ],
)
def test_a_directory_that_is_no_sweep(tmp_path, capsys, content, named):
    if content:
        (tmp_path / "results.csv").write_text(content)
    assert report.main([f"--sweep={tmp_path}"]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_flags_that_make_no_sense(tmp_path, capsys):
    run = made.make_run(tmp_path / "run")
    for flags in (
        [],
        [f"--run={run.path}", "--sweep=x"],
        [f"--run={run.path}", f"--out={tmp_path}"],
    ):
        assert report.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_without_plotly_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    run = made.make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert report.main([f"--run={run.path}"]) == 2
    assert "pip install -e '.[report]'" in capsys.readouterr().err
    assert not (run.path / "report.html").exists()


def test_a_sweep_shows_seeds_and_their_means_and_links_to_reports(tmp_path):
    path = made.make_sweep(tmp_path / "sweep")
    assert report.main([f"--run={path}/mu-vlb-learned/seed0"]) == 0
    assert report.main([f"--run={path}", f"--out={tmp_path}/elsewhere/page.html"]) == 0
    page = Page(tmp_path / "elsewhere/page.html")
    assert "A <sweep>" in page.text
    assert "3 done" not in page.text and "2 done, 1 diverged, 1 missing" in page.text
    (choice,) = [c for c in page.plot("by-cell")["choices"] if c["label"] == "fd_pixels_500"]
    seeds, means = choice["series"]
    assert seeds["y"] == [1.0, 2.0]
    assert means["x"] == [label("eps-simple"), label("mu-vlb-learned")]
    assert (means["y"], means["error"]) == ([1.0, 2.0], [None, None])
    assert [c["label"] for c in page.plot("by-cell")["choices"]] == [
        "fd_pixels_500",
        "outside",
        "train_seconds",
    ]
    seconds = page.plot("by-cell")["choices"][-1]["series"][1]
    assert seconds["y"] == [7, statistics.fmean([7, 7])]
    assert seconds["error"] == [0, 0]
    losses = page.plot("curves")["choices"][0]
    assert [s["group"] for s in losses["series"]] == ["eps-simple", "eps-simple", "mu-vlb-learned"]
    links = [a["href"] for a in page.all("a") if a["href"].endswith("report.html")]
    assert links == ["../sweep/mu-vlb-learned/seed0/report.html"]
    assert sum("Grid of samples of" in a["alt"] for a in page.all("img")) == 2


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


def test_labels_are_short_lines_of_the_whole_name():
    for cell in ("eps", "mu-vlb-learned_range", "channels=128-learning_rate=0.0002", "--=="):
        lines = label(cell).split("\n")
        assert "".join(lines) == cell
        assert all(len(line) <= 16 for line in lines)
