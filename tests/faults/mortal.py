"""A run that is trained by lives which end before their time, and the moments at which they do."""

import itertools
import pathlib
import time

from forked import PATIENCE
from runs_for_tests import arguments, assert_equal_states, final_state, lines

from ddpm_jax.training import goodput


class Run:
    """A run directory, and what each of its lives says: `folder`/life_NN.log."""

    def __init__(self, nursery, folder, settings, cache=None):
        """Not begun; `settings` are overrides of the small run's."""
        self.nursery, self.folder, self.settings, self.cache = nursery, folder, settings, cache
        self.workdir = pathlib.Path(folder) / "run, à bout"
        self.logs, self.mode = [], "train"

    def start(self, mode="train", flags=(), devices=1, **settings):
        """The process id of the next life."""
        self.mode = mode
        self.logs.append(pathlib.Path(self.folder) / f"life_{len(self.logs):02d}.log")
        argv = [*arguments(self.workdir, mode, **self.settings | settings), *flags]
        return self.nursery.start(argv, self.logs[-1], devices, self.cache)

    def code(self, pid):
        """The exit code of a life, when it has ended."""
        return self.nursery.exit_code(pid)

    def said(self, life=-1):
        """What a life has said, the last one unless told."""
        return self.logs[life].read_text(encoding="utf-8") if self.logs[life].exists() else ""

    def newest(self):
        """The step of the newest checkpoint that has its name; 0 without one."""
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return max([0, *(int(name) for name in names if name.isdigit())])

    def unfinished(self):
        """The directories of saves that have not ended, each with what tells it from others."""
        found = (self.workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")
        return {(path.name, path.stat().st_ino) for path in found}

    def await_checkpoint(self, pid, step):
        """Whether a life came to the checkpoint of a step before it ended; 0: it has, always."""
        deadline = time.monotonic() + PATIENCE
        while self.newest() < step:
            if self.nursery.ended(pid) is not None:
                return False
            assert time.monotonic() < deadline, (step, self.said())
            time.sleep(0.005)
        return True

    def timed(self, pid, steps=()):
        """Seconds from a life's beginning to its checkpoints of some steps, and to its end."""
        began, seconds = time.monotonic(), []
        for step in steps:
            assert self.await_checkpoint(pid, step), self.said()
            seconds.append(time.monotonic() - began)
        assert self.code(pid) == 0, self.said()
        return [*seconds, time.monotonic() - began]

    def lives(self):
        """What goodput.json tells of lives that came to their first step."""
        return [life for life in goodput.read(self.workdir / "goodput.json") if life.first >= 0]


def assert_nothing_lost(run, unbroken):
    """That a run is over and is, to the bit, what it would have been without any fault."""
    state, step = final_state(run.workdir)
    whole, last = final_state(unbroken.workdir)
    assert step == last
    assert_equal_states(whole, state)
    assert lines(run.workdir) == lines(unbroken.workdir)
    name = f"samples/step_{last:08d}.png"
    assert (run.workdir / name).read_bytes() == (unbroken.workdir / name).read_bytes()
    assert (run.workdir / "figures/training.png").exists()
    assert not run.unfinished()
    for life in range(len(run.logs)):
        said = run.said(life)
        assert "passed over" not in said and "damaged" not in said, said
    assert not list(run.workdir.rglob("*.damaged*"))
    # What a life had done since the checkpoint before its last is all that the next one redid.
    every, lives = run.settings["train__checkpoint_every"], run.lives()
    for life, following in itertools.pairwise(lives):
        assert life.reached - 2 * every < following.first <= life.reached + every, lives
