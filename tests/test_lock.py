"""One run directory, one training."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
from etils import epath
from runs_for_tests import ROOT

from ddpm_jax import files, lock
from ddpm_jax.config import RequestError

HOLD = """
import sys
from etils import epath
from ddpm_jax import lock
with lock.hold(epath.Path(sys.argv[1]), print):
    print("held", flush=True)
    input()
"""


def holder(directory):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_training_is_refused_until_the_first_ends_however(tmp_path):
    run = epath.Path(tmp_path) / "not yet there" / "rün [1]"
    first = holder(run)
    text = rf"{first.pid} on host .* since 2.*\+00:00; wait for it, stop it, or choose another"
    with pytest.raises(RequestError, match=text), lock.hold(run, print):
        pass
    first.kill()
    first.wait()
    with lock.hold(run, pytest.fail) as held:  # At once, without a word.
        assert not held.lost
        with pytest.raises(RequestError, match=str(os.getpid())), lock.hold(run, print):
            pass
    with lock.hold(run, pytest.fail):
        content = json.loads((run / "lock").read_text())
    assert content["pid"] == os.getpid() and sys.orig_argv[-1] in content["command"]


def test_programs_started_meanwhile_do_not_inherit_it(tmp_path):
    with lock.hold(epath.Path(tmp_path), print):
        child = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,
        )
        assert child.stdout.readline()  # It runs: the kernel has closed what it does not inherit.
    with lock.hold(epath.Path(tmp_path), print):
        pass
    child.communicate(b"\n")


def test_a_directory_that_was_begun_again_is_lost(tmp_path):
    run = epath.Path(tmp_path) / "run"
    with lock.hold(run, print) as first:
        shutil.rmtree(run)
        assert not first.lost
        with lock.hold(run, print) as second:
            assert first.lost and not second.lost


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    run = epath.Path(tmp_path) / "file" / "run"
    with pytest.raises(RequestError, match="cannot be written"), lock.hold(run, print):
        pass


def renewed(directory, said=None, pause=lambda seconds: None):
    """A lock that is renewed by hand, taken without waiting in fact."""
    say = pytest.fail if said is None else said.append
    return lock.RenewedLock(epath.Path(directory), say, 25, pause)


def test_one_that_is_renewed_is_refused_at_its_first_renewal(tmp_path):
    first, said, waited = renewed(tmp_path), [], []

    def pause(seconds):
        waited.append(seconds)
        if sum(waited) == 10:
            first.renew()

    with pytest.raises(RequestError, match=rf"process {os.getpid()} on host .*choose another"):
        renewed(tmp_path, said, pause)
    assert sum(waited) == 10 and len(said) == 1 and "is it alive" in said[0]
    first.renew()
    assert not first.lost
    first.release()
    renewed(tmp_path)  # Nothing to wait for.


def test_one_that_is_not_renewed_is_taken_over_and_its_holder_learns_of_it(tmp_path):
    first, said, waited = renewed(tmp_path), [], []
    second = renewed(tmp_path, said, waited.append)
    assert lock.PATIENCE_SECONDS == 25 and sum(waited[:-1]) == 25 > 2 * lock.RENEW_SECONDS
    assert str(os.getpid()) in said[0] and "taken over" in said[1]
    assert not first.lost  # It has not looked yet.
    before = (tmp_path / "lock").read_bytes()
    first.renew()
    assert first.lost and (tmp_path / "lock").read_bytes() == before
    first.release()
    second.renew()
    assert not second.lost
    second.release()
    assert not (tmp_path / "lock").exists()


def test_of_two_that_come_at_the_same_time_one_stays(tmp_path):
    """Each sees no lock; the later one's token is there when the earlier one looks again."""
    late = []

    def meanwhile(seconds):
        if not late:
            late.append(None)
            (tmp_path / "lock").unlink()
            late.append(renewed(tmp_path))

    with pytest.raises(RequestError, match="is being trained"):
        renewed(tmp_path, pause=meanwhile)
    late[1].renew()
    assert not late[1].lost


def test_one_released_while_another_waits_is_free(tmp_path):
    first, said = renewed(tmp_path), []
    second = renewed(tmp_path, said, lambda seconds: first.release())
    assert len(said) == 1
    second.renew()
    assert not second.lost


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"pid": 3}'])
def test_damaged_locks_are_watched_like_others(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    said = []
    renewed(tmp_path, said)
    assert "another process" in said[0] and "taken over" in said[1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_gets_a_renewed_one(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    renewals = []
    monkeypatch.setattr(
        lock.RenewedLock, "keep_renewing", lambda self, every: renewals.append(every)
    )
    with lock.hold(epath.Path(tmp_path), pytest.fail, pause=lambda seconds: None) as held:
        assert isinstance(held, lock.RenewedLock) and renewals == [lock.RENEW_SECONDS]
        assert json.loads((tmp_path / "lock").read_text())["token"]


def test_it_is_renewed_in_the_background_until_it_is_lost(tmp_path):
    held = renewed(tmp_path)
    held.keep_renewing(0.001)
    while json.loads((tmp_path / "lock").read_text())["renewals"] < 3:
        assert held._thread.is_alive()
    for _ in range(10_000):  # It may be about to write, having read its own.
        files.replace(epath.Path(tmp_path) / "lock", '{"token": "other"}')
        if not held._thread.is_alive():
            break
    assert held.lost and not held._thread.is_alive()
    held.release()
    assert (tmp_path / "lock").exists()
