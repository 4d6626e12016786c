"""Checkpoints: written by Orbax in the background and atomically, checked leaf by leaf when read.

Orbax's "newest step" means a directory that was renamed into place, not one that is whole: bytes
that changed on the disk restore without a word. So a checksum of each leaf is saved beside the
state, and a checkpoint counts as whole only if every leaf restores to its checksum.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddpm_jax import bounded, files, session
from ddpm_jax.parallel import to_host
from ddpm_jax.training.metrics import NonFiniteError
from ddpm_jax.training.reading import UnreadError, first_line, patiently, raise_interrupts

_STATE, _META = "state", "meta"
ASK_SECONDS = 2.0  # Between two questions whether a bucket still answers, during a save.
_UNFINISHED = ".orbax-checkpoint-tmp"  # In the name of a directory that is being written.

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, or none of those that exist is whole."""


class Checkpoints:
    """The checkpoints of a run, in one directory; the name of each is the updates done.

    Attributes:
      saving: whether one was begun that nobody has waited for.
    """

    def __init__(
        self, directory: epath.PathLike, keep: int = 3, keep_every: int = 0, sweep: bool = False
    ):
        """Opens the directory, which need not exist.

        Args:
          keep: newest checkpoints that are kept; those at multiples of `keep_every` are as well.
          sweep: whether what saves that did not end have left there is removed, and damaged ones
            are set aside when an older one is restored, as only who saves there may do.
        """
        self._directory = epath.Path(directory)
        if not files.is_remote(directory):  # Orbax reads absolute paths only.
            self._directory = self._directory.resolve()
        self._sweeps, self.saving = sweep, False
        policy: Any = ocp.checkpoint_managers.LatestN(keep)
        if keep_every:
            every = ocp.checkpoint_managers.EveryNSteps(keep_every)
            policy = ocp.checkpoint_managers.AnyPreservationPolicy([policy, every])
        self._sweep()
        self._failure: BaseException | None = None  # Of this host's part of a save.
        hosts = {}
        if jax.process_count() > 1:
            self._meet = ocp.multihost.get_barrier_sync_fn()
            hosts["async_options"] = ocp.AsyncOptions(barrier_sync_fn=self._meet_others)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                step_prefix=None,
                enable_async_checkpointing=True,
                **hosts,
            ),
        )

    def _meet_others(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier in the background, to which no host comes that has failed.

        It would wait there for the others, and these for it, and nobody would hear of the failure.
        """
        failure = sys.exc_info()[1]  # Orbax meets the others on its way out, too.
        if failure is not None:
            self._failure = failure
            raise failure
        self._meet(key=key, timeout_ms=timeout_ms)

    def steps(self) -> list[int]:
        """The steps of the checkpoints on the disk, newest first, whole or not."""
        return sorted(self._manager.all_steps(read=True), reverse=True)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Starts writing the state and JSON-able notes; returns when the state may be changed.

        Raises:
          NonFiniteError: the state is not finite; nothing is written.
          CheckpointError: this one or the one before could not be written.
        """
        meta = {"checksums": _checksums(state, finite=True), "notes": notes}
        # Orbax writes them later, and they may change: a copy, of what JSON makes of them.
        meta = json.loads(json.dumps(meta))
        self.wait()
        with _write_errors(self._directory):
            self._sweep()
            meta["crc32"] = _digest(step, meta)
            args = ocp.args.Composite(
                **{_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(meta)}
            )
            self.saving = True
            if not self._manager.save(step, args=args, force=True):
                raise OSError(f"Orbax refuses to save step {step}: there is one")

    def set_aside(self, steps: Sequence[int], name: str) -> list[epath.Path]:
        """Renames checkpoints, so that they count no more: N to N.NAME, N.NAME1, ….

        Returns:
          Where they are; on other hosts than the first nothing.
        """
        aside = []
        for step in steps if jax.process_index() == 0 else ():
            path = files.unused(self._directory / f"{step}.{name}")
            with _write_errors(self._directory):
                (self._directory / str(step)).rename(path)
            aside.append(path)
        if steps:
            session.gather("setting checkpoints aside", None)
            self._manager.reload()
        return aside

    def _sweep(self) -> None:
        """Removes what was never whole: it takes the space that the next one needs."""
        if self._sweeps and jax.process_index() == 0:
            for left in files.matching(self._directory, f"*{_UNFINISHED}*"):
                _remove(left)

    def poll(self) -> None:
        """What `wait` does, without waiting: while the last save goes on, nothing.

        Raises:
          CheckpointError: it could not be written.
        """
        with _write_errors(self._directory):
            ended = self.saving and not self._in_progress()
        if ended:
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
          CheckpointError: the last one could not be written.
        """
        saving, self.saving = self.saving, False
        with _write_errors(self._directory):
            # Of several hosts one that fails leaves the others waiting for it, and it for them.
            remote, asked = files.is_remote(self._directory), time.monotonic()
            while saving and (remote or jax.process_count() > 1) and self._in_progress():
                if remote and time.monotonic() - asked > ASK_SECONDS:
                    # What writes there goes on trying for very long, and says nothing.
                    files.answer(self._directory, self._directory.exists)
                    asked = time.monotonic()
                time.sleep(0.05)
            problems = []
            # Both, or what is left of a failure would be the next save's.
            for settled in (self._manager.wait_until_finished, self._manager.check_for_errors):
                try:
                    settled()
                except Exception as error:
                    problems.append(error)
            if problems:
                if jax.process_count() == 1:  # Several hosts end now; they would wait for others.
                    with contextlib.suppress(Exception):  # Orbax has waited for one of its threads.
                        rest = self._manager._checkpointer.wait_until_finished
                        files.answer(self._directory, rest)
                self._manager.reload()  # Else it believes that the step is there.
                raise problems[0]

    def _in_progress(self) -> bool:
        """Whether a save goes on; raises whatever has gone wrong in this host's part of it."""
        if self._failure is not None:
            raise self._failure
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Lets go of the directory, without a word about failures: call `wait` first."""
        with contextlib.suppress(Exception):  # Of saves that failed, and were heard of.
            files.answer(self._directory, self._manager.close)

    def restore(
        self,
        abstract: Any,
        step: int | None = None,
        warn: Callable[[str], None] = logging.warning,
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """The newest whole checkpoint, or that of a step: (state, step, notes); None if none exist.

        Whole is what every host can read, to the same checksums. Who saves there sets newer ones
        that are not whole aside, as N.damaged: they would take the places of whole ones.

        Args:
          abstract: the state's jax.ShapeDtypeStructs with their shardings. A subtree, such as
            {"ema_params": …} of a state, reads only that.
          step: the one wanted.
          warn: called with a line for each damaged checkpoint that is passed over.
        Raises:
          CheckpointError: the step does not exist, all checkpoints are damaged, or one of them
            cannot be read now, see `attempt`.
        """
        steps = session.gather("listing checkpoints", self.steps())[0]
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint {step} in {self._directory}; there are {steps}")
        for candidate in steps if step is None else [step]:
            found, reason = self.attempt(candidate, abstract)
            if found is not None:
                if self._sweeps:
                    self.set_aside([s for s in steps if s > candidate], "damaged")
                return found[0], candidate, found[1]
            warn(f"checkpoint {candidate} cannot be read and is passed over: {reason}")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self._directory} can be read whole"
            )
        return None

    def attempt(
        self, step: int, abstract: Any
    ) -> tuple[tuple[Any, dict[str, Any]] | None, str | None]:
        """((state, notes), None) of a checkpoint, or (None, why it is not whole), on all hosts.

        Raises:
          CheckpointError: on all hosts: one of them could not read it, which proves no damage.
        """
        read, reason, unread = None, None, None
        try:
            read = self._patiently(step, lambda: self._read(step, abstract))
        except UnreadError as error:
            unread = str(error)
        except Exception as error:
            reason = first_line(error)
        reason, unread = _anybodys(step, reason), _anybodys(step, unread)
        if reason is None and unread is not None:
            raise CheckpointError(unread)
        if reason is None:  # All have it: now it can be looked at together.
            state, meta = read
            saved = meta["checksums"]
            wrong = [path for path, found in _checksums(state).items() if saved[path] != found]
            if wrong:
                reason = f"the checksum of {wrong[0]} is not the one saved"
            reason = _anybodys(step, reason)
        return (None, reason) if reason is not None else ((state, meta["notes"]), None)

    def notes(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        """(notes, None) of a checkpoint, or (None, why they are not whole), on this host alone.

        Raises:
          CheckpointError: they could not be read, which proves no damage.
        """
        try:
            return self._patiently(step, lambda: self._meta(step))["notes"], None
        except UnreadError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:
            return None, first_line(error)

    def _patiently(self, step: int, read: Callable[[], T]) -> T:
        """See `reading.patiently`."""
        try:
            return patiently(self._directory / str(step), read)
        except UnreadError as error:
            raise UnreadError(
                f"{error}; it need not be damaged and stays where it is: the same command goes on "
                "when it can be read, or without it when it is moved away"
            ) from error

    def _meta(self, step: int) -> dict[str, Any]:
        """What was saved beside a state.

        Raises:
          OSError, ValueError: it cannot be read, or is not what was saved with this step.
        """
        meta = bounded.read_json(self._directory / str(step) / _META / "metadata")
        parts = [meta.get(key) for key in ("checksums", "notes")] if isinstance(meta, dict) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            raise ValueError("no checksums, or no notes")
        # Runs that began with an earlier version have checkpoints without it.
        if meta.get("crc32", found := _digest(step, meta)) != found:
            raise ValueError("the checksum of its metadata is not the one saved")
        return meta

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state and all that was saved beside it, by this host alone."""
        meta = self._meta(step)
        if missing := [path for path in _paths(abstract) if path not in meta["checksums"]]:
            raise ValueError(f"no checksum of {missing[0]}")
        # No host waits for another while it reads: one that cannot would keep them for ever.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()} if jax.process_count() > 1 else None,
            barrier_sync_key_prefix=f"host{jax.process_index()}",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
            state = reader.restore(self._directory / str(step) / _STATE, args=args)
        return state, meta


def _checksums(state: Any, finite: bool = False) -> dict[str, int]:
    """CRC-32 of each leaf's bytes, by its path.

    Raises:
      NonFiniteError: all have to be finite and one is not.
    """
    checksums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        values, name = to_host(leaf), _name(path)
        if finite and jnp.issubdtype(values.dtype, jnp.inexact) and not np.isfinite(values).all():
            raise NonFiniteError(
                f"{name} is not finite and is not saved; try a lower --config.train.learning_rate, "
                "a run in another --workdir"
            )
        checksums[name] = zlib.crc32(values.tobytes())
    return checksums


def _digest(step: int, meta: dict[str, Any]) -> int:
    """CRC-32 of what a step has beside its state."""
    content = [step, meta["checksums"], meta["notes"]]
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _paths(state: Any) -> list[str]:
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _anybodys(step: int, reason: str | None) -> str | None:
    """The reason of the first host that has one; every host must come."""
    reasons = session.gather(f"reading checkpoint {step}", reason)
    for index, theirs in enumerate(reasons):
        if theirs is not None:
            return theirs if len(reasons) == 1 else f"{session.current().name(index)}: {theirs}"
    return None


def _remove(directory: epath.Path) -> None:
    """Removes what is left of a save, to which threads of it may still add for a moment."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            directory.rmtree(missing_ok=True)
            return
        time.sleep(0.05)
    directory.rmtree(missing_ok=True)


@contextlib.contextmanager
def _write_errors(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises whatever its layers happen to raise.
        raise_interrupts(error)
        raise CheckpointError(
            f"cannot write a checkpoint under {directory}{_free(directory)}: {first_line(error)}"
        ) from error


def _free(directory: epath.Path) -> str:
    """The space left on a local disk, in words."""
    try:
        free = shutil.disk_usage(directory).free
    except (OSError, TypeError):
        return ""
    return f" ({free / 2**20:,.0f} MiB free)"
