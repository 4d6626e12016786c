"""Ctrl-C and SIGTERM as a question that loops ask, not as an exception anywhere."""

from __future__ import annotations

import signal
import sys
from types import TracebackType

EXIT_CODE = 75  # EX_TEMPFAIL: interrupted; the same command goes on.


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The work stopped where it can go on; the message says where that is."""


class Watch:
    """While open, the first SIGINT or SIGTERM sets `requested`; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Watch:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the current step; once more to stop at once", file=sys.stderr)
