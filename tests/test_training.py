"""Whole runs: what they leave behind, going on to the bit, and what can go wrong."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from runs_for_tests import ROOT, arguments, assert_equal_states, final_state, lines, start, train

from ddpm_jax import generation, parallel
from ddpm_jax.config import RequestError
from ddpm_jax.main import main, parse, resolve
from ddpm_jax.training import loop
from ddpm_jax.training.job import Job
from ddpm_jax.training.lane import Lane


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "in one go, ünbroken"
    assert train(workdir) == 0
    return workdir


def test_a_run_leaves_what_the_readme_names(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "samples", "figures"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"10", "20"}
    for picture in ("samples/step_00000020.png", "figures/training.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    records = lines(whole)
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert {"loss", "grad_norm", "learning_rate", "loss_quarter_1"} <= records[-1].keys()
    assert records[0]["learning_rate"] == pytest.approx(4 / 5 * 1e-3, rel=1e-6)


def test_the_events_hold_scalars_and_pictures(whole):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (path,) = whole.glob("events.out.tfevents*")
    tags = {
        value.tag
        for event in event_file.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert {"loss", "grad_norm", "loss_quarter_4", "samples"} <= tags


@pytest.mark.parametrize("first", [10, 12])
def test_going_on_gives_the_same_run_to_the_bit(whole, tmp_path, first):
    """Also from a step at which no line of metrics is due: the open window travels along."""
    assert train(tmp_path, train__steps=first) == 0
    assert final_state(tmp_path)[1] == first
    assert train(tmp_path) == 0
    assert_equal_states(final_state(whole)[0], final_state(tmp_path)[0])
    assert lines(tmp_path) == lines(whole)


def test_lines_after_the_checkpoint_of_a_killed_run_are_dropped(whole, tmp_path):
    assert train(tmp_path, train__steps=10) == 0
    later = '{"step": 15, "loss": 1.0}\n{"step": 20, "lo'
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(later)
    assert train(tmp_path) == 0
    assert lines(tmp_path) == lines(whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads.
def test_a_damaged_checkpoint_is_named_passed_over_and_kept(tmp_path, capsys):
    assert train(tmp_path) == 0
    sound, _ = final_state(tmp_path)
    data = [path for path in (tmp_path / "checkpoints/20/state").rglob("d/*") if path.is_file()]
    # All of any size: which of them hold older versions of a node depends on Orbax's threads.
    for victim in [path for path in data if path.stat().st_size > 5000]:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    capsys.readouterr()
    assert train(tmp_path) == 0
    said = capsys.readouterr().out
    assert "checkpoint 20 cannot be read and is passed over" in said
    assert "going on from step 10" in said
    assert_equal_states(sound, final_state(tmp_path)[0])
    assert (tmp_path / "checkpoints/20.damaged/state").is_dir()  # Nothing is deleted.


def test_no_whole_checkpoint_is_an_error_and_nothing_is_trained(tmp_path, capsys):
    assert train(tmp_path, train__steps=10) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    for path in (tmp_path / "checkpoints/10/meta").iterdir():
        path.unlink()
    assert train(tmp_path) == 1
    assert "none of the checkpoints [10]" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path, capsys):
    assert train(tmp_path, train__learning_rate="1e30", train__checkpoint_every=1) == 1
    error = capsys.readouterr().err
    found = re.search(r"^error: loss or gradient not finite at step (\d)[:,]", error)
    assert found and error.count("\n") == 1, error
    state, step = final_state(tmp_path)
    assert step == int(found[1]) - 1
    assert all(np.isfinite(leaf).all() for leaf in state.values())


def test_an_initial_state_that_cannot_be_had_ends_the_training(tmp_path, monkeypatch):
    def start(self):
        raise MemoryError("made")

    monkeypatch.setattr(Job, "prepare_start", start)
    config = resolve(*parse(arguments(tmp_path)))
    with pytest.raises(MemoryError, match="made"):
        loop.train(config, str(tmp_path), print)


def test_the_initial_state_is_waited_for_whatever_ends_the_training(tmp_path, monkeypatch):
    """It is computed beside all else; a process that ends within XLA may crash."""
    done = []

    def start(self):
        time.sleep(0.3)
        done.append(True)

    def refuse(self, source, force):
        raise RequestError("made")

    monkeypatch.setattr(Job, "prepare_start", start)
    monkeypatch.setattr(Lane, "check", refuse)
    config = resolve(*parse(arguments(tmp_path)))
    with pytest.raises(RequestError, match="made"):
        loop.train(config, str(tmp_path), print)
    assert done


def test_the_step_is_compiled_while_the_initial_state_is_computed(tmp_path, monkeypatch):
    """Each waits for the other to have begun."""
    begun = [threading.Event(), threading.Event()]
    start, prepare = Job.prepare_start, parallel._Compiled.prepare

    def starting(self):
        begun[0].set()
        assert begun[1].wait(60)
        return start(self)

    def preparing(self, *shapes):
        begun[1].set()
        assert begun[0].wait(60)
        prepare(self, *shapes)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes[0][1]))

    monkeypatch.setattr(Job, "prepare_start", starting)
    monkeypatch.setattr(parallel._Compiled, "prepare", preparing)
    assert train(tmp_path, train__steps=2, train__checkpoint_every=2) == 0
    assert final_state(tmp_path)[1] == 2


def test_a_hang_while_the_step_is_compiled_is_noted_with_its_step(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    config = resolve(*parse(arguments(tmp_path / "run", train__steps=40)))
    seen = []

    def prepare(self, *shapes):
        clock, watch = attended[0]
        watch.farewell("nothing moves")
        life = json.loads((tmp_path / "run/goodput.json").read_text(encoding="utf-8"))["lives"][-1]
        seen.extend([clock.describe(), life["ended"]])
        raise RequestError("made")

    attended, watched = [], loop.watched
    monkeypatch.setattr(loop, "watched", lambda *a: attended.append(watched(*a)) or attended[0])
    monkeypatch.setattr(parallel._Compiled, "prepare", prepare)
    with pytest.raises(RequestError, match="made"):
        loop.train(config, str(tmp_path / "run"), print)
    assert seen == ["in phase compile at step 20", "nothing moves"]


def test_another_config_is_refused_but_harmless_changes_are_not(whole, tmp_path, capsys):
    assert train(tmp_path, train__steps=10) == 0
    assert train(tmp_path, train__batch_size=16, model__dropout=0.2) == 2
    error = capsys.readouterr().err
    assert "train.batch_size was 8, is 16" in error and "model.dropout was 0.1, is 0.2" in error
    assert error.count("\n") == 1
    assert train(tmp_path, train__steps_per_call=2) == 2
    assert train(tmp_path, train__steps=12, train__log_every=4, sample__steps=3) == 0


def test_a_finished_run_has_nothing_left_to_do(whole, capsys):
    before = final_state(whole)[0]
    assert train(whole) == 0
    assert "going on from step 20" in capsys.readouterr().out
    assert_equal_states(before, final_state(whole)[0])


# The second host cannot write the checkpoint of step 10, and is slow to read its images.
FULL = """
import resource, signal, sys, time
from ddpm_jax.data import Batches
from ddpm_jax.main import main
from ddpm_jax.training.checkpoints import Checkpoints

save, call = Checkpoints.save, Batches.__call__

def saving(self, step, *rest):
    if step == 10:
        self.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    save(self, step, *rest)

def slowly(self, step):
    time.sleep(0.2)
    return call(self, step)

if "--process_id=1" in sys.argv:
    Checkpoints.save, Batches.__call__ = saving, slowly
sys.exit(main(sys.argv[1:]))
"""


def start_hosts(workdir, mode="train", code=None, **overrides):
    """Two processes over loopback, with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = arguments(workdir, mode=mode, **overrides)
    hosts = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    return [start([*argv, *hosts, f"--process_id={k}"], 2, code) for k in range(2)]


@pytest.mark.slow
def test_two_hosts_train_and_sample_as_one(whole, tmp_path):
    def together(mode):
        processes = start_hosts(tmp_path / "run", mode=mode)
        outputs = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        said = [line for line in outputs[1][0].splitlines() if "peer ranks" not in line]
        assert not said  # Only the first host speaks.

    together("train")
    for metric in ("loss", "grad_norm"):
        values = [[r[metric] for r in lines(workdir)] for workdir in (whole, tmp_path / "run")]
        np.testing.assert_allclose(*values, rtol=1e-3)
    together("sample")
    (path,) = (tmp_path / "run/samples").glob("*.npz")
    assert main([f"--workdir={whole}", "--mode=sample"]) == 0
    difference = np.abs(
        generation.load_images(path)[0].astype(int)
        - generation.load_images(whole / "samples" / path.name)[0]
    )
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


@pytest.mark.slow
def test_a_host_that_cannot_save_ends_both_and_the_slow_one_is_named(tmp_path):
    settings = {"train__checkpoint_every": 5, "parallel__mode": "fsdp"}
    processes = start_hosts(tmp_path / "run", code=FULL, **settings)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    wanted = f"cannot write a checkpoint under {tmp_path}/run/checkpoints ("
    assert f"error: {wanted}" in outputs[1][1]
    assert re.search(rf"process 1 on \S+ has stopped: {re.escape(wanted)}", outputs[0][1])
    assert final_state(tmp_path / "run")[1] == 5
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["time/input_max_host"] == 1


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    process = start(arguments(tmp_path), devices=3)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "train.batch_size=8 does not divide by 3: 3 devices" in errors
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("before", ["", "boto3", "google.cloud.storage"])
def test_what_is_not_needed_is_not_imported(tmp_path, before):
    """TensorBoard's writer would import PyTorch, longer than all other imports together, and more.

    What was imported before stays.
    """
    for name in ("torch", "boto3", "google/cloud/storage"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('imported')")
    unneeded = {"torch", "boto3", "google.cloud.storage", "scipy.special"}
    code = (
        f"import sys; sys.modules.update({{{before!r}: sys}}); import ddpm_jax.main\n"
        f"assert {unneeded!r} & set(sys.modules) == {{{before!r}}} - {{''}}\n"
        f"assert sys.modules[{before!r}] is sys"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
