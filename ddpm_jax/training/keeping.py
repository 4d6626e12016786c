"""What a run keeps of itself on the disk, and what happens when it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections

from ddpm_jax.lock import Lock
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.best import Best
from ddpm_jax.training.checkpoints import CheckpointError, Checkpoints
from ddpm_jax.training.goodput import Clock


class Keeper:
    """The checkpoints of a run and its best one, written in the background.

    What cannot be written ends the run, or is said and the run goes on, as `train.write_errors`
    tells; the lock of the directory is looked at before anything is written.

    Attributes:
      saved: the step of the last state that is on the disk, or on its way; None: it failed.
    """

    def __init__(
        self,
        train: ml_collections.ConfigDict,
        directory: RunDirectory,
        lock: Lock | None,
        clock: Clock,
        say: Callable[[str], None],
    ):
        """Opens the directories, which need not exist.

        Raises:
          CheckpointError: the best checkpoint can neither be read now nor is it damaged.
        """
        self._goes_on = train.write_errors == "continue"
        self._lock, self._clock, self._say = lock, clock, say
        self._said = ""
        self.saved: int | None = None
        self._checkpoints = Checkpoints(
            directory.checkpoints, train.keep_checkpoints, train.keep_every, sweep=True
        )
        self._best = Best(directory.best, train.keep_best, say) if train.keep_best else None

    def restore(self, abstract: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """See `Checkpoints.restore`."""
        found = self._checkpoints.restore(abstract, warn=self._say)
        self.saved = found[1] if found else 0
        return found

    def check(self) -> None:
        """Raises LostError where the directory is another training's, or gone."""
        if self._lock is not None:
            self._lock.check(absent_ok=self._goes_on)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within, whatever cannot be written is raised or said, see above."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            # Of several hosts one cannot go on without what the others have saved.
            if not self._goes_on or jax.process_count() > 1:
                raise
            line = f"{error}; the training goes on (train.write_errors=continue)"
            if line != self._said:  # A disk that is full stays so for a while.
                self._said = line
                self._say(line)

    def poll(self) -> None:
        """Looks whether what was begun has gone wrong, without waiting for it.

        Raises:
          CheckpointError: it has.
        """
        with self.writing(), self._state():
            self._checkpoints.poll()
        if self._best is not None:
            with self.writing():
                self._best.poll()

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Starts writing a checkpoint, when the one before is there or has failed.

        And when the best one is: behind a later checkpoint it would not be made again.

        Raises:
          NonFiniteError: the state is not finite.
          CheckpointError: this one or the one before could not be written.
          LostError: see `check`.
        """
        self.check()
        with self._clock.phase("save"):
            with self.writing(), self._state():
                self._checkpoints.wait()
            if self._best is not None:
                with self.writing():
                    self._best.wait()
            with self.writing(), self._state():
                self._checkpoints.save(step, state, notes)
                self.saved = step

    def beaten_by(self, value: float, better: str, protocol: str) -> bool:
        """Whether a best checkpoint is kept and this value beats it, see `Best.beaten_by`."""
        return self._best is not None and self._best.beaten_by(value, better, protocol)

    def save_best(self, step: int, params: Any, value: float, protocol: str) -> None:
        """Starts writing the best checkpoint, see `Best.save`.

        Raises:
          CheckpointError, LostError: see `save`.
        """
        self.check()
        with self._clock.phase("save"):
            with self.writing():
                self._best.wait()
            with self.writing():
                self._best.save(step, params, value, protocol)

    def finish(self) -> None:
        """Returns when everything is on the disk.

        Raises:
          CheckpointError: it is not, whatever `train.write_errors` says.
        """
        with self._clock.phase("save"):
            with self._state():
                self._checkpoints.wait()
            if self._best is not None:
                self._best.wait()

    def close(self) -> None:
        """Lets go of the directories."""
        self._checkpoints.close()
        if self._best is not None:
            self._best.close()

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            self.saved = None
            raise
