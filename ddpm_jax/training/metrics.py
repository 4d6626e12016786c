"""Metrics on their way out: the window between two lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax import files
from ddpm_jax.training.step import QUARTERS

# tensorboardX would import these where they are, for 1.7 s and 150 MB; writers of its own can then
# not reach S3 or GCS, unless it was imported before.
_unneeded = {"torch", "boto3", "google.cloud.storage"} - set(sys.modules)
sys.modules.update(dict.fromkeys(_unneeded))
try:
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c
finally:
    for _name in _unneeded:
        del sys.modules[_name]

EVENTS_BYTES = 2**23  # After which another file of events is begun: objects are written whole.
BLOCK = 2**20  # Bytes; no line of metrics.jsonl is longer.


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the message names the steps."""


class Window:
    """Sums of the metrics of the steps since the last line; they travel in checkpoints."""

    def __init__(self, sums: dict[str, Any] | None = None):
        """An empty window, or the one that `sums` was taken from."""
        self.sums = dict(sums or {})

    def add(self, last_step: int, metrics: dict[str, np.ndarray]) -> list[int]:
        """Adds the metrics of a call, each [steps, ...]; last_step: the updates done with it.

        Returns:
          The steps whose updates were left out because they were not finite; they are not added.
        Raises:
          NonFiniteError: a loss or gradient norm is not finite, and the update was made.
        """
        losses, norms = metrics["loss"], metrics["grad_norm"]
        numbers = last_step - len(losses) + 1 + np.arange(len(losses))
        finite = np.isfinite(losses) & np.isfinite(norms)
        skipped = metrics.get("skipped", np.zeros(len(losses), bool))
        bad = np.flatnonzero(~(finite | skipped))
        if bad.size:
            raise NonFiniteError(
                f"loss or gradient not finite at step {', '.join(map(str, numbers[bad[:8]]))}: "
                f"loss {losses[bad[0]]}, gradient norm {norms[bad[0]]}; try a lower "
                "--config.train.learning_rate in another --workdir, or go on without such batches: "
                "--config.train.nonfinite=skip"
            )
        values = {
            name: np.asarray(x, np.float64)[~skipped].sum(axis=0)
            for name, x in metrics.items()
            if name != "skipped"
        }
        values["learning_rate"] = np.float64(metrics["learning_rate"][-1])
        values["steps"] = np.float64((~skipped).sum())
        for name, value in values.items():
            before = 0.0 if name == "learning_rate" else np.asarray(self.sums.get(name, 0.0))
            self.sums[name] = (before + value).tolist()
        return numbers[skipped].tolist()

    @property
    def loss(self) -> float:
        """The mean loss; NaN where all updates were left out."""
        return self.sums["loss"] / self.sums["steps"] if self.sums["steps"] else float("nan")

    def scalars(self) -> dict[str, float]:
        """The scalars of a line, without quarters of T that had no draw."""
        sums, steps = self.sums, self.sums["steps"]
        scalars = {"learning_rate": sums["learning_rate"]}
        if steps:
            scalars |= {"loss": self.loss, "grad_norm": sums["grad_norm"] / steps}
        for quarter in range(QUARTERS):
            if share := sums["quarter_share"][quarter]:
                scalars[f"loss_quarter_{quarter + 1}"] = sums["quarter_loss"][quarter] / share
        return scalars


class Writer:
    """metrics.jsonl and TensorBoard events of a run; on other hosts than the first, nothing.

    Lines are kept in memory as well: those that could not be written are once that works again.
    In a gs:// directory they are written every 30 seconds, see `files.Growing`, and by `flush`.
    """

    def __init__(
        self,
        directory: epath.Path,
        jsonl: epath.Path,
        step: int,
        keep: Callable[[dict[str, Any]], bool],
        active: bool,
        write_errors: str = "stop",
        say: Callable[[str], None] = print,
    ):
        """Opens the files to go on after `step`, with the lines so far that `keep` accepts.

        A file with damaged lines is kept as metrics.jsonl.damaged.

        Args:
          write_errors: of this method and all others, see `train.write_errors`: "stop" raises
            OSError; "continue" says once that something cannot be written, and goes on.
          say: prints a line.
        """
        self._active, self._stops, self._say = active, write_errors == "stop", say
        self._failing: set[epath.Path] = set()  # Files with something that is not written.
        if not active:
            return
        records, damaged = _parse(jsonl) if jsonl.exists() else ([], 0)
        if damaged:
            kept = files.unused(jsonl.parent / f"{jsonl.name}.damaged")
            jsonl.rename(kept)
            say(f"{jsonl}: {damaged} damaged lines are left out; the file as it was is {kept}")
        self.records = [record for record in records if keep(record)]
        self._lines = files.Growing(jsonl, b"".join(map(_line, self.records)))
        self._write(self._lines)
        self._directory, self._started, self._parts = directory, int(time.time()), 0
        # It tells TensorBoard to forget what came after.
        self._begin_events(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _begin_events(self, *events: Event) -> None:
        # TensorBoard reads them in the order of their names.
        name = f"events.out.tfevents.{self._started}.{socket.gethostname()}.{os.getpid()}"
        path = self._directory / name
        while path.exists():
            self._parts += 1
            path = self._directory / f"{name}.{self._parts:04d}"
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._events = files.Growing(path, b"".join(map(_framed, (version, *events))))
        self._write(self._events)

    def _write(
        self, file: files.Growing, record: bytes | None = None, to_disk: bool = False
    ) -> None:
        """Writes all of a file, or adds a record to it, as `write_errors` says."""
        path = file.path
        try:
            if record is not None:
                file.append(record)
            elif to_disk:
                file.sync()
            else:
                file.write()
        except OSError as error:
            if self._stops:
                raise
            if path not in self._failing:
                self._failing.add(path)
                self._say(
                    f"{path} cannot be written: {error.strerror or error}; the training goes on, "
                    "and what is missing is written when that works again"
                )
        if path in self._failing and file.written:
            self._failing.remove(path)
            self._say(f"{path} is written again, and whole")

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """One line, and the same to TensorBoard."""
        if not self._active:
            return
        record = {"step": step, **{k: v for k, v in scalars.items() if math.isfinite(v)}}
        self.records.append(record)
        self._write(self._lines, _line(record))
        values = [value for k, v in scalars.items() for value in summary.scalar(k, v).value]
        self._add(step, summary.Summary(value=values))

    def scalars_once(self, step: int, scalars: dict[str, float]) -> None:
        """The same, unless the step has such a line."""
        line = {"step": step, **{k: v for k, v in scalars.items() if math.isfinite(v)}}
        if self._active and not any(line.items() <= record.items() for record in self.records):
            self.scalars(step, scalars)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 [height, width, channels], to TensorBoard."""
        if self._active:
            self._add(step, summary.image(name, picture, dataformats="HWC"))

    def _add(self, step: int, content: summary.Summary) -> None:
        if len(self._events) > EVENTS_BYTES:
            self._write(self._events)
            if self._events.path in self._failing:
                return  # Memory has a bound; the lines have all of the numbers.
            self._begin_events()
        event = Event(wall_time=time.time(), step=step, summary=content)
        self._write(self._events, _framed(event))

    def flush(self) -> None:
        """Brings all to the disk: a checkpoint counts once the lines before it are there."""
        if self._active:
            for file in (self._lines, self._events):
                self._write(file, to_disk=True)

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._active:
            for file in (self._lines, self._events):
                self._write(file)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _framed(event: Event) -> bytes:
    """A record of TensorBoard's files: its length and itself, each with its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checksums), data, next(checksums)))


def read(jsonl: epath.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl but damaged ones, such as a last one cut short by a kill."""
    return _parse(jsonl)[0]


def _parse(jsonl: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many damaged lines there are beside one that was cut short."""
    records, damaged = [], 0
    for line, whole in _lines(jsonl):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += whole
    return records, damaged


def _lines(jsonl: epath.Path) -> Iterator[tuple[bytes, bool]]:
    """Each line and whether it ends; of one longer than a block, pieces."""
    rest = b""
    with jsonl.open("rb") as file:
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from ((line, True) for line in lines)
            if len(rest) > BLOCK:
                yield rest, True
                rest = b""
    if rest:
        yield rest, False
