"""Evaluation while training: its numbers, the best checkpoint, interruptions."""

import json
import shutil
import signal

import jax.numpy as jnp
import pytest
from runs_for_tests import assert_equal_states, final_state, train

from ddpm_jax import files, runs
from ddpm_jax.main import main
from ddpm_jax.training import metrics
from ddpm_jax.training.best import Best
from ddpm_jax.training.checkpoints import Checkpoints

EVALUATION = {
    "train__steps": 20,
    "train__evaluate_every": 10,
    "train__keep_best": "bits_per_dim_test",
    "evaluation__metrics": "bits_per_dim,fd_pixels",
    "evaluation__split": "test",
    "evaluation__max_images": 16,
    "evaluation__count": 6,
}


def lines(workdir):
    records = metrics.read(runs.RunDirectory.of(workdir).metrics)
    return {r["step"]: r for r in records if "bits_per_dim_test" in r}


def evaluate(workdir, *flags):
    assert main([f"--workdir={workdir}", "--mode=evaluate", *flags]) == 0
    return {
        (
            content["name"],
            content["subject"]["checkpoint"],
            content["protocol"]["checkpoint"],
        ): content
        for content in (
            json.loads(path.read_text()) for path in (workdir / "evaluation").glob("*.json")
        )
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    cache = tmp_path_factory.mktemp("cache")
    assert train(workdir, **EVALUATION, evaluation__cache_dir=cache) == 0
    return workdir


def test_training_writes_the_numbers_that_evaluating_its_checkpoints_gives(trained, tmp_path):
    written = lines(trained)
    assert list(written) == [10, 20]
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation")
    for step in (10, 20):
        found = evaluate(workdir, f"--config.evaluation.checkpoint={step}")
        for name in ("bits_per_dim_test", "rmse_test", "fd_pixels_6"):
            result = found[name, step, "given"]
            assert written[step][name] == pytest.approx(result["value"], rel=1e-6), name
            error = result["standard_error"]
            assert written[step][f"{name}_error"] == pytest.approx(error, rel=1e-6), name
    assert written[10]["bits_per_dim_test"] != written[20]["bits_per_dim_test"]


def test_results_of_training_are_not_measured_again(trained, capsys):
    evaluate(trained)
    assert capsys.readouterr().out.count("measured before") == 6


def test_the_best_checkpoint_is_kept_and_says_so(trained, capsys):
    written = lines(trained)
    best = min(written, key=lambda step: written[step]["bits_per_dim_test"])
    run = runs.load(trained, best=True)
    assert (run.step, run.rule) == (best, "best by bits_per_dim_test")
    again = runs.load(trained, step=best)
    assert runs.fingerprint(run.params) == runs.fingerprint(again.params)
    kept = trained / "best" / "bits_per_dim_test"
    assert [p.name for p in kept.iterdir() if p.name.isdigit()] == [str(best)]
    found = evaluate(trained, "--config.evaluation.checkpoint=best")
    result = found["bits_per_dim_test", best, "best by bits_per_dim_test"]
    assert result["value"] == written[best]["bits_per_dim_test"]
    out = capsys.readouterr().out
    assert out.count("measured before") == 6 and found["bits_per_dim_test", best, "given"]
    rule = "best_by_bits_per_dim_test"
    assert len(list((trained / "evaluation").glob(f"step{best}_rmse_test_*_{rule}.json"))) == 1
    # Other metrics and counts of it can be asked for.
    other = ["--config.evaluation.metrics=kd_pixels", "--config.evaluation.count=5"]
    found = evaluate(trained, "--config.evaluation.checkpoint=best", *other)
    assert found["kd_pixels_5", best, "best by bits_per_dim_test"]["standard_error"] > 0


def test_training_keeps_the_bound_s_arrays(trained):
    assert len(list((trained / "evaluation").glob("step10_bound_test_*.npz"))) == 1
    assert not list((trained / "evaluation").glob("*.parts"))


@pytest.mark.parametrize(
    ("best", "every", "words"),
    [
        ("bits_per_dim_test", 0, "needs train.evaluate_every"),
        ("fid", 10, "choose a result of evaluation.metrics: bits_per_dim_test"),
        ("prior_test", 10, "choose a result"),
    ],
)
def test_a_result_that_is_not_measured_cannot_choose(tmp_path, capsys, best, every, words):
    settings = EVALUATION | {"train__keep_best": best, "train__evaluate_every": every}
    assert train(tmp_path / "run", **settings) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_evaluation_changes_nothing_of_the_training(trained, tmp_path):
    without = EVALUATION | {"train__evaluate_every": 0, "train__keep_best": ""}
    assert train(tmp_path / "run", **without) == 0
    assert_equal_states(final_state(trained)[0], final_state(tmp_path / "run")[0])


@pytest.mark.parametrize("at_step", [pytest.param(10, marks=pytest.mark.long), 20])
def test_a_signal_during_evaluation_loses_nothing(trained, tmp_path, monkeypatch, at_step):
    original, hit = files.replace, []

    def interrupting(path, content):
        original(path, content)
        if path.name.startswith(f"step{at_step}_prior_test") and not hit:
            hit.append(path)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "replace", interrupting)
    settings = EVALUATION | {"evaluation__cache_dir": tmp_path / "cache"}
    assert train(tmp_path / "run", **settings) == 75
    assert hit and at_step not in lines(tmp_path / "run")
    assert train(tmp_path / "run", **settings) == 0
    assert_equal_states(final_state(trained)[0], final_state(tmp_path / "run")[0])
    whole, again = lines(trained), lines(tmp_path / "run")
    assert list(again) == [10, 20]
    for step in whole:
        assert again[step] == whole[step]
    assert runs.load(tmp_path / "run", best=True).step == runs.load(trained, best=True).step
    # Once more, finished: nothing new.
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(tmp_path / "run", **settings) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_numbers_of_another_protocol_are_no_rivals(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    best, before = runs.load(workdir, best=True).step, lines(workdir)
    settings = EVALUATION | {"evaluation__cache_dir": tmp_path / "c"}
    settings |= {"evaluation__max_images": 20, "train__steps": 30}
    assert train(workdir, **settings) == 0
    records = metrics.read(runs.RunDirectory.of(workdir).metrics)
    measured = [(r["step"], r["bits_per_dim_test"]) for r in records if "bits_per_dim_test" in r]
    # Step 20, where it went on, was measured anew, under the new protocol.
    assert [step for step, _ in measured] == [10, 20, 20, 30]
    assert measured[1][1] == before[20]["bits_per_dim_test"] != measured[2][1]
    rivals = dict(measured[2:])
    assert runs.load(workdir, best=True).step == min(rivals, key=rivals.get)
    assert best in (10, 20)


def test_the_best_is_replaced_only_by_a_better(tmp_path):
    def params(value):
        return {"ema_params": {"w": jnp.full(3, value)}}

    best = Best(tmp_path / "best", "a")
    assert best.beaten_by(5.0, "lower", "p") and not best.beaten_by(float("nan"), "lower", "p")
    best.save(1, params(1), 5.0, "p")
    assert best.beaten_by(4.9, "lower", "p") and not best.beaten_by(5.0, "lower", "p")
    assert best.beaten_by(5.1, "higher", "p") and not best.beaten_by(4.9, "higher", "p")
    best.save(2, params(2), 4.0, "p")
    best.close()
    again = Best(tmp_path / "best", "a")
    assert not again.beaten_by(4.5, "lower", "p") and again.beaten_by(3.9, "lower", "p")
    assert again.beaten_by(4.5, "lower", "another")
    again.save(2, params(3), 4.5, "another")  # In its own place.
    again.close()
    other = Best(tmp_path / "best", "b")  # Another result has its own.
    assert other.beaten_by(9.0, "lower", "p")
    other.close()
    kept = tmp_path / "best" / "a"
    assert Checkpoints(kept, keep=1).steps() == [2]
    assert not [path for path in kept.iterdir() if "damaged" in path.name]
