"""How long steps take, and which of several hosts holds the others up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from ddpm_jax import session
from ddpm_jax.training.goodput import Clock


class Pace:
    """How long the steps since the last line took, in all and without waiting for the devices.

    Hosts wait for each other there, so that all take as long as the slowest one: that one is told
    by what it did meanwhile.
    """

    def __init__(self, clock: Clock, steps_per_call: int):
        """No step has been made."""
        self._clock, self._steps_per_call, self._before = clock, steps_per_call, clock.awaited
        self._durations: list[tuple[float, float]] = []  # Of a step each, seconds.

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[None]:
        """While the results of a call are waited for."""
        began = time.monotonic()
        yield
        self._clock.awaited += time.monotonic() - began

    def took(self, seconds: float) -> None:
        """Notes how long a call has taken."""
        own = seconds - (self._clock.awaited - self._before)
        self._before = self._clock.awaited
        self._durations.append((seconds / self._steps_per_call, own / self._steps_per_call))

    def scalars(self) -> dict[str, float]:
        """The longest of all hosts' times, and which host had most to do."""
        if not self._durations:
            return {}
        steps, own = np.array(self._durations).T
        self._durations.clear()
        pace = [float(np.median(steps)), float(steps.max()), float(np.median(own))]
        of_all = session.current()
        paces = of_all.paces(pace) if of_all else {0: pace}
        names = ("time/step_median", "time/step_max", "time/host_median")
        scalars = dict(zip(names, map(max, zip(*paces.values(), strict=True)), strict=True))
        slowest = max(paces, key=lambda host: paces[host][2])
        return scalars | ({"time/host_median_host": slowest} if of_all else {})
