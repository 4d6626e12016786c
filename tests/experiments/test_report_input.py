"""What the report says of damaged files and of flags that make no sense: a line, and no page."""

import json
import sys

import numpy as np
import pytest
import report_data as made

from experiments import report


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def blank(path):
    """A PNG whose middle is lost."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[: middle - 20] + bytes(40) + data[middle + 20 :])


def change(path, key, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def arrays(path, **replaced):
    with np.load(path) as saved:
        np.savez(path, **{**saved, **replaced})


def of_result(directory, pattern):
    return sorted(directory.evaluation.glob(f"step30_bits_per_dim_test_*{pattern}"))[0]


# {what is wrong: (how it comes about, what the error must name)}.
DAMAGE = {
    "no config": (lambda d: d.config.unlink(), "no run there (no config.json)"),
    "no metrics": (lambda d: d.metrics.unlink(), "no metrics yet"),
    "metrics of nothing": (lambda d: d.metrics.write_text('{"step": 3, "lo'), "no metrics yet"),
    "metrics of null": (
        lambda d: d.metrics.write_text('3\n{"step": 3, "loss": null}\n'),
        "no metrics yet",
    ),
    "metrics no text": (lambda d: d.metrics.write_bytes(b"\xff"), "metrics.jsonl is damaged"),
    "cut grid": (lambda d: cut(d.samples / "step_00000010.png"), "step_00000010.png"),
    "blank grid": (lambda d: blank(d.samples / "step_00000010.png"), "step_00000010.png"),
    "cut figure": (lambda d: cut(d.figures / "other.png"), "other.png"),
    "cut study": (lambda d: cut(d.figures / "other.json"), "other.json"),
    "study of lists": (
        lambda d: change(d.figures / "other.json", "subject", [1, 2, 3]),
        "other.json",
    ),
    "cut table": (
        lambda d: (d.figures / "other.csv").write_text("a,b\n1,2\n3"),
        "other.json or its table is damaged; make it again with python -m experiments.other",
    ),
    "no table": (
        lambda d: (d.figures / "other.csv").unlink(),
        "other.csv, which is gone; make it again with python -m experiments.other",
    ),
    "short table": (
        lambda d: cut(d.figures / "progressive_coding.csv"),
        "progressive_coding.json or its table is damaged",
    ),
    "cut result": (lambda d: cut(of_result(d, ".json")), "is not a result's manifest"),
    "result of null": (
        lambda d: change(of_result(d, ".json"), "subject", {"checkpoint": None}),
        "is not a result's manifest",
    ),
    "cut path": (lambda d: cut(d.evaluation / "path.npz"), "path.npz"),
    "path of a wrong shape": (
        lambda d: arrays(d.evaluation / "path.npz", times=np.arange(4)),
        "path.npz is missing or damaged",
    ),
    "path of floats": (
        lambda d: arrays(d.evaluation / "path.npz", frames=np.zeros((3, 4, 8, 8, 1))),
        "path.npz is missing or damaged",
    ),
    "cut bound": (lambda d: cut(of_result(d, "_bound.npz")), "_bound.npz is missing or damaged"),
    "bound of a wrong shape": (
        lambda d: arrays(of_result(d, "_bound.npz"), rate=np.zeros(4)),
        "_bound.npz is missing or damaged",
    ),
    "starts of lists": (
        lambda d: d.provenance.write_text('[{"versions": ["jax"]}]'),
        "provenance.json is damaged",
    ),
}


def refused(capsys, flags, named):
    assert report.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out.html"
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_said_in_a_line_and_nothing_is_written(tmp_path, capsys, out, what):
    directory = made.full_run(tmp_path / "run")
    damage, named = DAMAGE[what]
    damage(directory)
    refused(capsys, [f"--run={directory.path}", f"--out={out}"], named)


def test_lines_of_metrics_that_are_no_numbers_are_left_out(tmp_path):
    run = made.make_run(tmp_path / "run")
    with run.metrics.open("a") as file:
        file.write('3\n{"step": 40, "loss": null, "time": "12:00", "grad_norm": 1}\n')
    assert report.main([f"--run={run.path}"]) == 0
    page = made.Page(run.path / "report.html")
    assert page.plot("loss")["choices"][0]["series"][0]["x"] == list(made.STEPS)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no results of a sweep there"),
        ("a,b\n1,2\n", "no runs"),
        ("cell,seed,status\n", "no"),
        ("cell,seed,status\nx,0\n", "results.csv is damaged (cut short)"),
        ("cell,seed,status\nx,0,do", "results.csv is damaged (cut short)"),
        ("", "results.csv is damaged"),
        (f"cell,seed,status\n{'x' * 200_000},0,done\n", "results.csv is damaged"),
        (b"\xff", "results.csv is damaged"),
    ],
)
def test_a_directory_that_is_no_sweep(tmp_path, capsys, out, content, named):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "results.csv").write_bytes(data)
    refused(capsys, [f"--sweep={tmp_path}", f"--out={out}"], named)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("results.md", b"\xff", "results.md is damaged: it is not text"),
        ("results.png", b"x", "results.png is damaged"),
        ("eps-simple/seed0/metrics.jsonl", b"\xff", "metrics.jsonl is damaged"),
        ("eps-simple/seed0/config.json", b"3", "is not a config"),
        ("eps-simple/seed0/provenance.json", b"3", "provenance.json is damaged"),
        ("eps-simple/seed0/samples/step_00000030.png", b"x", "step_00000030.png is damaged"),
    ],
)
def test_a_damaged_sweep_is_said_in_a_line(tmp_path, capsys, out, file, content, named):
    path = made.make_sweep(tmp_path / "sweep")
    (path / file).write_bytes(content)
    refused(capsys, [f"--sweep={path}", f"--out={out}"], named)


def test_flags_that_make_no_sense(tmp_path, capsys):
    run = made.make_run(tmp_path / "run")
    for flags, named in (
        ([], "--run"),
        ([f"--run={run.path}", "--sweep=x"], "--sweep"),
        ([f"--run={run.path}", f"--out={tmp_path}"], "is a directory"),
    ):
        refused(capsys, flags, named)


def test_without_gcsfs_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    run = made.make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    why = "gs:// paths need gcsfs: pip install 'ddpm_jax[gcs]'"
    refused(capsys, ["--run=gs://bucket/x"], f"error: gs://bucket/x: {why}")
    out = "--out=gs://bucket/x.html"
    refused(capsys, [f"--run={run.path}", out], f"error: {out}: {why}")


def test_without_plotly_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    run = made.make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    refused(capsys, [f"--run={run.path}"], "pip install -e '.[report]'")
    assert not (run.path / "report.html").exists()
