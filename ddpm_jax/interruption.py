"""Ctrl-C and SIGTERM as a question that loops ask, not as an exception anywhere."""

from __future__ import annotations

import itertools
import signal
import sys
from types import TracebackType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: interrupted; the same command goes on.


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The work stopped where it can go on; the message says where that is."""


class Watch:
    """While open, the first SIGINT or SIGTERM makes `asked` true; a second one stops at once.

    On several hosts JAX's own notice of preemption (SIGTERM) is used instead: a signal to one host
    stops all of them, after the same step.
    """

    # Of all watches: a sync point is a question's number, which must not come twice.
    _questions = itertools.count(1)

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Watch:
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def asked(self) -> bool:
        """Whether to stop now; every host must ask equally often."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(next(Watch._questions))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Watch):  # What came at the very end is the outer one's to answer.
                outer._requested = outer._requested or self._requested

    def _handle(self, number: int, frame: object) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the current step; once more to stop at once", file=sys.stderr)
