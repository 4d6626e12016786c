"""Like beside like: tables of results, and refusals that name the difference."""

import json

import pytest
from etils import epath

from ddpm_jax.evaluation.manifest import Manifest, Measured, differences, load, save
from experiments import compare

PROTOCOL = {"data": "digits", "images": 100, "parameters": "ema", "features": {"name": "pixels"}}


def write(run, value, error=0.3, name="fd_pixels_1k", step=10, time="2026-01-01", **protocol):
    measured = Measured(value, error, "", "lower", PROTOCOL | protocol, {"seed": 0}, {"x": 1.0})
    subject = {"run": run.name, "checkpoint": step, "config": {}}
    path = epath.Path(run) / "evaluation" / f"step{step}_{name}_{abs(hash(str(protocol)))}.json"
    save(path, Manifest(name, measured, subject, {"time": time}))
    return path


def run(*arguments):
    return compare.main([str(argument) for argument in arguments])


def test_a_manifest_comes_back_as_it_was(tmp_path):
    path = write(tmp_path / "a", 4.5, 0.25)
    manifest = load(path)
    assert manifest.name == "fd_pixels_1k" and manifest.measured == 4.5
    assert manifest.measured.standard_error == 0.25 and manifest.measured.better == "lower"
    assert manifest.measured.protocol == PROTOCOL and manifest.measured.details == {"x": 1.0}
    assert manifest.subject["checkpoint"] == 10


def test_alike_are_put_beside_each_other_with_the_error_of_the_difference(tmp_path, capsys):
    write(tmp_path / "a", 5.0, 0.3)
    write(tmp_path / "b", 4.0, 0.4, step=20)
    assert run(tmp_path / "a", tmp_path / "b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ") == ["| result", "run", "step", "value", "less the first |"]
    assert lines[2] == f"| fd_pixels_1k | {tmp_path}/a | 10 | 5.00 ± 0.30 |  |"
    # √(0.3² + 0.4²) = 0.5.
    assert lines[3] == f"| fd_pixels_1k | {tmp_path}/b | 20 | 4.00 ± 0.40 | -1.00 ± 0.50 |"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": "raw"}, "parameters is ema in {a}, raw in {b}"),
        ({"images": 99}, "images is 100 in {a}, 99 in {b}"),
        ({"features": {"name": "inception"}}, "features.name is pixels in {a}, inception in {b}"),
        ({"mirror": True}, "mirror is None in {a}, True in {b}"),
    ],
)
def test_unlike_are_refused_and_the_difference_named(tmp_path, capsys, change, words):
    write(tmp_path / "a", 5.0)
    write(tmp_path / "b", 4.0, **change)
    assert run(tmp_path / "a", tmp_path / "b") == 2
    captured = capsys.readouterr()
    assert words.format(a=tmp_path / "a", b=tmp_path / "b") in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    (key,) = change
    assert run(tmp_path / "a", tmp_path / "b", "--allow", "data") == 2
    capsys.readouterr()
    for flags in (["--allow", key], ["--anyway"]):
        assert run(tmp_path / "a", tmp_path / "b", *flags) == 0
        assert f"{words.split()[0]}: " in capsys.readouterr().out


def test_a_run_stands_for_its_newest_results(tmp_path, capsys):
    write(tmp_path / "a", 5.0, step=10)
    write(tmp_path / "a", 3.0, step=20)
    write(tmp_path / "a", 2.0, step=20, time="2026-01-02", images=7)
    write(tmp_path / "b", 2.5, images=7)
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert "2.00 ± 0.30" in capsys.readouterr().out
    files = sorted((tmp_path / "a" / "evaluation").glob("step10*"))
    write(tmp_path / "c", 1.0)
    assert run(*files, tmp_path / "c") == 0
    assert "5.00 ± 0.30" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, capsys):
    write(tmp_path / "a", 5.0)
    write(tmp_path / "b", 5.0, name="kd_pixels_1k")
    (tmp_path / "broken.json").write_text(json.dumps({"name": "x"}))
    cases = {
        (tmp_path / "a", tmp_path / "b"): "no result is in all of them",
        (tmp_path / "a", tmp_path / "nowhere"): "no results there; run ddpm_jax.main",
        (tmp_path / "a", tmp_path / "broken.json"): "is not a result's manifest",
        (tmp_path / "a",): "at least two",
        (tmp_path / "a", f"{tmp_path / 'a'}/"): "at least two",
        (tmp_path / "a", tmp_path / "b", "--metric", "fid"): "it has fd_pixels_1k",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_another_estimate_of_the_same_is_compared_and_noted(tmp_path, capsys):
    write(tmp_path / "a", 5.0)
    path = write(tmp_path / "b", 4.0)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert "seed: 7, not 0" in capsys.readouterr().out


def test_differences_reach_into_groups():
    one = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1]}
    other = {"a": 1, "b": {"c": 2, "d": 4}, "f": 5}
    assert differences(one, other) == {"b.d": (3, 4), "e": ([1], None), "f": (None, 5)}
