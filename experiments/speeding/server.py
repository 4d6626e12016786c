"""A worker that answers requests, a line of JSON each, and the process that asks it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Idle workers are stopped, so that threads that wait by spinning take nothing from the others.
_IDLE, _BUSY = signal.SIGSTOP, signal.SIGCONT


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests {"do": name, …} from stdin until it ends; what libraries print is no answer.

    Args:
      handlers: by name; each takes the rest of a request by keyword, and gives what JSON can say.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class WorkerError(RuntimeError):
    """A worker has ended; the message is the end of what it wrote."""


class Worker:
    """A process that runs `serve`; it is stopped (SIGSTOP) while it is not asked anything.

    Attributes:
      seconds: since it was started.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]):
        """Starts `python -m module arguments` with these variables beside our own."""
        self._began = time.monotonic()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **environment},
        )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    def ask(self, what: str, **arguments: Any) -> Any:
        """The worker's answer.

        Raises:
          WorkerError: it has ended instead.
        """
        self._process.send_signal(_BUSY)
        try:
            print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            raise WorkerError(self._last_words())
        self._process.send_signal(_IDLE)
        return json.loads(answer)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        word, code = lines[-1] if lines else "no word", self._process.returncode
        return word if code > 0 and lines else f"ended with {code}: {word}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
