"""Seeds trained together against the same seeds trained one by one, and what can go wrong."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import (
    TINY,
    arguments,
    assert_equal_states,
    final_state,
    lines,
    start,
    train,
)

from ddpm_jax import config as config_lib
from ddpm_jax import figures, files, keys, runs
from ddpm_jax.data import nbytes, open_source, pipeline
from ddpm_jax.interruption import Interrupted
from ddpm_jax.main import main
from ddpm_jax.training import checkpoints as checkpoints_module
from ddpm_jax.training import lane as lane_module
from ddpm_jax.training import together
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.job import make_job
from ddpm_jax.training.lane import Lane
from ddpm_jax.training.metrics import NonFiniteError

SEEDS = (0, 5)
EVALUATION = {
    "train__evaluate_every": 10,
    "train__keep_best": "bits_per_dim_test",
    "evaluation__metrics": "bits_per_dim",
    "evaluation__split": "test",
    "evaluation__max_images": 16,
}


def command(parent, seeds=SEEDS, **overrides):
    """The command line of the small run of several seeds, in parent/seed…."""
    return [*arguments(parent / "seed{seed}", **overrides), f"--seeds={','.join(map(str, seeds))}"]


def vmapped(parent, seeds=SEEDS, **overrides):
    """The same with `vmap`, which no flag asks for on a CPU; returns the lines said."""
    config = config_lib.load_file(arguments(parent)[0].removeprefix("--config="))
    for key, value in (TINY | {k.replace("__", "."): v for k, v in overrides.items()}).items():
        config_lib.override(config, key, value)
    said = []
    together.train_together(config, str(parent / "seed{seed}"), seeds, said.append, "vmap")
    return said


STARTS = {"config.json", "goodput.json", "lock"}  # What each start may write.


def snapshot(parent):
    """Every file below, with its content and the time of its last change."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in parent.rglob("*")
        if path.is_file()
    }


def assert_same_run(one, other):
    """Runs equal to the bit, in all but clocks."""
    assert_equal_states(final_state(one)[0], final_state(other)[0])
    assert final_state(one)[1] == final_state(other)[1]
    assert lines(one) == lines(other)


def assert_close_run(one, other):
    """Runs equal to rounding.

    Unrolled they are equal to the bit, see `optimised`, but not as the tests have it compiled;
    runs of one form are (`assert_same_run`). Other kernels add in another order: 6e-8 of the loss
    a step. 20 steps of Adam at 1e-3 carry that to some 1e-5 of the parameters (see test_training
    on other layouts); the bias of attention's keys, whose gradient is rounding alone, is what Adam
    makes of it.
    """
    assert [r.keys() for r in lines(one)] == [r.keys() for r in lines(other)]
    for record, reference in zip(lines(one), lines(other), strict=True):
        for name, value in reference.items():
            rtol = 1e-3 if name == "grad_norm" else 1e-5
            assert record[name] == pytest.approx(value, rel=rtol), name
    state = final_state(one)[0]
    for path, leaf in final_state(other)[0].items():
        if "params" in path and "['k']['bias']" not in path:
            np.testing.assert_allclose(state[path], leaf, atol=1e-4, err_msg=path)


@contextlib.contextmanager
def seeds_are_arguments():
    """Of every program that is traced: one that is compiled serves all seeds."""
    original, traced = keys.example_keys, []

    def example_keys(seed, *args):
        traced.append(isinstance(seed, jax.core.Tracer))
        return original(seed, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keys, "example_keys", example_keys)
        yield
    assert traced and all(traced)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each seed by itself."""
    parent = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        with seeds_are_arguments():
            assert train(parent / f"seed{seed}", seed=seed) == 0
    return parent


@pytest.fixture(scope="module")
def unrolled(tmp_path_factory):
    """All by one command."""
    parent = tmp_path_factory.mktemp("unrolled")
    assert main(command(parent)) == 0
    return parent


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    """All with vmap."""
    parent = tmp_path_factory.mktemp("vmap")
    vmapped(parent)
    return parent


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_unrolled_are_those_trained_alone(alone, unrolled, seed):
    assert_close_run(unrolled / f"seed{seed}", alone / f"seed{seed}")


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_under_vmap_are_those_trained_alone(alone, batched, seed):
    assert_close_run(batched / f"seed{seed}", alone / f"seed{seed}")


def test_seeds_differ(alone):
    first, second = (lines(alone / f"seed{seed}")[0]["loss"] for seed in SEEDS)
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_each_seed_leaves_the_files_of_an_ordinary_run(alone, unrolled, seed):
    def names(parent):
        return {
            str(path.relative_to(parent / f"seed{seed}")).partition(".tfevents")[0]
            for path in (parent / f"seed{seed}").rglob("*")
            if "/checkpoints/" not in str(path)  # Orbax names files as its threads come.
        }

    assert names(unrolled) == names(alone)
    for file in ("config.json", "samples/step_00000020.png"):
        one, other = (parent / f"seed{seed}" / file for parent in (unrolled, alone))
        assert one.read_bytes() == other.read_bytes(), file
    directory = runs.RunDirectory.of(unrolled / f"seed{seed}")
    assert directory.load_config().seed == seed
    (started,) = directory.load_starts()
    assert started["from_step"] == 0
    assert runs.load(directory.path).step == 20


@pytest.mark.slow
@pytest.mark.long
def test_four_devices_calls_of_several_steps_and_microbatches(alone, tmp_path):
    code = "import test_together as t, sys; t.on_four_devices(sys.argv[1])"
    process = start([str(tmp_path)], devices=4, code=code)
    assert process.wait(timeout=300) == 0, process.communicate()
    for form, seed in itertools.product(together.FORMS, SEEDS):
        assert_close_run(tmp_path / form / f"seed{seed}", alone / f"seed{seed}")


def on_four_devices(parent):
    """In a process of its own: two seeds in each form."""
    assert jax.device_count() == 4
    settings = {"train__steps_per_call": 5, "parallel__microbatches": 2}
    for form in together.FORMS:
        together.form_of = lambda layout, form=form: form
        assert main(command(pathlib.Path(parent) / form, SEEDS, **settings)) == 0


def test_what_interrupts_the_beginning_is_not_hidden(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "resident_gather", interrupted)
    assert train(tmp_path) == 75
    assert capsys.readouterr().err == "stopped at once; the same command goes on\n"


def signal_after(monkeypatch, owner, name, wanted):
    """Sends SIGTERM after the first call of a function whose arguments are `wanted`."""
    original, hit = getattr(owner, name), []

    def signalling(*args, **kwargs):
        result = original(*args, **kwargs)
        if not hit and wanted(*args):
            hit.append(args)
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, signalling)
    return hit


@pytest.mark.parametrize("form", ["unrolled", pytest.param("vmap", marks=pytest.mark.long)])
def test_a_signal_stops_all_and_the_same_command_goes_on_to_the_bit(
    request, tmp_path, monkeypatch, capsys, form
):
    hit = signal_after(monkeypatch, Checkpoints, "save", lambda _, step, *rest: step == 10)
    if form == "unrolled":
        assert main(command(tmp_path)) == 75
        message = capsys.readouterr().err.splitlines()[-1]
    else:
        with pytest.raises(Interrupted) as stopped:
            vmapped(tmp_path)
        message = str(stopped.value)
    assert hit and message == "stopped at step 11; the same command goes on from there"
    assert {final_state(tmp_path / f"seed{seed}")[1] for seed in SEEDS} == {11}
    if form == "unrolled":
        assert main(command(tmp_path)) == 0
    else:
        vmapped(tmp_path)
    whole = request.getfixturevalue({"unrolled": "unrolled", "vmap": "batched"}[form])
    for seed in SEEDS:
        assert_same_run(tmp_path / f"seed{seed}", whole / f"seed{seed}")


def rewound(finished, parent, seed):
    """A copy of a run of 20 steps as a kill between its two checkpoints leaves it."""
    workdir = shutil.copytree(finished / f"seed{seed}", parent / f"seed{seed}")
    for late in ("checkpoints/20", "samples", "figures"):
        shutil.rmtree(workdir / late)
    return workdir


@pytest.mark.long
def test_seeds_that_stand_apart_meet_and_finished_ones_are_left_alone(
    alone, tmp_path, monkeypatch, capsys
):
    """The last seed is at its end, the first at a line of its metrics, the second not begun."""
    ahead, behind, done = three = (*SEEDS, 2)
    with seeds_are_arguments():
        assert train(alone / f"seed{done}", seed=done) == 0
    assert train(tmp_path / f"seed{ahead}", seed=ahead, train__steps=5) == 0
    shutil.copytree(alone / f"seed{done}", tmp_path / f"seed{done}")
    before = snapshot(tmp_path / f"seed{done}")
    waiting = snapshot(tmp_path / f"seed{ahead}/checkpoints")
    placed, gather = [], pipeline.resident_gather
    for module in (together, pipeline):
        count = lambda *args: placed.append(args) or gather(*args)  # noqa: E731
        monkeypatch.setattr(module, "resident_gather", count)
    # The config is that of the runs themselves; all the images fit, once.
    size = nbytes(open_source(runs.RunDirectory.of(tmp_path / f"seed{done}").load_config()))
    argv = [f"--workdir={tmp_path}/seed{{seed}}", "--seeds=0,5,2", "--config.train.steps=20"]
    argv.append(f"--config.data.resident_bytes={size}")
    hit = signal_after(monkeypatch, Lane, "step_to", lambda lane, *_: lane.step == 3)
    assert main(argv) == 75 and hit and len(placed) == 1
    assert final_state(tmp_path / f"seed{behind}")[1] == 4
    assert snapshot(tmp_path / f"seed{ahead}/checkpoints") == waiting
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert said.index("training seeds 5 from step 4") < said.index("training seeds 0, 5 from step")
    assert "training seeds 0, 5 from step 5" in said
    for seed in three:
        assert_close_run(tmp_path / f"seed{seed}", alone / f"seed{seed}")
        records = map(json.loads, (tmp_path / f"seed{seed}/metrics.jsonl").read_text().splitlines())
        assert all(record["steps_per_second"] > 0 for record in records)
    after = snapshot(tmp_path / f"seed{done}")
    assert {p.name for p in after if after[p] != before.get(p)} <= STARTS


def test_nothing_is_done_for_what_is_finished_but_its_last_figure(unrolled, tmp_path, monkeypatch):
    parent = shutil.copytree(unrolled, tmp_path / "runs")
    before = snapshot(parent)
    assert main(command(parent)) == 0
    after = snapshot(parent)
    changed = {p for p in after if after[p] != before.get(p) and p.name not in STARTS}
    assert not changed and before.keys() == after.keys()
    # One that is older than the last samples, and one that is not there; a signal in between.
    old, gone = (parent / f"seed{seed}" / "figures/training.png" for seed in SEEDS)
    content = gone.read_bytes()
    os.utime(old, (0, 0))
    gone.unlink()
    hit = signal_after(monkeypatch, figures, "training_figure", lambda *_: True)
    assert main(command(parent)) == 75 and hit
    assert old.stat().st_mtime > 0 and not gone.exists()
    assert main(command(parent)) == 0
    assert gone.read_bytes() == content
    after = snapshot(parent)
    assert {p.name for p in before if after[p][0] != before[p][0]} <= STARTS


def poison(workdir):
    """Puts an infinity among the parameters of the newest checkpoint, checksums and all."""
    directory = runs.RunDirectory.of(workdir)
    checkpoints = Checkpoints(directory.checkpoints)
    state, step, notes = checkpoints.restore(make_job(directory.load_config()).abstract)
    state.params["conv_out"]["bias"] = state.params["conv_out"]["bias"].at[0].set(jnp.inf)
    checkpoints.set_aside([step], "sound")
    checked = checkpoints_module._checksums
    with mock.patch.object(checkpoints_module, "_checksums", lambda x, finite=False: checked(x)):
        checkpoints.save(step, dataclasses.replace(state), notes)
    checkpoints.wait()
    checkpoints.close()
    return step


@pytest.mark.parametrize(
    ("form", "every", "seeds"),
    [
        ("unrolled", 1, SEEDS),
        pytest.param("vmap", 10, SEEDS, marks=pytest.mark.long),
    ],
)
def test_a_seed_whose_loss_is_not_finite_stops_and_the_others_finish(
    alone, tmp_path, monkeypatch, capsys, form, every, seeds
):
    """A real infinity goes through the common program. With `every` 1 all is due at each step.

    A signal later on stops the others as if it were not there.
    """
    bad = SEEDS[1]
    for seed in seeds:
        rewound(alone, tmp_path, seed)
    assert poison(tmp_path / f"seed{bad}") == 10
    capsys.readouterr()
    if form == "unrolled":
        signal_after(monkeypatch, Lane, "step_to", lambda lane, *_: lane.step == 15)
        assert main(command(tmp_path, seeds, train__checkpoint_every=every)) == 75
        capsys.readouterr()
        assert main(command(tmp_path, seeds, train__checkpoint_every=every)) == 1
        captured = capsys.readouterr()
        error = captured.err.removeprefix("error: ")
        assert captured.err.count("\n") == 1
        others = ", ".join(str(seed) for seed in seeds if seed != bad)
        assert f"training seeds {others} from step" in captured.out
    else:
        with pytest.raises(NonFiniteError) as failure:
            vmapped(tmp_path, seeds)
        error = str(failure.value)
    assert error.startswith(f"seed {bad}: loss or gradient not finite at step 11: loss")
    assert final_state(tmp_path / f"seed{bad}")[1] == 10
    for seed in seeds:
        if seed != bad:
            assert_close_run(tmp_path / f"seed{seed}", alone / f"seed{seed}")
            assert (tmp_path / f"seed{seed}/samples/step_00000020.png").exists()
    assert not (tmp_path / f"seed{bad}/samples/step_00000020.png").exists()


def test_what_is_evaluated_afterwards(unrolled, tmp_path, monkeypatch, capsys):
    """Finished seeds are evaluated when asked to be; one without a finite result fails alone."""
    parent = shutil.copytree(unrolled, tmp_path / "runs")
    settings = EVALUATION | {"evaluation__cache_dir": tmp_path / "cache"}
    bad, good = SEEDS
    measure = lane_module.evaluate_and_keep

    def failing(evaluator, run, *args):
        if run.config.seed == bad and "bits_per_dim_test" in evaluator.asked and not args[2]():
            raise NonFiniteError("bits/dim is not finite")
        return measure(evaluator, run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(lane_module, "evaluate_and_keep", failing)
        assert main(command(parent, (bad, good), **settings | {"train__keep_best": ""})) == 1
    captured = capsys.readouterr()
    assert f"seed {bad}: bits/dim is not finite" in captured.out.splitlines()
    assert captured.err == f"error: seed {bad}: bits/dim is not finite\n"
    assert [len(lines(parent / f"seed{seed}")) for seed in (bad, good)] == [4, 5]
    with seeds_are_arguments():
        assert main(command(parent, (bad, good), **settings)) == 0
    for seed in (bad, good):
        assert len(lines(parent / f"seed{seed}")) == 5
        assert runs.load(parent / f"seed{seed}", best=True).step == 20
    before = snapshot(parent)
    assert main(command(parent, (bad, good), **settings)) == 0
    after = snapshot(parent)
    assert {path.name for path in after if after[path] != before.get(path)} <= STARTS


@pytest.mark.long
def test_each_seed_is_evaluated_as_alone_also_after_a_signal(tmp_path, monkeypatch):
    settings = EVALUATION | {"evaluation__cache_dir": tmp_path / "cache"}
    for seed in SEEDS:
        assert train(tmp_path / f"alone{seed}", seed=seed, **settings) == 0
    hit = signal_after(
        monkeypatch,
        files,
        "replace",
        lambda path, _: path.name.startswith("step10_prior_test") and "seed0" in str(path),
    )
    assert main(command(tmp_path, SEEDS, **settings)) == 75
    assert hit
    assert main(command(tmp_path, SEEDS, **settings)) == 0
    for seed in SEEDS:
        one, other = tmp_path / f"seed{seed}", tmp_path / f"alone{seed}"
        assert_close_run(one, other)
        assert [r["step"] for r in lines(one) if "bits_per_dim_test" in r] == [10, 20]
        assert runs.load(one, best=True).step == runs.load(other, best=True).step


@pytest.mark.parametrize(
    ("seeds", "more", "message"),
    [
        ("0,1", ["--workdir=W/seed"], "with --seeds it needs {seed}"),
        ("0,1,0", [], "--seeds=0,1,0: each must be named once"),
        ("1,01", [], "each must be named once"),
        ("0,x", [], "--seeds=0,x: expected integers such as 0,1,2"),
        ("", [], "--seeds=: expected integers"),
        ("0,-1", [], "config.seed=-1: must be between 0 and"),
        ("0,1", ["--config.seed=3"], "--seeds and --config.seed exclude each other"),
        ("0,1", ["--mode=sample"], "--seeds belongs to --mode=train"),
        ("0,1", ["--mode=check"], "--seeds belongs to --mode=train"),
        ("0,1", ["--config.parallel.mode=fsdp"], "parallel.mode=fsdp: seeds are trained together"),
        ("0,1", ["--config.parallel.mode=pmap"], "parallel.mode=pmap: seeds are trained together"),
    ],
)
def test_wrong_requests_are_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, seeds, more, message
):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments("W/seed{seed}"), f"--seeds={seeds}", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "W").exists()


def test_a_directory_of_another_config_is_refused_before_any_is_written(tmp_path, capsys):
    assert train(tmp_path / "seed5", seed=5, train__steps=0) == 0
    assert main(command(tmp_path, train__batch_size=16)) == 2
    error = capsys.readouterr().err
    assert "seed5" in error and "train.batch_size was 8, is 16" in error
    assert [path.name for path in tmp_path.iterdir()] == ["seed5"]
    # Nor another folder of images.
    for folder in "ab":
        (tmp_path / "images" / folder).mkdir(parents=True)
        for k in range(8):
            figures.save_png(tmp_path / f"images/{folder}/{k}.png", np.zeros((8, 8, 1), np.uint8))
    settings = {"data__name": "folder", "data__cache_dir": tmp_path / "cache", "train__steps": 0}
    parent, data = tmp_path / "folder", "data__data_dir"
    assert train(parent / "seed5", seed=5, **settings, **{data: tmp_path / "images/a"}) == 0
    assert main(command(parent, **settings, **{data: tmp_path / "images/b"})) == 2
    assert "data.data_dir was" in capsys.readouterr().err
    assert [path.name for path in parent.iterdir()] == ["seed5"]
    # Nor is the run of one seed taken for another's.
    shutil.copytree(tmp_path / "seed5", tmp_path / "seed3")
    assert main(command(tmp_path, (0, 3))) == 2
    assert "seed was 5, is 3" in capsys.readouterr().err
