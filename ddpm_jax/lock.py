"""One run directory, one training.

Where the disk knows flock(2) the kernel holds the lock, and lets go of it however the process ends.
Elsewhere, in gs:// and on some network disks, the lock is a file that its holder renews: one that
is not renewed for a while belongs to nobody.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError

NAME = "lock"  # Its file, in the run directory.
RENEW_SECONDS = 10.0  # Between two renewals.
PATIENCE_SECONDS = 25.0  # Without a renewal, after which a lock is taken over.
POLL_SECONDS = 1.0
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LostError(RuntimeError):
    """The run directory is gone or another training's: this one must not write to it any more."""


class Lock:
    """What `hold` gives."""

    def check(self, absent_ok: bool = False) -> None:
        """Before anything is written that counts.

        Args:
          absent_ok: whether a directory that is not there may be made again, or come back.
        Raises:
          LostError: the lock is lost, or the directory is not there.
        """
        self._look()
        if self.lost:
            raise LostError("another training has taken the run directory; this one ends")
        if self.absent and not absent_ok:
            raise LostError("the run directory is gone; this training ends")

    def _look(self) -> None:
        """Finds out about `lost` where it is not known."""

    @property
    def lost(self) -> bool:
        """Whether another process has the directory now: this one must write no more."""
        raise NotImplementedError

    @property
    def absent(self) -> bool:
        """Whether the lock's file is known to be gone, with the directory perhaps."""
        return False

    def release(self) -> None:
        """Lets others have the directory."""
        raise NotImplementedError


@contextlib.contextmanager
def hold(
    directory: epath.Path,
    say: Callable[[str], None],
    *,
    renew_seconds: float = RENEW_SECONDS,
    patience: float = PATIENCE_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Lock]:
    """Keeps a run directory, which need not exist, from other trainings meanwhile.

    Args:
      directory: local or gs://.
      say: prints a line.
      renew_seconds: between renewals, where the kernel does not hold the lock.
      patience: seconds without a renewal, after which another's lock is taken over.
      pause: waits so many seconds.
    Raises:
      RequestError: another process has it, or the lock cannot be written.
    """
    try:
        lock = _take(directory, say, renew_seconds, patience, pause)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"{directory} cannot be written: {reason}") from error
    try:
        yield lock
    finally:
        lock.release()


def _take(
    directory: epath.Path,
    say: Callable[[str], None],
    renew_seconds: float,
    patience: float,
    pause: Callable[[float], None],
) -> Lock:
    if not files.is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            return KernelLock(directory)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
    lock = RenewedLock(directory, say, patience, pause)
    lock.keep_renewing(renew_seconds)
    return lock


class KernelLock(Lock):
    """By flock(2) on `<directory>/lock`, which stays there."""

    def __init__(self, directory: epath.Path):
        """Takes it.

        Raises:
          RequestError: another process has it.
          OSError: the file cannot be written, or the disk has no locks (`NO_FLOCK`).
        """
        self._path = directory / NAME
        # No program that is started from here inherits it (O_CLOEXEC is Python's default).
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_this_process()).encode() + b"\n", 0)
        except BlockingIOError:
            holder = _parsed(os.pread(self._descriptor, 2**16, 0))
            os.close(self._descriptor)
            raise _taken(directory, holder) from None
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def lost(self) -> bool:
        """Whether the file is another one: somebody removed the directory and began again."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:  # No file is no other training.
            return False

    @property
    def absent(self) -> bool:
        """See `Lock`."""
        return not self._path.exists()

    def release(self) -> None:
        """See `Lock`."""
        os.close(self._descriptor)


class RenewedLock(Lock):
    """By a token in `<directory>/lock` that is written again and again."""

    def __init__(
        self,
        directory: epath.Path,
        say: Callable[[str], None],
        patience: float = PATIENCE_SECONDS,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Takes it when nobody has it, or nobody has renewed it for `patience` seconds.

        Raises:
          RequestError: another process has it.
          OSError: it cannot be read or written.
        """
        self._path = directory / NAME
        self._content = {**_this_process(), "token": uuid.uuid4().hex, "renewals": 0}
        self._lost, self._ended = False, threading.Event()
        self._clock, self._patience, self._renewed = clock, patience, clock()
        self._thread: threading.Thread | None = None
        self._wait_for_others(directory, say, patience, pause)
        files.replace(self._path, json.dumps(self._content))
        pause(POLL_SECONDS)  # Of two that come at the same time the later one stays.
        if not self._is_ours(now := self._read()):
            raise _taken(directory, now or {})

    def _wait_for_others(
        self,
        directory: epath.Path,
        say: Callable[[str], None],
        patience: float,
        pause: Callable[[float], None],
    ) -> None:
        before, waited = self._read(), 0.0
        if before is None:
            return
        say(f"{directory} is locked by {_name(before)}; is it alive? (up to {patience:g} s)")
        while waited < patience:
            pause(POLL_SECONDS)
            waited += POLL_SECONDS
            now = self._read()
            if now is None:
                return
            if now != before:
                raise _taken(directory, now)
        say(f"{directory}: the lock was not renewed for {patience:g} s and is taken over")

    def keep_renewing(self, every: float) -> None:
        """Renews it in the background until it is released or lost."""

        def run() -> None:
            while not self.lost and not self._ended.wait(every):
                with contextlib.suppress(OSError):  # The next time, or it is lost.
                    self.renew()

        self._thread = threading.Thread(target=run, name="lock", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Shows that this process is alive, unless another one has the directory.

        Raises:
          OSError: the file cannot be read or written.
        """
        now = self._read()
        if now is not None and not self._is_ours(now):
            self._lost = True
            return
        self._content["renewals"] += 1
        files.replace(self._path, json.dumps(self._content))
        self._renewed = self._clock()

    def _look(self) -> None:
        """After an outage, or a sleep, another one may have it: reads, before that one is hurt."""
        if self._clock() - self._renewed > self._patience / 2:
            with contextlib.suppress(OSError):  # Nothing else can be written then, either.
                self.renew()

    @property
    def lost(self) -> bool:
        """See `Lock`; as of the last renewal."""
        return self._lost

    def release(self) -> None:
        """See `Lock`; removes the file, so that the next one need not wait."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(POLL_SECONDS)
        with contextlib.suppress(OSError):
            if self._is_ours(self._read()):
                files.answer(self._path, lambda: self._path.unlink(missing_ok=True))

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where there is none, or an empty one: flock was tried there."""
        try:
            data = files.answer(self._path, self._path.read_bytes)
        except FileNotFoundError:
            return None
        return _parsed(data) if data else None

    def _is_ours(self, content: dict[str, Any] | None) -> bool:
        return content is not None and content.get("token") == self._content["token"]


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _parsed(data: bytes) -> dict[str, Any]:
    """A lock's content; {} where it is damaged."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "started"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on host {holder['host']} since {holder['started']}"


def _taken(directory: epath.Path, holder: dict[str, Any]) -> RequestError:
    return RequestError(
        f"{directory} is being trained by {_name(holder)}; wait for it, stop it, or choose another "
        "--workdir"
    )
