"""The report of a sweep: what it says is what the files say."""

import html
import os
import re
import shlex
import statistics

import pytest
import report_data as made

from ddpm_jax import config as config_lib
from experiments import report, sweep


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep's directory with its page, written elsewhere."""
    root = tmp_path_factory.mktemp("reports")
    path = made.make_sweep(root / "a sweep")
    os.utime(path / "results.csv", (1e9, 1e9))
    assert report.main([f"--run={path}/{made.CELLS[1]}/seed0"]) == 0
    assert report.main([f"--run={path}", f"--out={root}/elsewhere/page.html"]) == 0
    return path, made.Page(root / "elsewhere/page.html")


def by_cell(page, label):
    (choice,) = [c for c in page.plot("by-cell")["choices"] if c["label"] == label]
    return choice["series"]


def test_seeds_and_their_means_and_deviations(whole):
    _, page = whole
    assert "A <sweep>" in page.text
    assert "3 done, 1 diverged, 1 missing" in page.text
    seeds, means = by_cell(page, "fd_pixels_500")
    assert seeds["y"] == [1.0, 1.5, 2.0]
    assert means["x"] == list(made.CELLS)
    assert means["y"] == [1.25, 2.0]
    assert means["error"] == [pytest.approx(statistics.stdev([1.0, 1.5]), rel=1e-5), None]
    assert [c["label"] for c in page.plot("by-cell")["choices"]] == [
        *("rate_test", "rate_train", "fd_pixels_500", "outside", "train_seconds")
    ]
    assert by_cell(page, "train_seconds")[1]["y"] == [8, 7.5]


def test_the_table_below_has_every_seed(whole):
    _, page = whole
    names = [c["label"] for c in page.plot("by-cell")["choices"]]
    header, *rows = page.download(f"by-cell_{names.index('fd_pixels_500')}.csv")
    mean = "mean, ± standard deviation"
    assert header == ["cell", "one seed: point", "one seed", mean, f"{mean}: error"]
    assert rows == [
        ["eps-simple", "eps-simple, seed 0", "1", "1.25", "0.353553"],
        ["eps-simple", "eps-simple, seed 1", "1.5", "", ""],
        ["mu-vlb-learned_range", "mu-vlb-learned_range, seed 0", "2", "2", ""],
    ]
    assert page.download("results.csv")[1][:4] == ["eps-simple", "0", "done", "7"]


def test_curves_samples_and_links(whole):
    _, page = whole
    losses = page.plot("curves")["choices"][0]
    first, second = made.CELLS
    assert [s["group"] for s in losses["series"]] == [first, first, first, second]
    links = [a["href"] for a in page.all("a") if a["href"].endswith("report.html")]
    assert links == [f"../a%20sweep/{second}/seed0/report.html"]
    assert sum("Grid of samples of" in a["alt"] for a in page.all("img")) == 2


def test_what_the_configs_share_and_what_each_training_ran_with(whole):
    path, page = whole
    assert "Alike in all 4 runs that were begun; what differs between runs: seed." in page.text
    text = (path.parent / "elsewhere/page.html").read_text()
    keys = re.findall(r'<th scope="row"><code>(.+?)</code></th>', text)
    assert {*config_lib.FIELDS} - {*keys} == {"seed"}
    assert "No start was noted of mu-vlb-learned_range, seed 1." in page.text
    at = page.cells.index("cdcdcdcdcdcd")
    assert page.cells[at : at + 4] == [
        *("cdcdcdcdcdcd", "1 cpu, 1 host(s)", "jax 1.2.3"),
        "eps-simple, seed 0; mu-vlb-learned_range, seed 0",
    ]
    assert "eps-simple, seed 1; eps-simple, seed 2" in page.cells


def test_values_keep_together_and_code_is_code(whole):
    path, _ = whole
    text = (path.parent / "elsewhere/page.html").read_text()
    assert '<td><span class="number">1.0 ± 0.1</span></td>' in text
    assert "Means; <code>outside</code> is a share." in text


def test_its_commands_run(whole, tmp_path):
    path, page = whole
    assert "As of 2001-09-09 01:46 UTC." in page.text
    text = html.unescape((path.parent / "elsewhere/page.html").read_text())
    commands = re.findall(r'<code class="command">(python -m .+?)</code>', text)
    words = [shlex.split(command)[2:] for command in commands]
    assert [w[0] for w in words] == ["experiments.sweep", "experiments.report"]
    flags, overrides, _ = sweep.parse(words[0][1:])
    assert (flags.sweep, flags.workdir, flags.mode) == ("a/sweep.py", str(path), "table")
    assert words[1][1:] == [f"--run={path}/CELL/seed0"]
    assert overrides == []


def test_without_a_table_the_command_asks_for_the_sweeps_file(tmp_path, capsys):
    path = made.make_sweep(tmp_path / "a sweep")
    for name in ("results.md", "results.png"):
        (path / name).unlink()
    assert report.main([f"--sweep={path}"]) == 0
    page = made.Page(path / "report.html")
    command = f"python -m experiments.sweep --sweep=FILE --workdir='{path}' --mode=table"
    assert command in page.text
    (path / "results.csv").unlink()
    assert report.main([f"--sweep={path}"]) == 2
    assert command in capsys.readouterr().err


def test_an_old_damaged_grid_is_not_read(tmp_path):
    path = made.make_sweep(tmp_path / "sweep")
    (path / made.CELLS[0] / "seed0/samples/step_00000010.png").write_bytes(b"x")
    assert report.main([f"--sweep={path}"]) == 0


def test_a_key_without_numbers_has_no_plot(tmp_path):
    path = made.make_sweep(tmp_path / "sweep")
    with (path / made.CELLS[0] / "seed0/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss_of": null, "time": "12:00"}\n')
    assert report.main([f"--sweep={path}"]) == 0
    labels = [c["label"] for c in made.Page(path / "report.html").plot("curves")["choices"]]
    assert "loss" in labels and not {"loss_of", "time"} & {*labels}
