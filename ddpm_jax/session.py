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
GRACE_SECONDS = 3.0  # For others to say or hear what happened, before a process ends.
AGREE_SECONDS = 300.0
# What errors of collectives say when another process has gone.
LOST = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "ABORTED")
AGAIN = 75  # EX_TEMPFAIL: the same command goes on.


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
        beat_seconds: float = BEAT_SECONDS,
        end: Callable[[int], None] = os._exit,
    ):
        """Joins the others.

        Args:
          client: of JAX's coordination service.
          index, count: of this process, and how many there are.
          host_seconds: how long a process may be silent before the others end.
          beat_seconds: how often it tells that it lives.
          end: ends the process with a code, from any thread.
        """
        self.doing: Callable[[], str] = lambda: "starting"
        self.waited: Callable[[], float] = lambda: 0.0
        self.index, self.count = index, count
        self._client, self._host_seconds = client, host_seconds
        self._beat_seconds, self._end_process = beat_seconds, end
        self._names: dict[int, str] = {}
        self._gathered = itertools.count()
        self._questions, self._stop_at = 0, None
        self._stopping = threading.Lock()  # Held while it is being agreed where to stop.
        self._announced, self._stop_agreed = False, False
        self._closed, self._hurry = threading.Event(), threading.Event()
        now = time.monotonic()
        self._reached = now
        self._heard = {k: (None, now) for k in range(count) if k != index}
        self._set("name", f"{socket.gethostname()}")
        self._start(self._live)
        self._start(self._guard)

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=f"session {work.__name__}", daemon=True)
        thread.start()
        return thread

    # Agreement.

    def gather(self, what: str, value: Any, seconds: float = AGREE_SECONDS) -> list[Any]:
        """The JAX-free, JSON-able values of all processes, by index.

        Every process must call it equally often.

        Args:
          what: is done, for the message.
          seconds: how long to wait for the others.
        Raises:
          RequestError: names those that did not come.
        """
        key = f"gather/{next(self._gathered)}"
        self._set(key, json.dumps(value))
        try:
            self._client.wait_at_barrier(f"{ROOT}/{key}", round(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            there = self._all(key)
            missing = [self.name(k) for k in range(self.count) if k not in there]
            who = ", ".join(missing) or str(error).splitlines()[0]
            raise RequestError(
                f"{what}: not all hosts have come within {seconds:g} s: {who}"
            ) from None
        there = self._all(key)
        return [json.loads(there[k]) for k in range(self.count)]

    # Stopping.

    def asked(self, requested: bool) -> bool:
        """Whether to stop now: at the same question in every process.

        Args:
          requested: whether this process was asked to.
        """
        if requested and not self._announced:
            self._announced = True  # In the thread: process 0 may not answer.
            self._hurry.set()
        with self._stopping:
            self._questions += 1
            return self._stop_at is not None and self._questions >= self._stop_at

    def _agree_to_stop(self) -> None:
        """Finds the first question that no process has answered yet."""
        with self._stopping, contextlib.suppress(jax.errors.JaxRuntimeError):
            # Nobody asks on meanwhile. Whoever does not come falls silent, or has failed.
            self._set("stop_at", str(self._questions))
            self._client.wait_at_barrier(f"{ROOT}/stop", round(2 * self._host_seconds * 1000))
            self._stop_at = 1 + max(map(int, self._all("stop_at").values()))

    # Watching.

    def name(self, index: int) -> str:
        """What a process is called in messages."""
        if index not in self._names:
            try:
                host = self._client.key_value_try_get(f"{ROOT}/name/{index}")
            except jax.errors.JaxRuntimeError:
                return f"process {index}"
            self._names[index] = f"process {index} on {host}"
        return self._names[index]

    def waits(self) -> dict[int, float]:
        """How many seconds each process has waited for its images, as last heard of."""
        beats = {k: json.loads(beat) for k, (beat, _) in self._heard.items() if beat}
        return {self.index: self.waited(), **{k: beat[2] for k, beat in beats.items()}}

    def _live(self) -> None:
        """Tells the others each second that this process lives, and hears of them."""
        failed_since = None
        for beat in itertools.count():
            if self._closed.is_set():
                return
            try:
                self._set("beat", json.dumps([beat, self.doing(), self.waited()]))
                beats, failed = self._all("beat"), self._all("failed")
                ended = self._all("ended")
                if self._announced:
                    self._set("stop", "")
                if not self._stop_agreed and self._all("stop"):
                    self._stop_agreed = True
                    self._start(self._agree_to_stop)
            except jax.errors.JaxRuntimeError:  # The guard counts.
                self._closed.wait(self._beat_seconds)
                continue
            self._reached = time.monotonic()
            for k, (last, _) in self._heard.items():
                if k in ended or beats.get(k) != last:
                    self._heard[k] = beats.get(k), self._reached
            failed.pop(self.index, None)
            failed_since = failed and (failed_since or self._reached)
            if failed and self._reached - failed_since > GRACE_SECONDS:
                index, told = min(failed.items())
                code, message = json.loads(told)
                self._end(code, f"{self.name(index)} has stopped: {message}")
            self._hurry.wait(self._beat_seconds)
            self._hurry.clear()

    def _guard(self) -> None:
        """Ends this process when another has been silent for too long."""
        while not self._closed.wait(self._beat_seconds):
            now, silent = time.monotonic(), self._silent()
            if now - self._reached > self._host_seconds:  # Nobody could be heard of.
                silent = [0]
            if silent and silent != [self.index]:
                who = " and ".join(self._last_words(k) for k in silent[:3])
                since = f"not been heard of for {self._host_seconds:g} s"
                have = "has" if len(silent) == 1 else "have"
                self._end(AGAIN, f"{who} {have} {since}; the same command goes on")

    def _silent(self) -> list[int]:
        """Who has not been heard of for too long."""
        now = time.monotonic()
        return [k for k, (_, at) in self._heard.items() if now - at > self._host_seconds]

    def _last_words(self, index: int) -> str:
        beat = self._heard.get(index, (None, 0.0))[0]
        return self.name(index) + (f" (last {json.loads(beat)[1]})" if beat else "")

    # Ending.

    def await_verdict(self, error: Exception) -> None:
        """After an error that another process's end may have caused: waits until it is named.

        Then the watching thread ends this process. Returns where the error is this one's own, or
        nobody else has fallen silent.
        """
        if not any(word in str(error) for word in LOST):
            return
        line = str(error).splitlines()[0][:200]
        print(f"{line}: waiting to hear which host is gone", file=sys.stderr, flush=True)
        time.sleep(self._host_seconds + 2 * GRACE_SECONDS)

    def close(self) -> None:
        """Leaves in good order, together with the others or without them.

        JAX gives its own good-bye a minute, and process 0 may have more to write than the others.
        """
        with contextlib.suppress(RequestError, jax.errors.JaxRuntimeError):
            self.gather("ending", None)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set("ended", "")
        self._closed.set()

    def leave(self, code: int, message: str) -> None:
        """Ends this process at once, and with it the others, whose message names this one."""

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._set("failed", json.dumps([code, message]))

        self._start(tell).join(GRACE_SECONDS)  # Process 0 may not answer.
        self._closed.set()
        self._exit(code)

    def _end(self, code: int, message: str) -> None:
        """Ends this process from one of its threads, whatever the others are waiting for."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        others = set(self._heard) - set(self._silent())
        if self.index == 0 and others:  # With it the store ends, which they still read.
            time.sleep(GRACE_SECONDS + 2 * self._beat_seconds)
        self._end_process(code)

    # The store.

    def _set(self, what: str, value: str) -> None:
        self._client.key_value_set(f"{ROOT}/{what}/{self.index}", value, allow_overwrite=True)

    def _all(self, what: str) -> dict[int, str]:
        """The values that processes have set, by index."""
        pairs = self._client.key_value_dir_get(f"{ROOT}/{what}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in pairs}


@dataclasses.dataclass
class _Current:
    session: Session | None = None


_CURRENT = _Current()  # As JAX's own distributed runtime, it belongs to the process.


def begin(client: Any, index: int, count: int, host_seconds: float) -> Session:
    """Begins the session of this process, of which there is one at most."""
    _CURRENT.session = Session(client, index, count, host_seconds)
    return _CURRENT.session


def current() -> Session | None:
    """The session; None on a single process, and where JAX was joined without one."""
    return _CURRENT.session


def gather(what: str, value: Any, seconds: float = AGREE_SECONDS) -> list[Any]:
    """The values of all processes, see `Session.gather`."""
    session = current()
    return [value] if session is None else session.gather(what, value, seconds)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that the facts are the same in all processes.

    Args:
      what: the hosts are to agree on, in words.
      facts: JSON-able values by name.
    Raises:
      RequestError: names the process and the first differences.
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
