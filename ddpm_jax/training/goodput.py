"""Where the wall time of a run goes, over all its lives, and how the lives ended."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
from etils import epath

from ddpm_jax import bounded, files
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Interrupted
from ddpm_jax.progress import duration

PHASES = ("start", "compile", "input", "step", "evaluate", "sample", "save")
COMPILING = "/jax/core/compile/backend_compile_duration"
SAVE_SECONDS = 5.0  # Between two updates of the file.


class Clock:
    """Every moment of a process belongs to one phase, so that the phases add up to its life.

    What XLA compiles (or finds in its cache) counts as "compile" wherever it happens.

    Attributes:
      step: where the training is, for `describe`.
    """

    def __init__(self, started: float | None = None):
        """In phase "start".

        Args:
          started: the monotonic time when the process began; now, unless given.
        """
        self.step = 0
        self._phase, self._since = "start", time.monotonic() if started is None else started
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILING and threading.get_ident() == self._thread:
            self._seconds["compile"] += seconds
            self._seconds[self._phase] -= seconds

    def enter(self, phase: str) -> str:
        """Ends the phase until now, which is returned."""
        now, before = time.monotonic(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Within, time belongs to this phase; afterwards to that of before."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Of each phase until now."""
        self.enter(self._phase)
        return dict(self._seconds)

    def seconds_of(self, phase: str) -> float:
        """Of a phase, until it was last left; any thread may ask."""
        return self._seconds[phase]

    def describe(self) -> str:
        """What is being done, in words."""
        return f"in phase {self._phase} at step {self.step}"

    def patience(self) -> float:
        """How much longer than a step the phase may take: sampling is thousands of them."""
        return 1.0 if self._phase in ("step", "input", "save") else 20.0

    def close(self) -> None:
        """Hears of no compilation any more."""
        jax.monitoring.unregister_event_duration_listener(self._event)


def process_start() -> float:
    """The monotonic time when this process began; now, where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0
    return time.monotonic() - age


@dataclasses.dataclass
class Life:
    """One process of a run: from which step to which, where its time went, how it ended.

    `ended`: "done", "interrupted" or the reason; "" for one that was killed or still lives.
    """

    first: int
    reached: int
    seconds: dict[str, float]
    began: str
    ended: str = ""

    @property
    def wall(self) -> float:
        """The seconds of all phases."""
        return sum(self.seconds.values())


class Lives:
    """The file goodput.json of a run: its lives, the last of which is this one, while open.

    Attributes:
      failure: why the run failed, where no exception says so.
    """

    def __init__(self, path: epath.Path, clock: Clock, step: int, active: bool):
        """This life begins at `step`; on other hosts than the first nothing is written."""
        self._path, self._clock, self._active = path, clock, active
        self._before = read(path)
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._life = Life(step, step, {}, began)
        self._written = 0.0
        self.failure = ""

    def fruitless(self) -> int:
        """How many lives in a row, the last ones, began at this step and were killed or failed."""
        count = 0
        for life in reversed(self._before):
            if life.first != self._life.first or life.ended in ("done", "interrupted"):
                break
            count += 1
        return count

    def check_progress(self, limit: int) -> None:
        """Refuses to try for ever what fails each time.

        Args:
          limit: on the number of fruitless lives; 0: none.
        Raises:
          RequestError: it is reached.
        """
        count = self.fruitless()
        if limit and count >= limit:
            reason = self._before[-1].ended or "killed, or ended without a word"
            raise RequestError(
                f"the last {count} starts all began at step {self._life.first} and did not reach "
                f"the next checkpoint; the last one: {reason}. Mend the cause, then start with "
                "--config.train.max_restarts=0, or a lower train.checkpoint_every"
            )

    def __enter__(self) -> Lives:
        self.update(self._life.first, at_once=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ended = "done" if kind is None else f"{kind.__name__}: {error}"
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            ended = "interrupted"
        with contextlib.suppress(OSError):  # It must not hide what ended the run.
            self.update(self._life.reached, self.failure or ended)

    def update(self, step: int, ended: str = "", at_once: bool = False) -> None:
        """Notes the step reached; it is written now and then, or at once."""
        self._life.reached = max(self._life.reached, step)
        self._life.seconds, self._life.ended = self._clock.seconds(), ended
        now = time.monotonic()
        if self._active and (at_once or ended or now - self._written > SAVE_SECONDS):
            self._written = now
            lives = [dataclasses.asdict(life) for life in (*self._before, self._life)]
            content = {"total": rounded(total([*self._before, self._life])), "lives": lives}
            files.replace(self._path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def total(self) -> dict[str, float]:
        """See `total`, of all lives until now."""
        self._life.seconds = self._clock.seconds()
        return total([*self._before, self._life])

    def scalars(self) -> dict[str, float]:
        """The seconds of each phase of all lives, for a line of metrics, and the share of steps."""
        seconds = self.total()
        scalars = {f"time/{name}": round(value, 3) for name, value in seconds.items()}
        return scalars | {"time/goodput": seconds["step"] / max(sum(seconds.values()), 1e-9)}

    def summary(self) -> str:
        """A line of where the time went."""
        seconds = self.total()
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value)
        lives = len(self._before) + 1
        over = f" over {lives} starts" if lives > 1 else ""
        return f"time: {duration(sum(seconds.values()))}{over}: {parts}"


def total(lives: list[Life]) -> dict[str, float]:
    """Seconds of each phase over lives, those of steps that a later life did again as "lost"."""
    seconds = dict.fromkeys((*PHASES, "lost"), 0.0)
    for life, following in zip(lives, [*lives[1:], None], strict=True):
        for name in PHASES:
            seconds[name] += life.seconds.get(name, 0.0)
        done = life.reached - life.first
        if following is not None and following.first < life.reached:
            lost = min(life.reached - following.first, done) / done * life.seconds.get("step", 0.0)
            seconds["lost"] += lost
            seconds["step"] -= lost
    return seconds


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """To milliseconds."""
    return {name: round(value, 3) for name, value in seconds.items()}


def read(path: epath.Path) -> list[Life]:
    """The lives in a goodput.json; none where there is no such file, or a damaged one."""
    fields = {field.name for field in dataclasses.fields(Life)}
    try:
        lives = bounded.read_json(path)["lives"]
        return [Life(**{k: v for k, v in life.items() if k in fields}) for life in lives]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
