"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

PLAIN_SECONDS = 60  # Between lines where there is no terminal.


class Progress:
    """A bar on a terminal, elsewhere a line a minute; and the clock of steps a second."""

    def __init__(
        self, step: int, total: int, active: bool, say: Callable[[str], None], unit: str = "step"
    ):
        """Starts at `step` of `total`; on hosts that are not active nothing is shown."""
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=step,
            total=total,
            dynamic_ncols=True,
            unit=f" {unit}s",
            disable=not (active and terminal),
            leave=False,
        )
        self._say = say if active and not terminal else None
        self._unit, self._total, self._shown = unit, total, time.monotonic()
        self._first = self._mark = (step, time.monotonic())

    def update(self, step: int, note: str = "") -> None:
        """Shows the step reached, with a note."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._say and now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            rate = (step - self._first[0]) / (now - self._first[1])
            left = datetime.timedelta(seconds=round((self._total - step) / max(rate, 1e-9)))
            done = f"{self._unit} {step:,}/{self._total:,}"
            self._say("  ".join(filter(None, [done, note, f"{rate:.3g} a second, {left} left"])))

    def rate(self, step: int) -> float:
        """Steps a second since this was last asked, pauses left out."""
        now = time.monotonic()
        rate = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
        self._mark = (step, now)
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        start = time.monotonic()
        yield
        self._mark = (self._mark[0], self._mark[1] + time.monotonic() - start)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def duration(seconds: float) -> str:
    """E.g. "3 h 10 min", "4 min" or "12 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(datetime.timedelta(seconds=seconds) / datetime.timedelta(minutes=1))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
