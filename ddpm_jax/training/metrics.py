"""Metrics on their way out: the window between two lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from ddpm_jax import files
from ddpm_jax.training.step import QUARTERS


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
                f"norm {norms[bad[0]]}; try a lower --config.train.learning_rate, a run in "
                "another --workdir"
            )
        values = {name: np.asarray(x, np.float64).sum(axis=0) for name, x in metrics.items()}
        values["learning_rate"] = np.float64(metrics["learning_rate"][-1])
        values["steps"] = np.float64(len(losses))
        for name, value in values.items():
            before = 0.0 if name == "learning_rate" else np.asarray(self.sums.get(name, 0.0))
            self.sums[name] = (before + value).tolist()

    def scalars(self) -> dict[str, float]:
        """The scalars of a line, without quarters of T that had no draw."""
        sums, steps = self.sums, self.sums["steps"]
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

    def __init__(
        self,
        directory: epath.Path,
        jsonl: epath.Path,
        step: int,
        keep: Callable[[dict[str, Any]], bool],
        active: bool,
    ):
        """Opens the files to go on after `step`, with the lines so far that `keep` accepts."""
        self._jsonl, self._active = jsonl, active
        if not active:
            return
        self.records = [r for r in read(jsonl) if keep(r)] if jsonl.exists() else []
        self._rewrite()
        # It tells TensorBoard to forget what came after.
        self._events = SummaryWriter(str(directory), purge_step=step + 1)

    def _rewrite(self) -> None:
        files.replace(self._jsonl, "".join(json.dumps(record) + "\n" for record in self.records))

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

    def scalars_once(self, step: int, scalars: dict[str, float]) -> None:
        """The same, unless the step has such a line."""
        line = {"step": step, **{k: v for k, v in scalars.items() if math.isfinite(v)}}
        if self._active and not any(line.items() <= record.items() for record in self.records):
            self.scalars(step, scalars)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 [height, width, channels], to TensorBoard."""
        if self._active:
            self._events.add_image(name, picture, step, dataformats="HWC")
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._events.close()


def read(jsonl: epath.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in jsonl.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
