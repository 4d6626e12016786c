"""Checkpoints: written by Orbax in the background and atomically, checked leaf by leaf when read.

Orbax's "newest step" means a directory that was renamed into place, not one that is whole: bytes
that changed on the disk restore without a word. So a checksum of each leaf is saved beside the
state, and a checkpoint counts as whole only if every leaf restores to its checksum.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ddpm_jax.parallel import to_host

_STATE, _META = "state", "meta"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist is whole."""


class Checkpoints:
    """The checkpoints of a run, in one directory; the name of each is the updates done."""

    def __init__(self, directory: epath.PathLike, keep: int = 3):
        """Opens the directory, which need not exist; `keep` newest checkpoints are kept."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file.
        self._directory = epath.Path(directory).resolve()  # Orbax reads absolute paths only.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            step_prefix=None,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The steps of the checkpoints on the disk, newest first, whole or not."""
        return sorted(self._manager.all_steps(read=True), reverse=True)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Starts writing the state and JSON-able notes; returns when the state may be changed.

        Raises:
          CheckpointError: this one or the one before could not be written.
        """
        checksums = _checksums(state)
        with _write_errors(self._directory):
            self._manager.wait_until_finished()
            self._set_aside(step)
            args = ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state),
                    _META: ocp.args.JsonSave({"checksums": checksums, "notes": notes}),
                }
            )
            self._manager.save(step, args=args, force=True)

    def _set_aside(self, step: int) -> None:
        """Renames a checkpoint in the way: there is one only if it was passed over as damaged."""
        path = self._directory / str(step)
        if jax.process_index() == 0 and path.exists():
            taken = len(list(self._directory.glob(f"{step}.damaged*")))
            path.rename(self._directory / f"{step}.damaged{taken or ''}")
            self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
          CheckpointError: the last one could not be written.
        """
        with _write_errors(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Lets go of the directory, without a word about failures: call `wait` first."""
        self._manager.close()

    def restore(
        self,
        abstract: Any,
        step: int | None = None,
        warn: Callable[[str], None] = logging.warning,
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """The newest whole checkpoint, or that of a step: (state, step, notes); None if none exist.

        Args:
          abstract: the state's jax.ShapeDtypeStructs with their shardings. A subtree, such as
            {"ema_params": …} of a state, reads only that.
          step: the one wanted.
          warn: called with a line for each damaged checkpoint that is passed over.
        Raises:
          CheckpointError: the step does not exist, or all checkpoints are damaged.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint {step} in {self._directory}; there are {steps}")
        for candidate in steps if step is None else [step]:
            try:
                return self._read(candidate, abstract)
            except Exception as error:  # Orbax raises whatever its layers happen to raise.
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                warn(f"checkpoint {candidate} cannot be read and is passed over: {reason}")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self._directory} can be read whole"
            )
        return None

    def delete(self, step: int) -> None:
        """Removes a checkpoint."""
        self.wait()
        self._manager.delete(step)

    def notes(self, step: int) -> dict[str, Any]:
        """The notes saved with a step; empty where they cannot be read."""
        try:
            meta = (self._directory / str(step) / _META / "metadata").read_text()
            return json.loads(meta)["notes"]
        except (OSError, ValueError, KeyError):
            return {}

    def _read(self, step: int, abstract: Any) -> tuple[Any, int, dict[str, Any]]:
        directory = self._directory / str(step)
        meta = json.loads((directory / _META / "metadata").read_text())
        with ocp.PyTreeCheckpointer() as reader:
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
            state = reader.restore(directory / _STATE, args=args)
        for path, checksum in _checksums(state).items():
            if meta["checksums"][path] != checksum:
                raise ValueError(f"the checksum of {path} is not the one saved")
        return state, step, meta["notes"]


class Best:
    """The checkpoint with the best value of one result, as papers report at the minimum FID."""

    def __init__(self, directory: epath.PathLike, result: str):
        """Opens `<directory>/<result>`, which need not exist; `result` is the result's name."""
        self._checkpoints = Checkpoints(epath.Path(directory) / result, keep=1)
        self._result = result
        self._notes: dict[str, Any] = {}
        for step in self._checkpoints.steps()[:1]:
            self._notes = self._checkpoints.notes(step)

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
        self._notes = {"result": self._result, "value": value, "protocol": protocol}
        for there in self._checkpoints.steps():
            if there >= step:  # Measured in another way, or in a later life: no rival any more.
                self._checkpoints.delete(there)
        self._checkpoints.save(step, params, self._notes)

    def close(self) -> None:
        """Returns when everything is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        self._checkpoints.wait()
        self._checkpoints.close()


def _checksums(state: Any) -> dict[str, int]:
    """CRC-32 of each leaf's bytes, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): zlib.crc32(to_host(leaf).tobytes()) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@contextlib.contextmanager
def _write_errors(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # As above.
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise CheckpointError(f"cannot write a checkpoint under {directory}: {reason}") from error
