"""kill -9 at random moments: the same command goes on, and nothing is lost.

Moments are drawn from all of a life: starting and compiling, steps and saves (which take most of
it), and what comes after the last checkpoint. How long each takes is measured on the run that is
left alone.
"""

import os
import signal
import time

import numpy as np
import pytest
from mortal import BEGAN, Run, assert_nothing_lost

STEPS = 14
SETTINGS = {
    "train__steps": STEPS,
    "train__checkpoint_every": 1,
    "train__log_every": 3,
    "train__max_restarts": 0,  # Chance kills at the same place often enough.
}


def pytest_generate_tests(metafunc):
    if "plan" in metafunc.fixturenames:
        long = [f"{seed}: {'own' if seed % 4 == 0 else 'shared'} cache" for seed in range(15)]
        short = ["0: shared cache"]
        metafunc.parametrize("plan", long if metafunc.config.getoption("--long") else short)


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory):
    """A run that is left alone, and how long its parts took."""
    run = Run(nursery, tmp_path_factory.mktemp("unbroken"), SETTINGS)
    first, last = marks = [("checkpoint", step) for step in (1, STEPS)]
    seconds = run.timed(run.start(), marks)
    run.cold_seconds = seconds[first]
    run.save_seconds = (seconds[last] - seconds[first]) / (STEPS - 1)
    run.end_seconds = seconds["end"] - seconds[last]
    (life,) = run.lives()
    run.warm_seconds = 2 * life.seconds["start"]  # Compiled programs are read, then.
    return run


def moments(rng, kills, unbroken, cold):
    """Of each life the checkpoints it makes before, and the longest delay after that."""
    start_seconds = unbroken.cold_seconds if cold else unbroken.warm_seconds
    some = [(0, start_seconds)] * (kills // 3)
    some += [(int(rng.integers(1, 3)), unbroken.save_seconds) for _ in range(kills - len(some) - 1)]
    rng.shuffle(some)
    return [*some, (STEPS, unbroken.end_seconds)]


def where(run, newest_before, unfinished_before):
    """What a life was doing when it was killed, as far as its files tell."""
    if run.unfinished() - unfinished_before:
        return "while saving"
    if run.newest() == STEPS:
        return "after the last checkpoint"
    return "while starting" if run.newest() == newest_before else "between saves"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    nursery,
    unbroken,
    tmp_path,
    tally,
    request,
    plan,
):
    seed, whose = plan.split(": ")
    rng = np.random.default_rng(int(seed))
    kills = 8 if request.config.getoption("--long") else 4
    # With an empty cache the first lives are killed while they compile, or write what they have.
    cache = tmp_path / "cache" if whose == "own cache" else None
    run = Run(nursery, tmp_path, SETTINGS, cache)
    for made, delay in moments(rng, kills, unbroken, cache is not None):
        newest, unfinished = run.newest(), run.unfinished()
        pid = run.start()
        if run.await_mark(pid, ("checkpoint", min(newest + made, STEPS)) if made else BEGAN):
            time.sleep(rng.uniform(0, delay))
        if nursery.ended(pid) is None:
            os.kill(pid, signal.SIGKILL)
        if run.code(pid) == 0:  # Too late.
            break
        assert run.code(pid) == -signal.SIGKILL
        said, found = run.said(), where(run, newest, unfinished)
        tally("kills")
        tally(f"kills {found}")
        print(f"{found}: {newest} to {run.newest()} {said.splitlines()[-1:]}")
        assert "Traceback" not in said, said
        if "going on from" in said:
            assert f"going on from step {newest}\n" in said, said
    newest = run.newest()
    assert run.code(run.start()) == 0, run.said()
    assert f"going on from step {newest}\n" in run.said() or newest == 0
    assert_nothing_lost(run, unbroken)
