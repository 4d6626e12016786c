"""What can go wrong in a run, each caused here: what is said, what is kept, how it goes on."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from runs_for_tests import (
    ROOT,
    arguments,
    assert_equal_states,
    final_state,
    lines,
    start,
    train,
)

from ddpm_jax import runs
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches
from ddpm_jax.data.records import ReadError
from ddpm_jax.training import goodput
from ddpm_jax.training.best import Best
from ddpm_jax.training.checkpoints import CheckpointError, Checkpoints
from ddpm_jax.training.job import Job, initial_state, make_job
from ddpm_jax.training.lane import Lane
from ddpm_jax.training.metrics import NonFiniteError, Window
from ddpm_jax.training.step import train_step


def three_floats():
    """The shape of what the smallest checkpoints here hold."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct((3,), "float32", sharding=device)}


def make_a_batch_fail(monkeypatch, steps):
    """The images of these steps (counted from 0) become something that no loss is finite of."""
    original, shape = Batches.__call__, Job.images.fget

    def call(self, step):
        images = original(self, step)
        return images.astype("float32") * np.float32("nan" if step in steps else 1)

    monkeypatch.setattr(Batches, "__call__", call)
    monkeypatch.setattr(Job, "images", property(lambda self: shape(self).update(dtype="float32")))


# Numbers that are none.


def test_a_batch_that_is_not_finite_stops_the_run_by_default(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        make_a_batch_fail(patch, {6})
        assert train(tmp_path, train__steps=10, train__checkpoint_every=5) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: loss or gradient not finite at step 7: loss nan")
    state, step = final_state(tmp_path)
    assert step == 5 and all(np.isfinite(leaf).all() for leaf in state.values())


def test_with_skip_its_update_is_left_out_and_nothing_else(tmp_path, capsys, monkeypatch):
    """The same as by hand: step by step, without that update."""
    settings = {"train__steps": 10, "train__checkpoint_every": 5, "train__nonfinite": "skip"}
    with monkeypatch.context() as patch:
        make_a_batch_fail(patch, {2, 6})
        assert train(tmp_path, **settings) == 0
    said = capsys.readouterr().out
    assert "step 3: loss or gradient not finite; the update is left out" in said
    assert "step 7: loss or gradient not finite; the update is left out" in said
    state, step = final_state(tmp_path)
    assert step == 10
    assert [line["skipped_updates"] for line in lines(tmp_path)] == [1, 2]

    job = make_job(runs.RunDirectory.of(tmp_path).load_config())
    from ddpm_jax.data import open_source

    batches = Batches(open_source(job.config), 0, 8, 1, job.layout.split(1), True)
    update = jax.jit(functools.partial(train_step, job.task))
    by_hand = jax.jit(initial_state(job.config, job.task))(np.int32(0))
    losses = []
    for k in range(10):
        if k in (2, 6):
            by_hand = dataclasses.replace(by_hand, step=by_hand.step + 1)
        else:
            by_hand, metrics = update(by_hand, batches(k)[0])
            losses.append(float(metrics["loss"]))
    leaves = jax.tree_util.tree_leaves_with_path(by_hand)
    for path, leaf in leaves:
        np.testing.assert_allclose(
            state[jax.tree_util.keystr(path)], leaf, rtol=1e-5, atol=1e-6, err_msg=str(path)
        )
    np.testing.assert_allclose(lines(tmp_path)[0]["loss"], np.mean(losses[:4]), rtol=1e-5)


@pytest.mark.long
def test_a_run_goes_on_between_updates_that_are_left_out(tmp_path, monkeypatch):
    settings = {"train__steps": 10, "train__checkpoint_every": 5, "train__nonfinite": "skip"}
    make_a_batch_fail(monkeypatch, {2, 6})
    assert train(tmp_path / "whole", **settings) == 0
    assert train(tmp_path / "parts", **settings | {"train__steps": 5}) == 0
    assert train(tmp_path / "parts", **settings) == 0
    assert_equal_states(final_state(tmp_path / "whole")[0], final_state(tmp_path / "parts")[0])
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_with_too_many_of_them_it_stops_all_the_same(tmp_path, capsys, monkeypatch):
    make_a_batch_fail(monkeypatch, {1, 2, 3})
    assert train(tmp_path, train__nonfinite="skip", train__max_skipped=2) == 1
    error = capsys.readouterr().err
    assert "3 updates were not finite and left out, more than train.max_skipped=2" in error
    assert "at steps 2, 3, 4" in error


def test_a_window_takes_the_finite_steps_alone():
    window = Window()
    metrics = {
        "loss": np.array([1.0, np.nan, 3.0]),
        "grad_norm": np.array([2.0, np.inf, 4.0]),
        "learning_rate": np.ones(3),
        "quarter_loss": np.ones((3, 4)),
        "quarter_share": np.full((3, 4), 0.25),
        "skipped": np.array([False, True, False]),
    }
    assert window.add(9, metrics) == [8]
    assert window.scalars()["loss"] == 2.0 and window.scalars()["grad_norm"] == 3.0
    with pytest.raises(NonFiniteError, match="at step 8:"):
        Window().add(9, metrics | {"skipped": np.zeros(3, bool)})


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    with pytest.raises(NonFiniteError, match="w is not finite and is not saved"):
        checkpoints.save(2, {"w": jnp.array([1.0, np.inf, 1.0])}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.close()


# Checkpoints.


def test_the_newest_and_those_at_multiples_are_kept(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path), keep=2, keep_every=20)
    for step in range(10, 80, 10):
        checkpoints.save(step, {"w": jnp.full(3, float(step))}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [70, 60, 40, 20]
    checkpoints.close()


def test_notes_are_those_of_the_moment_however_long_the_disk_takes(tmp_path, monkeypatch):
    """Orbax writes them in the background, when the run has gone on."""
    making = os.mkdir

    def slowly(path, *rest, **more):
        if "orbax-checkpoint-tmp" in str(path):
            time.sleep(0.3)
        making(path, *rest, **more)

    checkpoints, notes = Checkpoints(epath.Path(tmp_path)), {"window": {"steps": 1}}
    monkeypatch.setattr(os, "mkdir", slowly)
    checkpoints.save(1, {"w": jnp.ones(3)}, notes)
    notes["window"]["steps"] = 2
    checkpoints.wait()
    found, reason = checkpoints.attempt(1, three_floats())
    checkpoints.close()
    assert reason is None and found[1] == {"window": {"steps": 1}}


def test_damaged_ones_do_not_take_the_places_of_whole_ones(tmp_path):
    def save(checkpoints, *steps):
        for step in steps:
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, {})
        checkpoints.wait()
        checkpoints.close()

    save(Checkpoints(epath.Path(tmp_path), keep=3), 10, 20, 30)
    for step in (20, 30):
        (tmp_path / str(step) / "meta/metadata").write_text("{}")
    (tmp_path / "20.damaged").mkdir()  # Of an earlier time.
    again = Checkpoints(epath.Path(tmp_path), keep=3, sweep=True)
    assert again.restore(three_floats())[1] == 10
    save(again, 15, 20)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"10", "15", "20", "20.damaged", "20.damaged1", "30.damaged"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_best_checkpoint_is_one_when_it_is_there(tmp_path, full_disk):
    best, params = Best(tmp_path, "fid"), {"w": jnp.ones(3)}
    best.save(20, params, 5.0, "p")
    best.wait()
    full_disk.fill(100)
    with pytest.raises(CheckpointError):
        best.save(10, params, 3.0, "p")  # Of a later life.
        best.wait()
    full_disk.empty()
    assert (tmp_path / "fid/20.beaten").is_dir()  # Nothing is lost.
    assert best.beaten_by(4.0, "lower", "p")
    with contextlib.suppress(CheckpointError):  # What is left to say of the failure.
        best.wait()
    best.save(30, params, 4.0, "p")
    best.wait()
    best.close()
    assert not Best(tmp_path, "fid").beaten_by(4.5, "lower", "p")


def test_what_was_never_whole_is_removed_by_who_trains_and_by_nobody_else(tmp_path):
    left = tmp_path / "5.orbax-checkpoint-tmp-17"
    left.mkdir()
    (left / "file").write_text("half")
    Checkpoints(epath.Path(tmp_path)).close()
    assert left.exists()
    Checkpoints(epath.Path(tmp_path), sweep=True).close()
    assert not left.exists()


@pytest.fixture
def full_disk():
    """Files of more than so many bytes cannot be written, until `.empty()`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Disk:
        def fill(self, size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        def empty(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    disk = Disk()
    yield disk
    disk.empty()
    signal.signal(signal.SIGXFSZ, handler)


def fill_at(monkeypatch, disk, step, until=None):
    """The disk is full while the checkpoint of this step is written."""
    save, wait = Checkpoints.save, Checkpoints.wait

    def saving(self, at, *rest):
        if until is not None and at >= until:
            disk.empty()
        if at == step:
            self.wait()  # For the one before.
            disk.fill(3000)
        save(self, at, *rest)

    monkeypatch.setattr(Checkpoints, "save", saving)
    return wait


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads.
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(
    tmp_path, capsys, monkeypatch, full_disk
):
    with monkeypatch.context() as patch:
        fill_at(patch, full_disk, 10)
        assert train(tmp_path, train__checkpoint_every=5) == 1
    full_disk.empty()
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"error: cannot write a checkpoint under {tmp_path}/checkpoints (")
    assert "MiB free)" in error
    assert final_state(tmp_path)[1] == 5
    assert train(tmp_path, train__checkpoint_every=5) == 0  # There is space again.
    assert final_state(tmp_path)[1] == 20
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))  # What was left of it is gone.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_or_it_goes_on_and_saves_when_it_can(tmp_path, capsys, monkeypatch, full_disk):
    fill_at(monkeypatch, full_disk, 10, until=15)
    settings = {"train__checkpoint_every": 5, "train__write_errors": "continue"}
    assert train(tmp_path, **settings) == 0
    said = capsys.readouterr().out
    assert "cannot write a checkpoint under" in said
    assert "the training goes on (train.write_errors=continue)" in said
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"5", "15", "20"} <= names and "10" not in names


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_last_checkpoint_that_cannot_be_written_is_an_error_in_any_case(
    tmp_path, capsys, monkeypatch, full_disk
):
    fill_at(monkeypatch, full_disk, 20)
    assert train(tmp_path, train__checkpoint_every=10, train__write_errors="continue") == 1
    full_disk.empty()
    assert "error: cannot write" in capsys.readouterr().err
    assert final_state(tmp_path)[1] == 10


# Images that cannot be read.


def test_images_that_cannot_be_read_stop_the_run_after_a_checkpoint(tmp_path, capsys, monkeypatch):
    original = Batches.__call__

    def call(self, step):
        if step == 7:
            raise ReadError("number 5 of a.png cannot be read after 3 attempts")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", call)
        assert train(tmp_path) == 1
    assert capsys.readouterr().err == "error: number 5 of a.png cannot be read after 3 attempts\n"
    assert final_state(tmp_path)[1] == 7
    assert train(tmp_path) == 0


def test_a_directory_that_vanishes_ends_the_run_and_is_not_made_again(
    tmp_path, capsys, monkeypatch
):
    step_to = Lane.step_to

    def stepping(self, *rest):
        if self.step == 12:
            self._keeper.finish()  # Nothing is on its way.
            shutil.rmtree(tmp_path / "run")
        return step_to(self, *rest)

    monkeypatch.setattr(Lane, "step_to", stepping)
    assert train(tmp_path / "run") == 1
    assert capsys.readouterr().err == "error: the run directory is gone; this training ends\n"
    assert not (tmp_path / "run").exists()


# Starts.


def test_starts_that_lead_nowhere_end(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", lambda self, step: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                train(tmp_path)
    assert train(tmp_path) == 2
    error = capsys.readouterr().err
    assert "the last 3 starts ended at step 0 or before, without a new checkpoint" in error
    assert "ZeroDivisionError: division by zero" in error
    assert train(tmp_path, train__max_restarts=0, train__steps=10) == 0
    assert train(tmp_path) == 0  # There was progress since.


def test_a_start_that_was_told_to_end_and_then_killed_has_not_failed(tmp_path):
    """As one that is preempted while it compiles, when the grace is over."""
    path, clock = epath.Path(tmp_path / "goodput.json"), goodput.Clock()
    for _ in range(5):
        lives = goodput.Lives(path, clock, active=True)
        lives.check_progress(3)
        lives.__enter__()
        lives.begin(7)
        lives.check_progress(3)
        lives.interrupt()
    assert [life.ended for life in goodput.read(path)] == ["interrupted"] * 5
    lives.update(7, at_once=True)  # The step is finished; then the process is killed.
    assert goodput.read(path)[-1].ended == "interrupted"
    lives.end("CheckpointError: the disk is full")
    assert goodput.read(path)[-1].ended == "CheckpointError: the disk is full"
    for failure in ("", "", ""):
        lives = goodput.Lives(path, clock, active=True)
        lives.begin(7)
        lives.update(7, failure, at_once=True)
    lives = goodput.Lives(path, clock, active=True)
    lives.begin(7)
    with pytest.raises(RequestError, match="the last 4 starts ended at step 7"):
        lives.check_progress(3)
    clock.close()


def test_a_signal_while_images_do_not_come_saves_what_was_trained(tmp_path, monkeypatch):
    read, call, ended = Batches._read, Batches.__call__, threading.Event()

    def reading(self, step):
        return ended.wait(600) if step == 5 else read(self, step)

    def calling(self, step):
        if step == 5:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return call(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_read", reading)
        patch.setattr(Batches, "__call__", calling)
        assert train(tmp_path, data__resident_bytes=0) == 75
    ended.set()
    assert final_state(tmp_path)[1] == 5


@pytest.mark.long
def test_another_config_or_other_images_can_be_insisted_on(tmp_path, capsys, monkeypatch):
    assert train(tmp_path, train__steps=10) == 0
    assert train(tmp_path, train__learning_rate=1e-4) == 2
    error = capsys.readouterr().err
    assert "train.learning_rate was 0.001, is 0.0001" in error and "--force" in error
    from ddpm_jax.main import main

    assert main([*arguments(tmp_path, train__learning_rate=1e-4), "--force"]) == 0
    said = capsys.readouterr().out
    assert "config changed since the last start" in said
    assert "train.learning_rate was 0.001, is 0.0001" in said and "train.steps was 10" in said
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["train"]["learning_rate"] == 1e-4

    from ddpm_jax.data import sources

    digits = sources._open_digits

    def others(data, split):
        source = digits(data, split)
        source._images = source._images ^ 1
        return source

    monkeypatch.setattr(sources, "_open_digits", others)
    more = {"train__learning_rate": 1e-4, "train__steps": 30}
    assert train(tmp_path, **more) == 2
    assert "the images differ from those of the run so far" in capsys.readouterr().err
    assert main([*arguments(tmp_path, **more), "--force"]) == 0


def test_a_second_training_of_the_same_run_is_refused(tmp_path):
    hold = "import sys; from ddpm_jax import lock; from etils import epath\n"
    hold += "with lock.hold(epath.Path(sys.argv[1]), print): print('held', flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert first.stdout.readline() == "held\n"
    try:
        assert train(tmp_path) == 2
    finally:
        first.kill()
        first.wait()
    assert not (tmp_path / "config.json").exists()
    assert train(tmp_path, train__steps=5, train__checkpoint_every=5) == 0  # At once.


@pytest.mark.long
def test_a_second_start_finds_the_compiled_step(tmp_path):
    """In ~/.cache or wherever: what took more than half a second is not compiled again."""
    assert train(tmp_path, train__steps=5, train__checkpoint_every=5) == 0
    events = collections.Counter()

    def count(event, **_):
        events[event] += 1

    jax.clear_caches()
    jax.monitoring.register_event_listener(count)
    try:
        assert train(tmp_path, train__steps=10, train__checkpoint_every=5) == 0
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert events["/jax/compilation_cache/cache_hits"] >= 2, events  # The step and the sampler.


# Where the time goes.


def test_phases_add_up_to_the_life_of_the_process(monkeypatch):
    now = itertools.count(0, 1.0)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: next(now))
    clock = goodput.Clock()
    with clock.phase("step"):
        with clock.phase("input"):
            pass
        clock._event(goodput.COMPILING, 0.25)
    seconds = clock.seconds()
    clock.close()
    assert seconds == dict.fromkeys(goodput.PHASES, 0.0) | {
        "start": 2.0,
        "step": 1.75,
        "input": 1.0,
        "compile": 0.25,
    }


def test_steps_done_twice_are_lost():
    lives = [
        goodput.Life(0, 50, {"start": 5.0, "step": 100.0}, ""),
        goodput.Life(goodput.NOWHERE, goodput.NOWHERE, {"start": 3.0}, ""),
        goodput.Life(40, 60, {"start": 5.0, "step": 40.0}, ""),
        goodput.Life(60, 80, {"step": 40.0}, ""),
    ]
    seconds = goodput.total(lives)
    assert seconds["lost"] == pytest.approx(20.0)  # A fifth of the first life's.
    assert seconds["step"] == pytest.approx(160.0)
    assert sum(seconds.values()) == pytest.approx(sum(life.wall for life in lives))


@pytest.mark.long
def test_after_a_kill_the_parts_add_up_to_the_wall_time(tmp_path):
    settings = {"train__steps": 1200, "train__checkpoint_every": 100, "train__log_every": 10}
    began = time.monotonic()
    process = start(arguments(tmp_path, **settings))
    while not (tmp_path / "checkpoints/400").exists():
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    process.kill()
    process.wait()
    wall = time.monotonic() - began
    began = time.monotonic()
    process = start(arguments(tmp_path, **settings))
    last = next(line for line in process.stdout if line.startswith("time:"))
    wall += time.monotonic() - began
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "over 2 starts" in last
    content = json.loads((tmp_path / "goodput.json").read_text())
    assert [life["ended"] for life in content["lives"]] == ["", "done"]
    assert sum(content["total"].values()) == pytest.approx(wall, rel=0.05)
