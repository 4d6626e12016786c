"""SIGTERM and Ctrl-C at random moments, once or twice: exit code 75, and nothing is lost.

Also while something compiles for the first time, while evaluating, while sampling, and in the modes
that use a trained run. The exit code is 75, or the run was over; never anything else.
"""

import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from mortal import BEGAN, Run, assert_nothing_lost

STEPS, EVALUATED = 14, 7
SETTINGS = {
    "train__steps": STEPS,
    "train__checkpoint_every": 5,
    "train__log_every": 1,
    "train__sample_every": 4,
    "train__evaluate_every": EVALUATED,
    "train__max_restarts": 0,
    "evaluation__metrics": "bits_per_dim",
    "evaluation__max_images": 64,
    "evaluation__batch_size": 8,
}
AGAIN = 75


def pytest_generate_tests(metafunc):
    long = metafunc.config.getoption("--long")
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(6) if long else [0])
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", ["sample", "evaluate"])


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory):
    """A run that is left alone, and how long its parts took."""
    run = Run(nursery, tmp_path_factory.mktemp("unbroken"), SETTINGS)
    marks = [("line", 1), ("line", EVALUATED), ("line", EVALUATED + 1), ("checkpoint", STEPS)]
    seconds = run.timed(run.start(), marks)
    first, evaluating, evaluated, last = (seconds[mark] for mark in marks)
    # How long a signal may wait after each of these marks.
    run.moments = {
        BEGAN: first,
        ("line", 2): evaluating - first,
        ("line", EVALUATED): evaluated - evaluating,
        ("checkpoint", STEPS): seconds["end"] - last,
    }
    return run


def signalled(run, pid, rng, tally, twice=False):
    """Sends a life a signal, or two; its exit code."""
    numbers = [(signal.SIGTERM, signal.SIGINT)[rng.integers(2)] for _ in range(1 + twice)]
    for number in numbers:
        if run.nursery.ended(pid) is None:
            os.kill(pid, number)
        if twice:
            time.sleep(rng.uniform(0, 0.3))
    began = time.monotonic()
    code = run.code(pid)
    seconds = time.monotonic() - began
    if code:
        tally("signals")
        tally("signals twice" if twice else f"signals in --mode={run.mode}")
    last = run.said().strip().splitlines()[-1:]
    print(f"{[number.name for number in numbers]}: {code} after {seconds:.1f} s, {last}")
    assert "Traceback" not in run.said(), run.said()
    assert code in (0, AGAIN), run.said()
    if code == AGAIN:
        assert "the same command goes on" in run.said(), run.said()
    return code, seconds


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_loses_nothing(
    nursery, unbroken, tmp_path, tally, request, seed
):
    rng = np.random.default_rng(seed)
    cache = tmp_path / "cache" if request.config.getoption("--long") and seed % 3 == 0 else None
    run = Run(nursery, tmp_path, SETTINGS, cache)
    for mark, longest in unbroken.moments.items():
        twice = seed % 2 == 1 and bool(rng.integers(2))
        before, pid = run.newest(), run.start()
        if run.await_mark(pid, mark):
            time.sleep(rng.uniform(0, longest))
        code, seconds = signalled(run, pid, rng, tally, twice)
        if not code:
            break
        stopped = re.search(r"^stopped at step (\d+); the same", run.said(), re.MULTILINE)
        if stopped:  # In good order: all that was done is there.
            assert run.newest() == int(stopped[1]) >= before
            assert not run.unfinished()
        else:  # At once, of which there is nothing to be waited for.
            assert "stopped at once" in run.said()
            assert run.newest() >= before
            assert seconds < 20
    else:
        assert run.code(run.start()) == 0, run.said()
    assert_nothing_lost(run, unbroken)


def results(workdir):
    """What the modes that use a run have found: bytes of images, and numbers by name."""
    images = {}
    for path in (workdir / "samples").glob("*.npz"):
        with np.load(path) as file:
            images[path.name] = file["images"].tobytes()
    numbers = {
        path.name: re.sub(r'"(seconds|provenance)": .*', "", path.read_text())
        for path in (workdir / "evaluation").glob("*.json")
    }
    return images, numbers


@pytest.mark.slow
def test_what_uses_a_run_can_be_stopped_too(nursery, unbroken, tmp_path, tally, request, mode):
    rng = np.random.default_rng(len(mode))
    settings = {"sample__count": 32, "sample__batch_size": 4, "evaluation__max_images": 128}
    runs = []
    for name in ("left alone", "stopped"):
        run = Run(nursery, tmp_path / name, SETTINGS | settings)
        run.folder.mkdir()
        shutil.copytree(unbroken.workdir, run.workdir)
        runs.append(run)
    alone, run = runs
    seconds = alone.timed(alone.start(mode), [])["end"]
    stops = 5 if request.config.getoption("--long") else 1
    for _ in range(stops):
        pid = run.start(mode)
        time.sleep(rng.uniform(0, seconds))
        if not signalled(run, pid, rng, tally)[0]:
            break
    else:
        assert run.code(run.start(mode)) == 0, run.said()
    assert results(alone.workdir) == results(run.workdir)
