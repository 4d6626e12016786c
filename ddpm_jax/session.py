"""The processes of a run on several hosts: they agree, stop together, and notice who is gone.

All of it goes through the key-value store of JAX's coordination service, whose waits have time
limits and can be heard while a device or a disk is being waited for; collectives can do neither.
On one process there is no session, and every function here answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ddpm_jax.config import RequestError

ROOT = "ddpm_jax"
BEAT_SECONDS = 1.0
BEAT_HOSTS = 32  # With more of them each tells less often: process 0 answers all.
GRACE_SECONDS = 3.0  # For others to say or hear what happened, before a process ends.
ASLEEP_SECONDS = 10.0  # A thread that wakes so late: the whole process was stopped.
AGREE_SECONDS = 300.0
# What JAX's errors say when another process has gone.
LOST = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "ABORTED")
AGAIN = 75  # EX_TEMPFAIL: the same command goes on.


def beat(count: int) -> float:
    """Seconds after which each of so many processes tells again that it lives."""
    return BEAT_SECONDS * max(1.0, count / BEAT_HOSTS)


class AbsentError(RuntimeError):
    """Not all processes have come in time; they may the next time."""


@dataclasses.dataclass
class Status:
    """What a process tells the others.

    Attributes:
      beat: another number each time.
      doing: in words.
      waited: seconds, for its images.
      pace: of its last steps, seconds, see `training.pace`; [] before there were any.
      stop: whether it was asked to stop.
      failed: its exit code and why, where it ends itself; [] elsewhere.
      ended: whether it has left in good order.
    """

    beat: int = -1
    doing: str = ""
    waited: float = 0.0
    pace: list[float] = dataclasses.field(default_factory=list)
    stop: bool = False
    failed: list[Any] = dataclasses.field(default_factory=list)
    ended: bool = False


class Session:
    """This process among the others of its run. One thread tells them that it lives.

    Attributes:
      doing: what the process does, in words, for others to name if it falls silent.
      waited: how many seconds it has waited for its images.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        host_seconds: float,
        agree_seconds: float = AGREE_SECONDS,
        beat_seconds: float | None = None,
        end: Callable[[int], None] = os._exit,
    ):
        """Joins the others.

        Args:
          client: of JAX's coordination service.
          index, count: of this process, and how many there are.
          host_seconds: how long a process may be silent before the others end.
          agree_seconds: how long the others are waited for where all have to come.
          beat_seconds: how often it tells that it lives, unless as `beat` says.
          end: ends the process with a code, from any thread.
        """
        self.doing: Callable[[], str] = lambda: "starting"
        self.waited: Callable[[], float] = lambda: 0.0
        self.index, self.count = index, count
        self._client, self._host_seconds, self._agree_seconds = client, host_seconds, agree_seconds
        self._beat_seconds = beat(count) if beat_seconds is None else beat_seconds
        self._end_process = end
        self._names = {k: f"process {k}" for k in range(count)}
        self._gathered = itertools.count()
        self._questions, self._stop_at = 0, None
        self._stopping = threading.Lock()  # Held while it is being agreed where to stop.
        self._telling = threading.Lock()
        self._own = Status()
        self._closed, self._hurry = threading.Event(), threading.Event()
        now = time.monotonic()
        self._reached = now
        self._heard = {k: (Status(), now) for k in range(count) if k != index}
        self._threads = [self._start(self._live), self._start(self._guard)]

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=f"session {work.__name__}", daemon=True)
        thread.start()
        return thread

    # Agreement.

    def introduce(self) -> None:
        """Tells the others this host's name, and hears theirs; every process must come."""
        for k, host in enumerate(self.gather("coming together", socket.gethostname())):
            self._names[k] = f"process {k} on {host}"

    def name(self, index: int) -> str:
        """What a process is called in messages."""
        return self._names[index]

    def gather(self, what: str, value: Any, seconds: float | None = None) -> list[Any]:
        """The JSON-able values of all processes, by index.

        Every process must call it equally often, for the same purposes.

        Args:
          what: is done, in words.
          seconds: how long to wait for the others.
        Raises:
          AbsentError: names those that did not come.
          RequestError: names one that came for another purpose.
        """
        key = f"gather/{next(self._gathered)}"
        limit = self._agree_seconds if seconds is None else seconds
        self._set(key, json.dumps([what, value]))
        try:
            self._client.wait_at_barrier(f"{ROOT}/{key}", round(limit * 1000))
        except jax.errors.JaxRuntimeError as error:
            there = self._all(key)
            missing = [self.name(k) for k in range(self.count) if k not in there]
            who = ", ".join(missing) or str(error).splitlines()[0]
            raise AbsentError(
                f"{what}: not all hosts have come within {limit:g} s: {who}; the same command "
                "goes on, with a larger --startup_seconds if need be"
            ) from None
        there = {k: json.loads(text) for k, text in self._all(key).items()}
        for k, (theirs, _) in sorted(there.items()):
            if theirs != there[0][0]:
                raise RequestError(
                    f"the hosts were not started alike: {theirs!r} on {self.name(k)}, "
                    f"{there[0][0]!r} on {self.name(0)}"
                )
        return [there[k][1] for k in range(self.count)]

    # Stopping.

    def asked(self, requested: bool) -> bool:
        """Whether to stop now: at the same question in every process.

        Args:
          requested: whether this process was asked to.
        """
        if requested and not self._own.stop:
            self._own.stop = True  # The thread tells it: process 0 may not answer.
            self._hurry.set()
        with self._stopping:
            self._questions += 1
            return self._stop_at is not None and self._questions >= self._stop_at

    def _agree_to_stop(self) -> None:
        """Finds the first question that no process has answered yet."""
        with self._stopping:  # Nobody asks on meanwhile.
            try:
                self._set("stop_at", str(self._questions))
                self._client.wait_at_barrier(f"{ROOT}/stop", round(self._host_seconds * 1000))
                self._stop_at = 1 + max(map(int, self._all("stop_at").values()))
            except jax.errors.JaxRuntimeError as error:  # Some may go on: nobody can.
                reason = str(error).splitlines()[0]
                self._end(AGAIN, f"the hosts could not agree where to stop: {reason}")

    # Watching.

    def waits(self) -> dict[int, float]:
        """How many seconds each process has waited for its images, as last heard of."""
        heard = {k: status.waited for k, (status, _) in self._heard.items()}
        return {self.index: self.waited(), **heard}

    def paces(self, own: list[float]) -> dict[int, list[float]]:
        """How long the steps of each process took, seconds, as last heard of.

        Args:
          own: those of this process, which the others are told.
        """
        self._own.pace = own
        heard = {k: status.pace for k, (status, _) in self._heard.items() if status.pace}
        return {self.index: own, **heard}

    def _tell(self) -> None:
        with self._telling:
            self._own.beat += 1
            self._own.doing, self._own.waited = self.doing(), self.waited()
            self._set("status", json.dumps(dataclasses.asdict(self._own)))

    def _live(self) -> None:
        """Tells the others each second that this process lives, and hears of them."""
        failed_since, agreeing = None, False
        while not self._closed.is_set():
            with contextlib.suppress(Exception):  # This thread must live; the guard counts.
                self._tell()
                of_all = {k: _status(text) for k, text in self._all("status").items()}
                self._reached = time.monotonic()
                failed = {}
                for k in self._heard:
                    status = of_all.get(k, Status())
                    if status.ended or status.beat != self._heard[k][0].beat:
                        self._heard[k] = status, self._reached
                    if status.failed:
                        failed[k] = status.failed
                if not agreeing and any(status.stop for status in of_all.values()):
                    agreeing = True
                    self._start(self._agree_to_stop)
                failed_since = (failed_since or self._reached) if failed else None
                if failed and self._reached - failed_since > GRACE_SECONDS:
                    index, (code, message) = min(failed.items())
                    self._end(code, f"{self.name(index)} has stopped: {message}")
            self._hurry.wait(self._beat_seconds)
            self._hurry.clear()

    def _guard(self) -> None:
        """Ends this process when another has been silent for too long."""
        looked = time.monotonic()
        while not self._closed.wait(min(self._beat_seconds, 1.0)):
            now = time.monotonic()
            if now - looked > ASLEEP_SECONDS:  # This one was stopped, not the others.
                self._reached = now
                self._heard = {k: (status, now) for k, (status, _) in self._heard.items()}
            looked, silent = now, self._silent()
            if now - self._reached > self._host_seconds:  # Nobody could be heard of.
                silent = [0]
            if silent and silent != [self.index]:
                who = " and ".join(self._last_words(k) for k in silent[:3])
                have = "has" if len(silent) == 1 else "have"
                since = f"not been heard of for {self._host_seconds:g} s"
                self._end(AGAIN, f"{who} {have} {since}; the same command goes on")

    def _silent(self) -> list[int]:
        """Who has not been heard of for too long."""
        now = time.monotonic()
        return [k for k, (_, at) in self._heard.items() if now - at > self._host_seconds]

    def _last_words(self, index: int) -> str:
        status = self._heard[index][0] if index in self._heard else Status()
        return self.name(index) + (f" (last {status.doing})" if status.doing else "")

    # Ending.

    def await_verdict(self, error: Exception) -> None:
        """After an error that another process's end may have caused: waits until it is named.

        Then the watching thread ends this process. Returns where the error is this one's own, or
        nobody else has fallen silent.
        """
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if not of_jax or not any(word in str(error) for word in LOST):
            return
        line = str(error).splitlines()[0][:200]
        print(f"{line}: waiting to hear which host is gone", file=sys.stderr, flush=True)
        time.sleep(self._host_seconds + 2 * GRACE_SECONDS)

    def close(self) -> None:
        """Leaves in good order, together with the others or without them.

        JAX gives its own good-bye a minute, and process 0 may have more to write than the others.
        """
        try:
            self.gather("ending", None)
        except (AbsentError, RequestError) as error:
            print(error, file=sys.stderr, flush=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._own.ended = True
            self._tell()
        self._closed.set()
        self._hurry.set()
        for thread in self._threads:  # One that is in JAX when Python ends takes it down.
            thread.join(GRACE_SECONDS)

    def leave(self, code: int, message: str) -> None:
        """Ends this process at once, and with it the others, whose message names this one."""

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._tell()

        self._own.failed = [code, message]
        self._start(tell).join(GRACE_SECONDS)  # Process 0 may not answer.
        self._closed.set()
        self._exit(code)

    def _end(self, code: int, message: str) -> None:
        """Ends this process from one of its threads, whatever the others are waiting for."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._closed.set()
        self._exit(code)

    def _exit(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        others = set(self._heard) - set(self._silent())
        if self.index == 0 and others:  # With it the store ends, which they still read.
            time.sleep(2 * GRACE_SECONDS + 2 * self._beat_seconds)
        self._end_process(code)

    # The store.

    def _set(self, what: str, value: str) -> None:
        self._client.key_value_set(f"{ROOT}/{what}/{self.index}", value, allow_overwrite=True)

    def _all(self, what: str) -> dict[int, str]:
        """The values that processes have set, by index."""
        pairs = self._client.key_value_dir_get(f"{ROOT}/{what}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in pairs}


def _status(text: str) -> Status:
    """What another process told, perhaps one of another version."""
    known = {field.name for field in dataclasses.fields(Status)}
    return Status(**{key: value for key, value in json.loads(text).items() if key in known})


@dataclasses.dataclass
class _Current:
    session: Session | None = None


_CURRENT = _Current()  # As JAX's own distributed runtime, it belongs to the process.


def begin(
    client: Any, index: int, count: int, host_seconds: float, agree_seconds: float
) -> Session:
    """Begins the session of this process, of which there is one at most; see `Session`.

    Raises:
      AbsentError: not all processes have come.
    """
    _CURRENT.session = Session(client, index, count, host_seconds, agree_seconds)
    _CURRENT.session.introduce()
    return _CURRENT.session


def current() -> Session | None:
    """The session; None on a single process, and where JAX was joined without one."""
    return _CURRENT.session


def gather(what: str, value: Any) -> list[Any]:
    """The values of all processes, see `Session.gather`."""
    session = current()
    return [value] if session is None else session.gather(what, value)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that the facts are the same in all processes.

    Args:
      what: the hosts are to agree on, in words.
      facts: JSON-able values by name.
    Raises:
      RequestError: names the process and the first differences.
      AbsentError: not all have come.
    """
    session = current()
    if session is None:
        return
    of_all = session.gather(what, dict(facts))
    for index, theirs in enumerate(of_all):
        differing = [
            f"{key} is {theirs.get(key)} on {session.name(index)}, {value} on {session.name(0)}"
            for key, value in of_all[0].items()
            if theirs.get(key) != value
        ]
        if differing:
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RequestError(f"the hosts differ in {what}: {'; '.join(differing[:3])}{more}")


def dump_stacks() -> None:
    """What every thread is at, on stderr."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
