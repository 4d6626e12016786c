"""Where the wall time of a run goes, over all its lives, and how the lives ended."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
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
from ddpm_jax.files import REMOTE_SECONDS
from ddpm_jax.interruption import Interrupted
from ddpm_jax.lock import LostError
from ddpm_jax.progress import duration

PATIENCE = 20.0  # Times that of a step, for what is thousands of them: sampling, evaluation.
PHASES = ("start", "compile", "input", "step", "evaluate", "sample", "save")
COMPILING = "/jax/core/compile/backend_compile_duration"
SAVE_SECONDS = 5.0  # Between two updates of the file.
SAVE_SHARE = 0.02  # Of the time, at most, goes into them.
FRUITFUL_SECONDS = 60.0  # Of evaluation, whose pieces are kept.
NOWHERE = -1  # The step of a life that did not come to its first one.


class Clock:
    """Every moment of a process belongs to one phase, so that the phases add up to its life.

    What XLA compiles (or finds in its cache) counts as "compile" wherever it happens.

    Attributes:
      step: where the training is, for `describe`.
      awaited: seconds in which results of devices were waited for.
    """

    def __init__(self, started: float | None = None):
        """In phase "start".

        Args:
          started: the monotonic time when the process began; now, unless given.
        """
        self.step, self.awaited = 0, 0.0
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
        return 1.0 if self._phase in ("step", "input", "save") else PATIENCE

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

    `first` is NOWHERE where it ended before it could go on. `ended`: "done", "interrupted" or the
    reason; "" for one that was killed or still lives.
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

    def __init__(self, path: epath.Path, clock: Clock, active: bool):
        """This life has not come to its first step; on other hosts than the first nothing is kept.

        Args:
          path: of the file, which need not exist.
        """
        self._path, self._clock, self._active = path, clock, active
        self._before = read(path, set_aside=active)
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._life = Life(NOWHERE, NOWHERE, {}, began)
        self._next, self._interrupted = 0.0, False
        self.failure = ""

    def begin(self, step: int) -> None:
        """This life goes on from a step."""
        self._life.first = self._life.reached = step

    def fruitless(self) -> int:
        """How many lives in a row, the last ones, were killed or failed where this one begins.

        One that evaluated for long is none of them: what it had found is kept.
        """
        count = 0
        for life in reversed(self._before):
            ended_well = life.ended in ("done", "interrupted")
            if ended_well or life.seconds.get("evaluate", 0.0) > FRUITFUL_SECONDS:
                break
            if life.first not in (NOWHERE, self._life.first):
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
            step = self._life.first
            where = "before their first step" if step == NOWHERE else f"at step {step} or before"
            raise RequestError(
                f"the last {count} starts ended {where}, without a new checkpoint; the last one: "
                f"{reason}. Mend the cause, then start with --config.train.max_restarts=0, or a "
                "lower train.checkpoint_every"
            )

    def __enter__(self) -> Lives:
        with contextlib.suppress(OSError):  # The training is worth more.
            self.update(NOWHERE, at_once=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, LostError):  # Nor is the file this run's.
            return
        if kind is not None and issubclass(kind, RequestError):  # It was no start.
            with contextlib.suppress(OSError):
                self._write(self._before)
            return
        ended = "done" if kind is None else f"{kind.__name__}: {error}"
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            ended = "interrupted"
        self.end(self.failure or ended)

    def interrupt(self) -> None:
        """Notes that this life was told to end: if it is killed now, it has not failed.

        May be called from another thread.
        """
        self._interrupted, self._life.ended = True, "interrupted"
        with contextlib.suppress(OSError):
            self._write([*self._before, self._life])

    def end(self, how: str) -> None:
        """Notes how this life ends; where that cannot be written, nothing."""
        with contextlib.suppress(OSError):  # It must not hide what ended the run.
            self.update(self._life.reached, how)

    def update(self, step: int, ended: str = "", at_once: bool = False) -> None:
        """Notes the step reached; it is written now and then, or at once.

        Raises:
          OSError: it cannot be written.
        """
        self._life.reached = max(self._life.reached, step)
        began = time.monotonic()
        if not (at_once or ended) and began < self._next:
            return
        self._life.seconds = self._clock.seconds()
        self._life.ended = ended or ("interrupted" if self._interrupted else "")
        try:
            self._write([*self._before, self._life])
        finally:
            least = REMOTE_SECONDS if files.is_remote(self._path) else SAVE_SECONDS
            now = time.monotonic()
            self._next = now + max(least, (now - began) / SAVE_SHARE)

    def _write(self, lives: list[Life]) -> None:
        if self._active:
            content = {
                "total": rounded(total(lives)),
                "lives": [dataclasses.asdict(life) for life in lives],
            }
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
    for life in lives:
        for name in PHASES:
            seconds[name] += life.seconds.get(name, 0.0)
    begun = [life for life in lives if life.first != NOWHERE]
    for life, following in itertools.pairwise(begun):
        done, again = life.reached - life.first, life.reached - following.first
        if done > 0 and again > 0:
            lost = min(again, done) / done * life.seconds.get("step", 0.0)
            seconds["lost"] += lost
            seconds["step"] -= lost
    return seconds


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """To milliseconds."""
    return {name: round(value, 3) for name, value in seconds.items()}


def read(path: epath.Path, set_aside: bool = False) -> list[Life]:
    """The lives in a goodput.json; none where there is no such file, or a damaged one.

    Args:
      set_aside: whether a damaged file is kept as goodput.json.damaged, which a warning says.
    Raises:
      OSError: it is there and cannot be read now.
    """
    try:
        return _lives(bounded.read_json(path))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    if set_aside:
        kept = files.unused(path.parent / f"{path.name}.damaged")
        path.rename(kept)
        logging.getLogger(__name__).warning(
            "%s is damaged (%s) and begun anew: where earlier starts have spent their time, and "
            "how they ended, is forgotten; the file as it was is %s",
            *(path, " ".join(reason.split())[:200], kept),
        )
    return []


def _lives(content: Any) -> list[Life]:
    """What a goodput.json says.

    Raises:
      ValueError, KeyError, TypeError: it is none.
    """
    kinds = {"first": int, "reached": int, "seconds": dict, "began": str, "ended": str}
    lives = [Life(**{k: life[k] for k in kinds}) for life in content["lives"]]
    for life in lives:
        if any(type(getattr(life, k)) is not kind for k, kind in kinds.items()):
            raise TypeError("a life of values of other types")
        if not all(isinstance(value, (int, float)) for value in life.seconds.values()):
            raise TypeError("seconds that are no numbers")
    return lives
