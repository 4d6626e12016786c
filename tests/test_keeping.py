"""What a run keeps, where reading or writing it fails: said, tried again, set aside, never lost."""

import errno
import json
import os
import pathlib
import shutil
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import JsonCheckpointHandler
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from ddpm_jax import config as config_lib
from ddpm_jax import session
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import goodput, reading
from ddpm_jax.training.best import Best
from ddpm_jax.training.checkpoints import CheckpointError, Checkpoints
from ddpm_jax.training.keeping import Keeper

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax.

# Large enough to have a file of its own.
SIZE = 3000


def state(value):
    return {"w": value * jnp.arange(SIZE, dtype="float32") ** 1.1}


def abstract():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct((SIZE,), "float32", sharding=device)}


def contents(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and not p.is_symlink()}


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Those between two attempts to read, which here take no time."""
    pauses = []
    monkeypatch.setattr(reading, "time", types.SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def saved(tmp_path):
    """The directory of checkpoints 10 and 20."""
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (10, 20):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()
    return directory


# Checkpoints that cannot be read now.


class HttpError(Exception):
    """As gcsfs has one."""


def wrapped(error):
    """As Orbax does it."""
    try:
        raise Exception("Encountered error while reading array index") from error
    except Exception as outer:
        return outer


PASSING = {
    "disk": OSError(errno.EIO, "Input/output error"),
    "files": OSError(errno.EMFILE, "Too many open files"),
    "rights": PermissionError(errno.EACCES, "Permission denied"),
    "bucket": TimeoutError("no answer"),
    "http": HttpError("503"),
    "memory": MemoryError(),
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."),
    "threads": RuntimeError("can't start new thread"),
    "tensorstore": wrapped(ValueError("UNAVAILABLE: Error reading w/0: CURL error[6]")),
}


def failing(monkeypatch, method, error, times):
    """A method of Checkpoints raises an error the first `times` times; returns the calls."""
    original, calls = getattr(Checkpoints, method), []

    def read(self, *rest):
        calls.append(rest)
        if len(calls) <= times:
            raise error
        return original(self, *rest)

    monkeypatch.setattr(Checkpoints, method, read)
    return calls


@pytest.mark.parametrize("kind", PASSING)
def test_what_fails_to_be_read_for_a_while_is_read_again(saved, monkeypatch, caplog, pauses, kind):
    calls = failing(monkeypatch, "_read", PASSING[kind], 2)
    checkpoints, said = Checkpoints(saved, sweep=True), []
    found, step, notes = checkpoints.restore(abstract(), warn=said.append)
    checkpoints.close()
    assert (step, notes, said, len(calls)) == (20, {"step": 20}, [], 3)
    np.testing.assert_array_equal(found["w"], state(20)["w"])
    assert {path.name for path in saved.iterdir()} == {"10", "20"}
    assert pauses == [1.0, 2.0]
    ours = [record for record in caplog.records if record.name == reading.__name__]
    lines = [record.getMessage() for record in ours]
    assert [line.partition("; ")[2] for line in lines] == [
        f"reading it again, attempt {k} of 3" for k in (2, 3)
    ]
    assert str(saved / "20") in lines[0]


@pytest.mark.parametrize("kind", PASSING)
def test_what_cannot_be_read_is_no_damage_and_stays(saved, monkeypatch, kind):
    """Else the run would go on from 10, and 20 be set aside."""
    before = contents(saved)
    with monkeypatch.context() as patch:
        calls = failing(patch, "_read", PASSING[kind], 1000)
        checkpoints, said = Checkpoints(saved, sweep=True), []
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract(), warn=said.append)
        assert len(calls) == 3 and not said
        line = str(caught.value)
        assert "\n" not in line and line.startswith(f"{saved / '20'} cannot be read (")
        assert "tried 3 times; it need not be damaged and stays where it is" in line
    assert contents(saved) == before
    assert checkpoints.restore(abstract())[1] == 20
    checkpoints.close()


@pytest.mark.parametrize("name", ["meta/metadata", "state/manifest.ocdbt", "largest"])
def test_the_words_of_the_system_for_it_are_known(saved, name):
    """Of Python, and of TensorStore, where it opens a checkpoint and where it reads an array."""
    files = [path for path in (saved / "20").rglob("*") if path.is_file()]
    size = {path: path.stat().st_size for path in files}
    victim = max(size, key=size.get) if name == "largest" else saved / "20" / name
    content = victim.read_bytes()
    victim.unlink()
    victim.symlink_to(victim.name)  # Cannot be opened, and is there.
    checkpoints, said = Checkpoints(saved, sweep=True), []
    with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
        checkpoints.restore(abstract(), warn=said.append)
    victim.unlink()
    victim.write_bytes(content)
    assert checkpoints.restore(abstract(), warn=said.append)[1] == 20
    victim.unlink()  # This is damage.
    assert checkpoints.restore(abstract(), warn=said.append)[1] == 10
    checkpoints.close()
    assert len(said) == 1 and (saved / "20.damaged").is_dir()


class Hosts:
    """Two threads that are two hosts for `session.gather`."""

    def __init__(self, monkeypatch):
        self._barrier, self._values = threading.Barrier(2, timeout=60), {}
        self._host = threading.local()
        monkeypatch.setattr(session, "gather", self._gather)
        names = types.SimpleNamespace(name=lambda k: f"process {k}")
        monkeypatch.setattr(session, "current", lambda: names)

    def _gather(self, what, value):
        self._values[self._host.index] = what, value
        self._barrier.wait()
        (one, first), (other, second) = self._values[0], self._values[1]
        self._barrier.wait()
        assert one == other
        return [first, second]

    def run(self, *works):
        """What each returns or raises."""
        ends = {}

        def run(index, work):
            self._host.index = index
            try:
                ends[index] = work()
            except Exception as error:
                ends[index] = error

        threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [ends[0], ends[1]]


@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("other", ["whole", "damaged"])
def test_all_hosts_come_to_the_same_about_a_checkpoint(saved, monkeypatch, whose, other):
    """One cannot read it. Whatever is known of it by the other one, they end alike."""

    def reading_by(host):
        checkpoints = Checkpoints(saved)

        def read(step, abstract):
            if host == whose:
                raise PASSING["disk"]
            if other == "damaged":
                raise ValueError("the checksum is wrong")
            return {}, {"checksums": {}, "notes": {}}

        checkpoints._read = read
        return checkpoints

    both = [reading_by(0), reading_by(1)]
    ends = Hosts(monkeypatch).run(*[lambda c=c: c.attempt(20, abstract()) for c in both])
    for checkpoints in both:
        checkpoints.close()
    if other == "damaged":
        assert ends == [(None, f"process {1 - whose}: the checksum is wrong")] * 2
    else:
        assert all(isinstance(end, CheckpointError) for end in ends)
        assert [str(end).partition(" cannot")[0] for end in ends] == [
            f"process {whose}: {saved / '20'}"
        ] * 2


# Checkpoints after one that could not be written.


def test_what_goes_on_of_a_save_that_failed_is_not_the_next_ones(tmp_path, monkeypatch):
    """The disk is full for Orbax's metadata, and threads of the save hear of it later."""
    checkpoints = Checkpoints(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def full_later(*_):
        time.sleep(0.5)
        full()

    with monkeypatch.context() as patch:
        patch.setattr(orbax_metadata._MetadataStoreImpl, "write", full)
        patch.setattr(JsonCheckpointHandler, "_save_fn", full_later)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.save(10, state(1), {})
            checkpoints.wait()
        checkpoints._manager.check_for_errors()  # There are none.
    checkpoints.save(20, state(2), {})
    checkpoints.wait()
    assert checkpoints.steps() == [20]
    checkpoints.close()


def test_what_was_never_whole_is_removed_though_somebody_still_adds_to_it(tmp_path, monkeypatch):
    left = epath.Path(tmp_path / "5.orbax-checkpoint-tmp")
    left.mkdir()
    remove, tries = shutil.rmtree, []

    def busy(path, *rest, **more):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", busy)
    Checkpoints(tmp_path, sweep=True).close()
    assert not left.exists() and len(tries) == 3


# The best one.


def a_best(directory, *values):
    """One with a checkpoint at step 20, or at 20, 30, …, of these values; the newest counts."""
    best = Best(directory, "fid")
    for k, value in enumerate(values):
        best.save(20 + 10 * k, state(1), value, "p")
    best.wait()
    return best


@pytest.mark.parametrize("how", ["poll", "wait"])
def test_a_best_one_that_fails_is_said_without_the_other_hosts(tmp_path, monkeypatch, how):
    """They are training, or at their end: nobody would answer."""
    best = a_best(tmp_path, 5.0)
    best.save(30, state(1), 3.0, "p")
    best._checkpoints.wait()
    failure = CheckpointError("the disk is full")

    def fail():
        raise failure

    def talk(what, value):
        raise AssertionError(f"nobody answers to {what}")

    with monkeypatch.context() as patch:
        patch.setattr(best._checkpoints, how, fail)
        patch.setattr(session, "gather", talk)
        with pytest.raises(CheckpointError) as caught:
            getattr(best, how)()
    assert caught.value is failure
    assert best.beaten_by(4.0, "lower", "p") and not best.beaten_by(5.5, "lower", "p")
    best.close()


def test_one_that_was_set_aside_for_one_that_failed_is_no_rival(tmp_path, monkeypatch):
    best = a_best(tmp_path, 5.0)

    def fail(*_):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(best._checkpoints, "save", fail)
    with pytest.raises(CheckpointError):
        best.save(10, state(1), 3.0, "p")  # Of a life that went back.
    assert (tmp_path / "fid/20.beaten").is_dir()
    assert best.beaten_by(9.0, "lower", "p")
    best.close()


def flip(metadata):
    content = bytearray(metadata.read_bytes())
    content[len(content) // 2] ^= 1
    metadata.write_bytes(content)


@pytest.mark.parametrize("spoil", [flip, pathlib.Path.unlink, lambda path: path.write_text("{}")])
def test_a_damaged_best_one_is_said_and_kept(tmp_path, spoil):
    a_best(tmp_path, 5.0).close()
    spoil(tmp_path / "fid/20/meta/metadata")
    before, said = contents(tmp_path / "fid/20"), []
    best = Best(tmp_path, "fid", said.append)
    (line,) = said
    assert line.startswith("best checkpoint 20 of fid is damaged and set aside: ")
    assert best.beaten_by(9.0, "lower", "p")
    best.save(30, state(2), 9.0, "p")
    best.wait()
    best.close()
    assert {path.name for path in (tmp_path / "fid").iterdir()} == {"20.damaged", "30"}
    aside = tmp_path / "fid/20.damaged"
    assert contents(aside) == {
        aside / path.relative_to(tmp_path / "fid/20"): content for path, content in before.items()
    }


def test_behind_a_damaged_best_one_the_one_before_counts(tmp_path):
    """Both are there where a run was killed between a save and a deletion."""
    a_best(tmp_path, 5.0).close()
    (tmp_path / "fid/20").rename(tmp_path / "20")
    a_best(tmp_path, 8.0, 4.0).close()
    (tmp_path / "20").rename(tmp_path / "fid/20")
    flip(tmp_path / "fid/30/meta/metadata")
    best = Best(tmp_path, "fid", lambda line: None)
    assert not best.beaten_by(5.5, "lower", "p") and best.beaten_by(4.5, "lower", "p")
    assert {path.name for path in (tmp_path / "fid").iterdir()} == {"20", "30.damaged"}
    best.close()


def test_a_best_one_that_cannot_be_read_now_is_not_replaced(tmp_path, monkeypatch):
    a_best(tmp_path, 5.0).close()
    before, said = contents(tmp_path), []
    with monkeypatch.context() as patch:
        failing(patch, "_meta", PASSING["disk"], 1000)
        with pytest.raises(CheckpointError, match=r"fid/20 cannot be read .*, tried 3 times"):
            Best(tmp_path, "fid", said.append)
    failing(monkeypatch, "_meta", PASSING["disk"], 2)
    best = Best(tmp_path, "fid", said.append)
    assert not best.beaten_by(9.0, "lower", "p")
    best.close()
    assert contents(tmp_path) == before and not said


def a_keeper(directory, say=print, **train):
    settings = config_lib.default_config().train
    settings.update({"keep_best": "fid", **train})
    return Keeper(settings, RunDirectory(epath.Path(directory)), None, goodput.Clock(), say)


def test_a_run_says_that_its_best_one_is_damaged(tmp_path):
    a_best(tmp_path / "best", 5.0).close()
    flip(tmp_path / "best/fid/20/meta/metadata")
    said = []
    a_keeper(tmp_path, said.append).close()
    assert len(said) == 1 and "best checkpoint 20 of fid is damaged" in said[0]


def test_the_best_one_is_there_before_a_later_checkpoint(tmp_path, monkeypatch):
    """A run that is killed goes on behind it, and would not find it again."""
    keeper, making, found = a_keeper(tmp_path), os.mkdir, []

    def slowly(path, *rest, **more):
        if "best/fid/10.orbax-checkpoint-tmp" in str(path):
            time.sleep(0.3)
        making(path, *rest, **more)

    save = Checkpoints.save

    def saving(self, step, *rest):
        if self is keeper._checkpoints:
            found.append((step, (tmp_path / "best/fid/10").is_dir()))
        save(self, step, *rest)

    monkeypatch.setattr(os, "mkdir", slowly)
    monkeypatch.setattr(Checkpoints, "save", saving)
    keeper.save(10, state(1), {})
    keeper.save_best(10, state(1), 5.0, "p")
    keeper.save(20, state(2), {})
    keeper.finish()
    keeper.close()
    assert found == [(10, False), (20, True)]


def test_a_best_one_that_fails_ends_the_run_before_a_later_checkpoint(tmp_path, monkeypatch):
    """Or is said, where the run shall go on, and the checkpoint is saved."""
    for how, steps in (("stop", []), ("continue", [20])):
        said, where = [], tmp_path / how
        keeper = a_keeper(where, said.append, write_errors=how)

        def fail():
            raise CheckpointError("no space for the best one")

        monkeypatch.setattr(keeper._best, "wait", fail)
        try:
            keeper.save(20, state(2), {})
        except CheckpointError as error:
            said.append(str(error))
        keeper._checkpoints.wait()
        assert keeper._checkpoints.steps() == steps
        keeper.close()
        assert len(said) == 1 and said[0].startswith("no space for the best one")


# Where the time went.


def two_lives(path, clock):
    for _ in range(2):
        with goodput.Lives(path, clock, active=True) as lives:
            lives.begin(5)
    return json.loads(path.read_text())


LIFE = {"first": 0, "reached": 1, "seconds": {"step": 1.0}, "began": "", "ended": ""}
NO_LIVES = {
    "cut": '{"total": {}, "li',
    "no text": "\udcff",
    "a number": "3",
    "no lives": "{}",
    "a life without end": json.dumps({"lives": [{k: LIFE[k] for k in LIFE if k != "ended"}]}),
    "seconds of no phase": json.dumps({"lives": [LIFE | {"seconds": [1.0]}]}),
    "no numbers": json.dumps({"lives": [LIFE | {"seconds": {"step": "long"}}]}),
    "a step in words": json.dumps({"lives": [LIFE | {"first": "0"}]}),
    "no end": "[" * 100_000,
}


@pytest.mark.parametrize("content", NO_LIVES.values(), ids=NO_LIVES)
def test_a_damaged_account_of_the_time_is_said_and_kept(tmp_path, caplog, content):
    path, clock = epath.Path(tmp_path / "goodput.json"), goodput.Clock()
    assert len(two_lives(path, clock)["lives"]) == 2
    content = content.encode(errors="surrogateescape")
    path.write_bytes(content)
    assert goodput.read(path) == []  # Who only looks changes nothing,
    goodput.Lives(path, clock, active=False)  # nor do other hosts than the first.
    assert path.read_bytes() == content and not caplog.records
    assert len(two_lives(path, clock)["lives"]) == 2
    clock.close()
    assert {file.name for file in tmp_path.iterdir()} == {"goodput.json", "goodput.json.damaged"}
    assert (tmp_path / "goodput.json.damaged").read_bytes() == content
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"{path} is damaged (") and line.endswith("goodput.json.damaged")
    assert "\n" not in line and len(line) < 600


@pytest.mark.parametrize("active", [True, False])
def test_an_account_that_cannot_be_read_now_is_not_begun_anew(tmp_path, active):
    """The restarts that it counts would be forgotten."""
    path, clock = epath.Path(tmp_path / "goodput.json"), goodput.Clock()
    two_lives(path, clock)
    content = path.read_bytes()
    path.unlink()
    os.symlink("goodput.json", path)  # Cannot be opened, and is there.
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        goodput.Lives(path, clock, active)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        goodput.read(path)
    assert os.path.islink(path)
    os.unlink(path)
    assert goodput.read(path) == []  # There is none.
    path.write_bytes(content)
    lives = goodput.Lives(path, clock, active)
    lives.begin(5)
    assert len(goodput.read(path)) == 2
    clock.close()
