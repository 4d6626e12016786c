"""The one command: what it does, in which order, and how it ends."""

import importlib
import pathlib
import sys

import pytest
from runs_for_tests import ROOT

from ddpm_jax import main as program
from ddpm_jax.runs import RunDirectory
from experiments import paper

DIGITS = f"{ROOT}/configs/digits.py"


@pytest.fixture
def steps(monkeypatch):
    """Replaces what the command does by a record of it; codes: {step: exit code}."""
    done, codes = [], {}

    def fake(config, workdir, overrides, figures):
        def step(name):
            return lambda arguments: done.append(name) or codes.get(name, 0)

        return {name: (step(name), []) for name in ("train", "evaluate", *figures, "report")}

    monkeypatch.setattr(paper, "steps_of", fake)
    return done, codes


def run(tmp_path, *flags):
    return paper.main([f"--config={DIGITS}", f"--workdir={tmp_path}/run", *flags])


def test_everything_in_the_papers_order(tmp_path, steps, capsys):
    assert run(tmp_path) == 0
    assert steps[0] == ["train", "evaluate", *paper.FIGURES, "report"]
    assert f"{tmp_path}/run/report.html" in capsys.readouterr().out


def test_a_report_that_fails_is_not_named(tmp_path, steps, capsys):
    steps[1]["report"] = 2
    assert run(tmp_path) == 1
    out, error = capsys.readouterr()
    assert "report.html" not in out
    assert "left out, see above: report" in error


def test_without_plotly_nothing_is_begun(tmp_path, steps, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert run(tmp_path) == 2
    assert "pip install -e '.[report]'" in capsys.readouterr().err
    assert steps[0] == []


def test_some_of_the_figures(tmp_path, steps):
    assert run(tmp_path, "--only=interpolation,autoregressive") == 0
    assert steps[0] == ["train", "evaluate", "interpolation", "autoregressive", "report"]


def test_a_figure_that_fails_is_left_out(tmp_path, steps, capsys):
    steps[1]["interpolation"] = 2
    assert run(tmp_path) == 1
    assert steps[0][-1] == "report"
    assert "left out, see above: interpolation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failing", "code"), [("train", 1), ("evaluate", 2), ("interpolation", 75)]
)
def test_what_ends_it(tmp_path, steps, failing, code):
    steps[1][failing] = code
    assert run(tmp_path) == code
    assert steps[0][-1] == failing


def test_a_trained_run_is_not_trained_again(tmp_path, steps, capsys):
    directory = RunDirectory.of(tmp_path / "run")
    config = program.resolve(*program.parse([f"--config={DIGITS}"]))
    directory.save_config(config)
    (directory.checkpoints / "2600").mkdir(parents=True)
    directory.figures.mkdir()
    (directory.figures / "training.png").write_bytes(b"")
    assert run(tmp_path) == 0
    assert steps[0][0] == "evaluate"
    assert run(tmp_path, "--config.train.batch_size=32") == 2
    assert "holds a run of another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only=interpolations"], "choose from sample_quality, progressive_coding"),
        (["--config.train.stepz=1"], "did you mean train.steps"),
        (["--nonsense"], "unknown argument --nonsense"),
        (["--mode=check"], "unknown argument --mode=check"),
        (["--config.evaluation.metrics=fid"], "weights"),
    ],
)
def test_a_bad_request_is_one_line(tmp_path, steps, capsys, flags, message):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert steps[0] == [] and not (tmp_path / "run").exists()


def test_every_figure_is_an_experiment_that_runs_from_a_run(tmp_path, capsys):
    found = paper.steps_of("C", str(tmp_path), ["--config.seed=1"], paper.FIGURES)
    assert [*found] == ["train", "evaluate", *paper.FIGURES, "report"]
    assert found["train"][1] == [
        "--config=C",
        f"--workdir={tmp_path}",
        "--config.seed=1",
        "--mode=train",
    ]
    assert found["evaluate"][1][-1] == "--mode=evaluate"
    for name in paper.FIGURES:
        main, arguments = found[name]
        assert arguments == [f"--run={tmp_path}", "--config.seed=1"]
        assert main is importlib.import_module(f"experiments.{name}").main
        assert main(arguments) == 2  # There is no run, and it says so.
        assert capsys.readouterr().err == (
            f"error: {pathlib.Path(tmp_path)}: no run there (no config.json); train one first, or "
            "name the directory of a run\n"
        )
