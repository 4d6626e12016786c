"""The checkpoint with the best value of one result, as papers report at the minimum FID."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ddpm_jax import session
from ddpm_jax.training.checkpoints import Checkpoints


class Best:
    """The best checkpoint so far, in one directory, with the value that it is kept for."""

    def __init__(
        self,
        directory: epath.PathLike,
        result: str,
        say: Callable[[str], None] = logging.warning,
    ):
        """Opens `<directory>/<result>`, which need not exist; damaged ones are set aside there.

        Args:
          result: its name.
          say: called with a line for each checkpoint that is set aside.
        Raises:
          CheckpointError: the best one can neither be read now nor is it damaged.
        """
        self._checkpoints = Checkpoints(epath.Path(directory) / result, keep=1, sweep=True)
        self._result = result
        self._beaten: list[epath.Path] = []  # Until the one that beats them is on the disk.
        # What the best one is kept for: of the one on its way, and of the one on the disk.
        self._notes = self._written = self._kept(say)

    def _kept(self, say: Callable[[str], None]) -> dict[str, Any]:
        """What the checkpoint on the first host's disk is kept for; {} where there is none."""
        damaged, found = [], None
        for step in self._checkpoints.steps() if jax.process_index() == 0 else ():
            found, reason = self._checkpoints.notes(step)
            if found is not None:
                break
            damaged.append((step, reason))
        damaged, found = session.gather("reading what is best", (damaged, found))[0]
        for step, reason in damaged:
            say(f"best checkpoint {step} of {self._result} is damaged and set aside: {reason}")
        self._checkpoints.set_aside([step for step, _ in damaged], "damaged")
        return found or {}

    def _listed(self) -> list[int]:
        return session.gather("listing the best checkpoint", self._checkpoints.steps())[0]

    def beaten_by(self, value: float, better: str, protocol: str) -> bool:
        """Whether a value is better than that of the checkpoint there.

        Args:
          better: "lower" or "higher".
          protocol: what the value was measured under; that of another is no rival.
        """
        if not math.isfinite(value) or self._notes.get("protocol") != protocol:
            return math.isfinite(value)
        before = self._notes["value"]
        return value < before if better == "lower" else value > before

    def save(self, step: int, params: Any, value: float, protocol: str) -> None:
        """Starts writing {"ema_params": …, "params": …} in the place of the one before.

        Raises:
          CheckpointError: it, or the one before, could not be written.
        """
        self.wait()
        # Of a later step: measured in another way, or in a later life. No rival any more.
        later = [there for there in self._listed() if there >= step]
        self._beaten = self._checkpoints.set_aside(later, "beaten")
        if later:
            self._notes = self._written = {}
        notes = {"result": self._result, "value": value, "protocol": protocol}
        self._settle(lambda: self._checkpoints.save(step, params, notes))
        self._notes = notes

    def poll(self) -> None:
        """What `wait` does, without waiting: while a save goes on, nothing.

        Raises:
          CheckpointError: it could not be written; the one before is the best again.
        """
        self._settle(self._checkpoints.poll)

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
          CheckpointError: see `poll`.
        """
        self._settle(self._checkpoints.wait)

    def _settle(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # Without a word to the other hosts: they are at something else.
            self._notes = self._written
            raise
        if not self._checkpoints.saving:
            self._written = self._notes
            for path in self._beaten:
                path.rmtree(missing_ok=True)
            self._beaten = []

    def close(self) -> None:
        """Lets go of the directory, without a word about failures: call `wait` first."""
        self._checkpoints.close()
