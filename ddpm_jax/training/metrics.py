"""Metrics on their way out: the window between two lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ddpm_jax.training.step import QUARTERS

PLAIN_SECONDS = 60  # Between lines of progress where there is no terminal.


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the message names the steps."""


class Window:
    """Sums of the metrics of the steps since the last line; they travel in checkpoints."""

    def __init__(self, sums: dict[str, Any] | None = None):
        """An empty window, or the one that `sums` was taken from."""
        self.sums = dict(sums or {})

    def add(self, last_step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of a call, each [steps, ...]; last_step: the updates done with it.

        Raises:
          NonFiniteError: a loss or gradient norm is not finite.
        """
        losses, norms = metrics["loss"], metrics["grad_norm"]
        bad = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
        if bad.size:
            steps = ", ".join(str(last_step - len(losses) + 1 + k) for k in bad[:8])
            raise NonFiniteError(
                f"loss or gradient not finite at step {steps}: loss {losses[bad[0]]}, gradient "
                f"norm {norms[bad[0]]}; lower train.learning_rate, or start from a checkpoint"
            )
        values = {name: np.asarray(x, np.float64).sum(axis=0) for name, x in metrics.items()}
        values["learning_rate"] = np.float64(metrics["learning_rate"][-1])
        values["steps"] = np.float64(len(losses))
        for name, value in values.items():
            before = 0.0 if name == "learning_rate" else np.asarray(self.sums.get(name, 0.0))
            self.sums[name] = (before + value).tolist()

    def close(self) -> dict[str, float]:
        """The scalars of a line, without quarters of T that had no draw; empties the window."""
        sums, self.sums = self.sums, {}
        steps = sums["steps"]
        scalars = {
            "loss": sums["loss"] / steps,
            "grad_norm": sums["grad_norm"] / steps,
            "learning_rate": sums["learning_rate"],
        }
        for quarter in range(QUARTERS):
            if share := sums["quarter_share"][quarter]:
                scalars[f"loss_quarter_{quarter + 1}"] = sums["quarter_loss"][quarter] / share
        return scalars


class Writer:
    """metrics.jsonl and TensorBoard events of a run; on other hosts than the first, nothing."""

    def __init__(self, directory: epath.Path, jsonl: epath.Path, step: int, active: bool):
        """Opens the files to go on after `step`; later lines, of a life cut short, are dropped."""
        self._jsonl, self._active = jsonl, active
        if not active:
            return
        self.records = [r for r in read(jsonl) if r["step"] <= step] if jsonl.exists() else []
        self._rewrite()
        # It tells TensorBoard to forget what came after.
        self._events = SummaryWriter(str(directory), purge_step=step + 1)

    def _rewrite(self) -> None:
        temporary = self._jsonl.parent / f"{self._jsonl.name}.tmp"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        temporary.replace(self._jsonl)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """One line, and the same to TensorBoard."""
        if not self._active:
            return
        record = {"step": step, **{k: v for k, v in scalars.items() if math.isfinite(v)}}
        self.records.append(record)
        with self._jsonl.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 [height, width, channels], to TensorBoard."""
        if self._active:
            self._events.add_image(name, picture, step, dataformats="HWC")
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._events.close()


class Progress:
    """A bar on a terminal, elsewhere a line a minute; and the clock of steps a second."""

    def __init__(self, step: int, total: int, active: bool, say: Callable[[str], None]):
        """Starts at `step` of `total`; on hosts that are not active nothing is shown."""
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=step, total=total, unit="step", disable=not (active and terminal), leave=False
        )
        self._say = say if active and not terminal else None
        self._total, self._shown = total, time.monotonic()
        self._first = self._mark = (step, time.monotonic())

    def update(self, step: int, note: str) -> None:
        """Shows the step reached, with a note."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._say and now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            rate = (step - self._first[0]) / (now - self._first[1])
            minutes = (self._total - step) / rate / 60
            self._say(
                f"step {step:,}/{self._total:,}  {note}  {rate:.3g} steps/s  {minutes:.0f} min left"
            )

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


def read(jsonl: epath.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in jsonl.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
