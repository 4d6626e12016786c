"""Runs a sweep's jobs on this machine, or prints their commands for another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from ddpm_jax.config import RequestError
from ddpm_jax.interruption import EXIT_CODE, Watch
from ddpm_jax.progress import duration
from experiments.sweeping.plan import DIVERGED, DONE, FAILED, INTERRUPTED, Command, Job, RunPlan

Say = Callable[[str], None]
POLL_SECONDS = 0.2
PLAIN_SECONDS = 60  # Between overviews where there is no terminal.


def perform(
    job: Job,
    environment: dict[str, str] | None = None,
    cpus: Sequence[int] = (),
    stop: Callable[[], bool] = lambda: False,
    started: Callable[[str, epath.Path, subprocess.Popen], None] = lambda *_: None,
) -> tuple[str, str]:
    """Runs a job's commands in order and records how each ended; (status, message) of the last one.

    Args:
      environment: of the programs; this process's own, unless given.
      cpus: that they may run on; all, unless given.
      stop: asked all the while; the program is then told to save and stop.
      started: told of each command's stage, its log and its program.
    """
    status, message = DONE, ""
    for command in job.commands:
        # Without those that diverged since, or of which an earlier stage failed.
        runs = [run for run in command.runs if run.missing()[:1] == [command.stage]]
        if not runs:
            continue
        if stop():
            return INTERRUPTED, f"stopped before {command.stage.name}"
        command = dataclasses.replace(command, runs=runs)
        log = runs[0].log
        began = time.monotonic()
        for run in runs:
            run.path.mkdir(parents=True, exist_ok=True)
        for run in runs[1:]:
            with run.log.open("a") as other:
                other.write(f"trained together with seed {runs[0].seed}, see {log}\n")
        told = functools.partial(started, command.stage.name, log)
        code, offset, stopped = _execute(command.argv, log, environment, cpus, stop, told)
        seconds = (time.monotonic() - began) / len(runs)
        printed = lines(log, offset)
        for run in runs:
            of_run = _outcome(code, stopped, run, command, printed)
            run.write(command.stage, *of_run, seconds)
            status, message = of_run if of_run[0] != DONE or status == DONE else (status, message)
            if of_run[0] == INTERRUPTED:
                return of_run
    return status, message


def _execute(argv, log, environment, cpus, stop, started):
    """A program's exit code, where in the log its output begins, and whether it was stopped."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(argv)}\n".encode())
        output.flush()
        offset = output.tell()
        program = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once.
        )
        if cpus:  # Before it starts a thread. (A preexec_fn would fork a process full of threads.)
            os.sched_setaffinity(program.pid, cpus)
        started(program)
        told = False
        try:
            while program.poll() is None:
                if stop() and not told:
                    program.send_signal(signal.SIGTERM)
                    told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(POLL_SECONDS)
        except BaseException:
            program.kill()
            program.wait()
            raise
    return program.returncode, offset, told


def _outcome(
    code: int, stopped: bool, run: RunPlan, command: Command, printed: list[str]
) -> tuple[str, str]:
    """(status, message) of a run whose program has ended."""
    said = [line.strip().removeprefix("error: ") for line in printed or ["nothing was printed"]]
    line, stage = said[-1], command.stage
    if code == EXIT_CODE or (stopped and code < 0):  # In the second case before it could listen.
        return INTERRUPTED, line
    # Of several runs, a run's own line is one that names it.
    own = said if len(command.runs) > 1 else [line]
    start = f"seed {run.seed}: " if len(command.runs) > 1 else ""
    diverged = [x for x in own if x.startswith(start) and "not finite" in x] if code > 0 else []
    if diverged:
        return DIVERGED, diverged[0]
    if run.complete(stage) and (code == 0 or stage.mode == "train"):  # Beside one that failed.
        return DONE, ""
    if code == 0:
        what = "no checkpoint" if stage.mode == "train" else "not all results"
        return FAILED, f"{what} of step {run.steps}"
    if code < 0:
        return FAILED, f"killed by {signal.Signals(-code).name} after: {line}"
    return FAILED, line


def lines(log: epath.Path, offset: int = 0) -> list[str]:
    """What a program printed, a line each, with the empty ones and progress bars' left out."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [x for x in text.replace("\r", "\n").splitlines() if x.strip()]


def last_line(log: epath.Path) -> str:
    """The last thing that a log says, from its end alone."""
    with contextlib.suppress(OSError):
        found = lines(log, max(0, os.path.getsize(log) - 2000))
        return found[-1].strip() if found else ""
    return ""


@dataclasses.dataclass
class _Slot:
    """A place for one job at a time: its share of the machine, and what it is doing."""

    environment: dict[str, str]
    cpus: Sequence[int]
    job: str = ""
    stage: str = ""
    log: epath.Path | None = None
    began: float = 0.0

    def line(self) -> str:
        """What it is doing."""
        spent = duration(time.monotonic() - self.began)
        doing = last_line(self.log)[:100] if self.log else ""
        return f"  {self.job}  {self.stage}  {spent}  {doing}"


def run_local(jobs: Sequence[Job], num_jobs: int, say: Say) -> dict[str, tuple[str, str]]:
    """Runs jobs on this machine, `num_jobs` at a time; {label: (status, message)}.

    GPUs are dealt out to the jobs, as are CPU cores where there is no GPU. The first signal stops
    the programs, each after a checkpoint.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    slots = [_Slot(*share) for share in shares(num_jobs)]
    ended: dict[str, tuple[str, str]] = {}
    stopping, finished = threading.Event(), queue.SimpleQueue()

    def work(slot: _Slot) -> None:
        while not stopping.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            slot.job, slot.began = job.label, time.monotonic()

            def started(stage: str, log: epath.Path, _: subprocess.Popen) -> None:
                slot.stage, slot.log = stage, log

            try:
                result = perform(job, slot.environment, slot.cpus, stopping.is_set, started)
            except Exception as error:  # A disk that is full must not end the other jobs.
                result = FAILED, f"{type(error).__name__}: {error}"
            finished.put((job.label, result, time.monotonic() - slot.began))
            slot.job, slot.log = "", None

    threads = [threading.Thread(target=work, args=(slot,)) for slot in slots]
    start = time.monotonic()
    display = _Display(len(jobs), start, say)
    with _hang_up_too(), Watch() as watch:
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) or not finished.empty():
                if watch.asked():
                    stopping.set()
                while not finished.empty():
                    label, result, seconds = finished.get()
                    ended[label] = result
                    display.ended(label, result, seconds)
                display.update([slot for slot in slots if slot.job], len(ended))
                time.sleep(POLL_SECONDS)
        finally:  # Whatever happens here, no program is left behind.
            stopping.set()
            for thread in threads:
                thread.join()
    display.close()
    return ended


@contextlib.contextmanager
def _hang_up_too() -> Iterator[None]:
    """A terminal that is closed stops the programs as SIGTERM does, unless nohup forbids it."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    yield
    signal.signal(signal.SIGHUP, before)


def shares(num_jobs: int) -> list[tuple[dict[str, str], Sequence[int]]]:
    """(environment, CPU cores) of each of so many jobs at a time.

    Raises:
      RequestError: fewer GPUs than jobs, or no job at all.
    """
    if num_jobs < 1:
        raise RequestError(f"--jobs={num_jobs}: at least 1")
    environment = dict(os.environ)
    if num_jobs == 1:
        return [(environment, ())]
    gpus = visible_gpus()
    if gpus:
        if len(gpus) < num_jobs:
            raise RequestError(f"--jobs={num_jobs}: there are {len(gpus)} GPUs; a job needs one")
        dealt = [gpus[k::num_jobs] for k in range(num_jobs)]
        return [(environment | {"CUDA_VISIBLE_DEVICES": ",".join(own)}, ()) for own in dealt]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < num_jobs:
        return [(environment, ()) for _ in range(num_jobs)]
    return [(environment, cores[k::num_jobs]) for k in range(num_jobs)]


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that programs would see, found without touching them."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.stdout.split()


class _Display:
    """One line a running job and one of the whole: in place on a terminal, else once a minute."""

    def __init__(self, total: int, start: float, say: Say):
        self._total, self._start, self._say = total, start, say
        self._terminal = sys.stderr.isatty()
        self._shown, self._height = time.monotonic(), 0

    def ended(self, label: str, result: tuple[str, str], seconds: float) -> None:
        """Says how a job ended."""
        self._clear()
        status, message = result
        self._say(f"{label}: {status} after {duration(seconds)}{message and f': {message}'}")

    def update(self, slots: Sequence[_Slot], done: int) -> None:
        """Shows the running jobs."""
        now = time.monotonic()
        if now - self._shown < (1 if self._terminal else PLAIN_SECONDS) or not slots:
            return
        self._shown = now
        spent = now - self._start
        left = f", about {duration(spent / done * (self._total - done))} left" if done else ""
        overview = f"{done} of {self._total} jobs done, {duration(spent)}{left}"
        block = [overview, *(slot.line() for slot in slots)]
        if not self._terminal:
            for line in block:
                self._say(line)
            return
        self._clear()
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        sys.stderr.write("".join(f"{line[: width - 1]}\n" for line in block))
        sys.stderr.flush()
        self._height = len(block)

    def _clear(self) -> None:
        if self._height:
            sys.stderr.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0

    def close(self) -> None:
        """Takes the lines away."""
        self._clear()


def print_commands(jobs: Sequence[Job], say: Say) -> None:
    """A line a job: its commands, to be run in this folder by whatever runs them."""
    for job in jobs:
        say(" && ".join(shlex.join(["python", *command.argv[1:]]) for command in job.commands))
