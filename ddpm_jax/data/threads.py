"""Threads that may get stuck in a read: unless asked, nothing waits for them, nor does the exit.

The pools of `concurrent.futures` are joined when the process ends, which a read that never returns
would then prevent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any


def run_all(function: Callable[[Any], None], pieces: Iterable[Any], name: str) -> None:
    """Calls function(piece) for all pieces at once, each in a new thread of this name.

    Raises:
      Whatever the call of the first piece that failed raised, when those before it are done.
    """
    for future in [started(function, piece, name) for piece in pieces]:
        future.result()


def started(function: Callable[[Any], Any], argument: Any, name: str) -> Future:
    """The future result of function(argument), called in a new thread of this name."""
    future: Future = Future()
    threading.Thread(
        target=_carry_out, args=(future, function, argument), name=name, daemon=True
    ).start()
    return future


def _carry_out(future: Future, function: Callable[[Any], Any], argument: Any) -> None:
    try:
        future.set_result(function(argument))
    except BaseException as error:  # Raised again where the result is asked for.
        future.set_exception(error)


class Worker:
    """A thread that calls function(argument) for one argument after another.

    Attributes:
      began: when, by time.monotonic().

    Args:
      function: what is called.
      name: the thread's.
    """

    def __init__(self, function: Callable[[Any], Any], name: str):
        self.began = time.monotonic()
        self._function = function
        self._asked: queue.SimpleQueue[tuple[Future, Any] | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, argument: Any) -> Future:
        """The future result; cancelled in time, the call is left out."""
        future: Future = Future()
        self._asked.put((future, argument))
        return future

    def _work(self) -> None:
        for future, argument in iter(self._asked.get, None):
            if self._left.is_set():
                future.cancel()
            if future.set_running_or_notify_cancel():
                _carry_out(future, self._function, argument)

    def leave(self, seconds: float = 0.0) -> None:
        """Leaves out the calls not begun, and waits at most so long for the one under way."""
        self._left.set()
        self._asked.put(None)
        self._thread.join(seconds)
