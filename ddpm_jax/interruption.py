"""Ctrl-C and SIGTERM as a question that loops ask, not as an exception anywhere."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar

from ddpm_jax import session

EXIT_CODE = session.AGAIN  # Interrupted; the same command goes on.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = 3.0  # For Python to act on the second signal, and to end all that is open.
ASLEEP_SECONDS = 10.0  # No thread waits that long to be woken, unless all of them do.
STUCK_SECONDS = 60.0  # Beyond `hang_seconds`, for what lets no thread of Python's run.
AT_ONCE = "stopped at once; the same command goes on"


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The work stopped where it can go on; the message says where that is."""


class Watch:
    """While open, the first SIGINT or SIGTERM makes `asked` true; a second one stops at once.

    On several hosts a signal to one stops all, after the same step. A watch within another is that
    one. It also ends the process when nobody has asked for `hang_seconds`: what waits for another
    host, a device or a disk may do so for ever.

    Attributes:
      farewell: called, from another thread, with how it ends where it ends the process itself.
      listeners: called, from another thread, at the first signal.
    """

    _open: ClassVar[Watch | None] = None  # Signals are the process's, and so is who hears them.

    def __init__(
        self,
        hang_seconds: float = 0.0,
        doing: Callable[[], str] = lambda: "working",
        patience: Callable[[], float] = lambda: 1.0,
    ):
        """Not open yet.

        Args:
          hang_seconds: the time between two questions after which the process ends; 0: none.
          doing: what is being done, in words.
          patience: how many times that long it may take.
        """
        self._hang_seconds, self._doing, self._patience = hang_seconds, doing, patience
        self.farewell: Callable[[str], Any] = lambda how: None
        self.listeners: list[Callable[[], Any]] = []
        self._outer: Watch | None = None
        self._signals = 0
        self._before: dict[int, object] = {}
        self._asked_at = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> Watch:
        self._outer = Watch._open
        if self._outer is None:
            self._asked_at = time.monotonic()
            if threading.current_thread() is threading.main_thread():
                self._listen()
            if self._hang_seconds:
                threading.Thread(target=self._guard, name="hang", daemon=True).start()
            Watch._open = self
        return self

    def asked(self) -> bool:
        """Whether to stop now; every host must ask equally often."""
        if self._outer is not None:
            return self._outer.asked()
        if self._signals > 1:  # It was raised where nobody lets it through, as in a callback.
            raise KeyboardInterrupt
        self._asked_at = time.monotonic()
        of_all = session.current()
        return of_all.asked(self._signals > 0) if of_all else self._signals > 0

    def heard(self) -> bool:
        """Whether this process has had a signal; may be asked at any time, and stops no others."""
        return (self._outer or self)._signals > 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._outer is not None:
            return
        Watch._open = None
        self._closed.set()
        if self._hang_seconds:
            faulthandler.cancel_dump_traceback_later()
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write_end)  # Which ends the thread that reads.

    def _listen(self) -> None:
        """Hears signals twice: as Python does, between two of its instructions, and at once."""
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(read_end,), name="signals", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the current step; once more to stop at once", file=sys.stderr)

    def _hear(self, read_end: int) -> None:
        """Ends the process at the second signal if that takes Python long.

        As while XLA compiles, or what is open waits for a slow disk.
        """
        heard = 0
        while received := os.read(read_end, 64):
            before, heard = heard, heard + sum(number in SIGNALS for number in received)
            if heard and not before:
                for listener in self.listeners:
                    listener()
            if heard > 1 and not self._closed.wait(SECONDS):
                self._end(AT_ONCE)
        os.close(read_end)

    def _guard(self) -> None:
        """Ends the process when it hangs; where this thread cannot run, faulthandler's does."""
        looked = time.monotonic()
        while not self._closed.wait(min(1.0, self._hang_seconds / 4)):
            now = time.monotonic()
            if now - looked > ASLEEP_SECONDS:  # The process was stopped, and is going on.
                self._asked_at = now
            looked, limit = now, self._hang_seconds * self._patience()
            faulthandler.dump_traceback_later(limit + STUCK_SECONDS, exit=True, file=2)
            if now - self._asked_at > limit:
                session.dump_stacks()
                self._end(
                    f"nothing has moved for {limit:g} s (see parallel.hang_seconds) while "
                    f"{self._doing()}; the same command goes on"
                )

    def _end(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        how = "interrupted" if message == AT_ONCE else message
        last = threading.Thread(target=self.farewell, args=(how,), daemon=True)
        last.start()
        last.join(SECONDS)  # The disk may be what hangs.
        of_all = session.current()
        if of_all:
            of_all.leave(EXIT_CODE, message)
        os._exit(EXIT_CODE)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within, a SIGTERM that nobody watches for raises KeyboardInterrupt, as SIGINT does."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
