"""kill -9, SIGTERM and Ctrl-C at random moments: the same command goes on, and nothing is lost.

Moments are drawn from all of a life: starting and compiling, steps and saves (which take most of
it), evaluating, sampling, and what comes after the last checkpoint. How long each takes is measured
on a run that is left alone.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from mortal import Run, assert_nothing_lost

AGAIN = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SETTINGS = {
    "train__checkpoint_every": 1,
    "train__log_every": 3,
    "train__sample_every": 4,
    "train__max_restarts": 0,  # Chance stops at the same place often enough.
}
EVALUATED = 7
EVALUATING = {
    "train__evaluate_every": EVALUATED,
    "evaluation__metrics": "bits_per_dim",
    "evaluation__max_images": 64,
    "evaluation__batch_size": 8,
}
LONG = [f"{'evaluating' if i % 4 == 1 else 'training'}-{i}" for i in range(16)]


def pytest_generate_tests(metafunc):
    if "plan" in metafunc.fixturenames:
        long = metafunc.config.getoption("--long")
        metafunc.parametrize("plan", LONG if long else ["training-0"])


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a life, and when: a while after a checkpoint.

    Attributes:
      signals: one, or two in a row.
      checkpoints: how many the life makes before; -1: all that there will be.
      evaluating: whether after the one at which it evaluates, instead.
      longest: seconds from there, at most.
    """

    signals: tuple[int, ...]
    checkpoints: int
    longest: float
    evaluating: bool = False

    def after(self, newest, every, last):
        """The step of that checkpoint in a life that begins at `newest`; 0: its beginning."""
        if self.evaluating:
            return EVALUATED // every * every
        if self.checkpoints == 0:
            return 0
        return last if self.checkpoints < 0 else min(newest + self.checkpoints * every, last)


@pytest.fixture(scope="module")
def unbroken(request, nursery, tmp_path_factory):
    """Makes runs that are left alone, with how long their parts took."""
    steps = 24 if request.config.getoption("--long") else 16
    made = {}

    def make(what):
        if what not in made:
            settings = SETTINGS | (EVALUATING if what == "evaluating" else {})
            settings |= {"train__steps": steps}
            run = made[what] = Run(nursery, tmp_path_factory.mktemp(what), settings)
            some = 1, EVALUATED, EVALUATED + 1, steps
            first, evaluating, evaluated, last, end = run.timed(run.start(), some)
            run.cold_seconds, run.end_seconds = first, end - last
            run.save_seconds = (evaluating - first) / (EVALUATED - 1)
            run.evaluate_seconds = evaluated - evaluating
            (life,) = run.lives()
            run.warm_seconds = 2 * life.seconds["start"]  # Compiled programs are read, then.
        return made[what]

    return make


def drawn(rng, kills, stops, whole, cold, evaluating):
    """The faults of a run, in their order."""
    start_seconds = whole.cold_seconds if cold else whole.warm_seconds

    def somewhere(signals, place):
        if place == 0:
            return Fault(signals, 0, start_seconds)
        if place == 1 and evaluating:
            return Fault(signals, 0, whole.evaluate_seconds, True)
        return Fault(signals, int(rng.integers(1, 3)), whole.save_seconds)

    def some_signals(twice):
        return tuple(SIGNALS[k] for k in rng.integers(0, 2, 1 + twice))

    faults = [somewhere((signal.SIGKILL,), k % 3) for k in range(kills - 1)]
    faults += [somewhere(some_signals(k % 2), int(rng.integers(3))) for k in range(stops - 1)]
    rng.shuffle(faults)
    last = [(signal.SIGKILL,), some_signals(False)]
    rng.shuffle(last)
    # Which of the two comes last matters: the first may come too late.
    return [*faults, *(Fault(signals, -1, whole.end_seconds) for signals in last)]


def strike(run, pid, fault, rng):
    """Sends a life its signals; its exit code, and the seconds until it ended."""
    for number in fault.signals:
        if run.nursery.ended(pid) is None:
            os.kill(pid, number)
        if len(fault.signals) > 1:
            time.sleep(rng.uniform(0, 0.3))
    began = time.monotonic()
    return run.code(pid), time.monotonic() - began


def over(run, code):
    """Whether a life was at its end before the signal came, which Python then may die of."""
    done = {"train": "\ntime: ", "sample": "samples: ", "evaluate": "bits_per_dim_train: "}
    return code == 0 or (-code in SIGNALS and done[run.mode] in run.said())


def assert_stopped(run, code, seconds, before):
    """That a life which was asked to stop has done so as promised."""
    said = run.said()
    assert code == AGAIN, said
    stopped = re.search(r"^stopped at step (\d+); the same command goes on", said, re.MULTILINE)
    if stopped:  # In good order: all that was done is there.
        assert run.newest() == int(stopped[1]) >= before
        assert not run.unfinished()
    else:
        assert "stopped at once; the same command goes on" in said
        assert run.newest() >= before
        assert seconds < 20


def where(run, newest, unfinished, last):
    """What a life was doing when it was killed, as far as its files tell."""
    if run.unfinished() - unfinished:
        return "while saving"
    if run.newest() == last:
        return "after the last checkpoint"
    return "while starting" if run.newest() == newest else "between saves"


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_loses_nothing(
    nursery, unbroken, tmp_path, tally, request, plan
):
    kind, seed = plan.split("-")
    rng = np.random.default_rng(int(seed))
    whole, long = unbroken(kind), request.config.getoption("--long")
    last = whole.settings["train__steps"]
    # With an empty cache the first lives are stopped while they compile, or write what they have.
    cache = tmp_path / "cache" if long and int(seed) % 4 == 0 else None
    every = 1 + (int(seed) + 1) % 3
    run = Run(nursery, tmp_path, whole.settings | {"train__checkpoint_every": every}, cache)
    kills, stops = (8, 4) if long else (3, 1)
    for fault in drawn(rng, kills, stops, whole, cache is not None, kind == "evaluating"):
        newest, unfinished = run.newest(), run.unfinished()
        pid = run.start()
        if run.await_checkpoint(pid, fault.after(newest, every, last)):
            time.sleep(rng.uniform(0, fault.longest))
        code, seconds = strike(run, pid, fault, rng)
        said, killed = run.said(), fault.signals == (signal.SIGKILL,)
        found = where(run, newest, unfinished, last) if killed else f"ends with {code}"
        print(f"{fault}: {found}, {newest} to {run.newest()} {said.strip().splitlines()[-1:]}")
        # A second one may be raised where Python can do no more than tell of it.
        assert len(fault.signals) > 1 or "Traceback" not in said, said
        if "going on from" in said:
            assert f"going on from step {newest}\n" in said, said
        if over(run, code):
            break
        if killed:
            assert code == -signal.SIGKILL
            tally("kills")
            tally(f"kills {found}")
        else:
            assert_stopped(run, code, seconds, newest)
            tally("signals")
            tally(f"signals {'twice' if len(fault.signals) > 1 else 'once'}")
    newest = run.newest()
    assert run.code(run.start()) == 0, run.said()
    assert f"going on from step {newest}\n" in run.said() or newest == 0
    assert_nothing_lost(run, whole)


def results(workdir):
    """What the modes that use a run have found: bytes of images, and numbers by name."""
    images, numbers = {}, {}
    for path in (workdir / "samples").glob("*.npz"):
        with np.load(path) as file:
            images[path.name] = file["images"].tobytes()
    for path in (workdir / "evaluation").glob("*.json"):
        content = json.loads(path.read_text())
        numbers[path.name] = [content[key] for key in ("name", "value", "standard_error")]
    return images, numbers


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_what_uses_a_run_can_be_stopped_too(nursery, unbroken, tmp_path, tally, request, mode):
    if not request.config.getoption("--long"):
        pytest.skip("a part of the long form")
    rng = np.random.default_rng(len(mode))
    more = {"sample__count": 32, "sample__batch_size": 4, "evaluation__max_images": 256}
    whole = unbroken("evaluating")
    runs = [Run(nursery, tmp_path / name, whole.settings | more) for name in ("alone", "stopped")]
    for run in runs:
        run.folder.mkdir()
        shutil.copytree(whole.workdir, run.workdir)
    alone, run = runs
    (seconds,) = alone.timed(alone.start(mode))
    for k in range(10):
        pid = run.start(mode)
        time.sleep(rng.uniform(0, seconds))
        numbers = tuple(SIGNALS[i] for i in rng.integers(0, 2, 1 + k % 2))
        code, seconds_left = strike(run, pid, Fault(numbers, 0, 0), rng)
        said = run.said()
        print(f"{numbers}: {code} after {seconds_left:.1f} s {said.strip().splitlines()[-1:]}")
        assert len(numbers) > 1 or "Traceback" not in said, said
        if over(run, code):
            break
        assert code == AGAIN and "the same command goes on" in said, said
        tally("signals")
        tally(f"signals in --mode={mode}")
    assert run.code(run.start(mode)) == 0, run.said()
    assert results(alone.workdir) == results(run.workdir)
