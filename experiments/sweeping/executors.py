"""Where a sweep's programs run: here, as Slurm jobs, or where their printed commands are taken."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import EXIT_CODE, Watch
from ddpm_jax.progress import duration
from experiments.sweeping.cells import Stage
from experiments.sweeping.plan import DIVERGED, DONE, FAILED, INTERRUPTED, Job, RunPlan

Say = Callable[[str], None]
POLL_SECONDS = 0.2
PLAIN_SECONDS = 60  # Between overviews where there is no terminal.


def perform(
    job: Job,
    environment: dict[str, str] | None = None,
    cpus: Sequence[int] = (),
    stop: Callable[[], bool] = lambda: False,
    started: Callable[[str, pathlib.Path, subprocess.Popen], None] = lambda *_: None,
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
        # Without those that diverged since.
        runs = [run for run in command.runs if command.stage in run.missing()]
        if not runs:
            continue
        command = dataclasses.replace(command, runs=runs)
        log = runs[0].log
        began = time.monotonic()
        for run in runs:
            run.path.mkdir(parents=True, exist_ok=True)
        told = functools.partial(started, command.stage.name, log)
        code, offset = _execute(command.argv, log, environment, cpus, stop, told)
        seconds = (time.monotonic() - began) / len(runs)
        printed = lines(log, offset)
        for run in runs:
            of_run = _outcome(code, run, command.stage, printed)
            run.write(command.stage, *of_run, seconds)
            status, message = of_run if of_run[0] != DONE or status == DONE else (status, message)
        if code == EXIT_CODE or all(r.status(command.stage)["status"] != DONE for r in runs):
            break
    return status, message


def _execute(argv, log, environment, cpus, stop, started):
    """The exit code of a program, and where in the log its output begins."""
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
    return program.returncode, offset


def _outcome(code: int, run: RunPlan, stage: Stage, printed: list[str]) -> tuple[str, str]:
    """(status, message) of a run whose program has ended."""
    if code == 0 or (stage.mode == "train" and run.trained()):  # Beside a seed that failed.
        return DONE, ""
    own = [line for line in printed if f"seed {run.seed}:" in line]
    line = (own or printed or ["nothing was printed"])[-1].strip().removeprefix("error: ")
    if code == EXIT_CODE:
        return INTERRUPTED, line
    return (DIVERGED if "not finite" in line else FAILED), line


def lines(log: pathlib.Path, offset: int = 0) -> list[str]:
    """What a program printed, a line each, with the empty ones and progress bars' left out."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [x for x in text.replace("\r", "\n").splitlines() if x.strip()]


def last_line(log: pathlib.Path) -> str:
    """The last thing that a log says, from its end alone."""
    with contextlib.suppress(OSError):
        found = lines(log, max(0, log.stat().st_size - 2000))
        return found[-1].strip() if found else ""
    return ""


@dataclasses.dataclass
class _Slot:
    """A place for one job at a time: its share of the machine, and what it is doing."""

    environment: dict[str, str]
    cpus: Sequence[int]
    job: str = ""
    stage: str = ""
    log: pathlib.Path | None = None
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

            def started(stage: str, log: pathlib.Path, _: subprocess.Popen) -> None:
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
    with Watch() as watch:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not finished.empty():
            if watch.asked():
                stopping.set()
            while not finished.empty():
                label, result, seconds = finished.get()
                ended[label] = result
                display.ended(label, result, seconds)
            display.update([slot for slot in slots if slot.job], len(ended))
            time.sleep(POLL_SECONDS)
    display.close()
    return ended


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
            text=True,
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


class SlurmJob:
    """A job as submitit runs it; one that is preempted saves, and is put into the queue again."""

    def __init__(self, job: Job):
        """See `perform`."""
        self.job = job
        self._program: subprocess.Popen | None = None

    def __call__(self) -> tuple[str, str]:
        def started(stage: str, log: pathlib.Path, program: subprocess.Popen) -> None:
            self._program = program

        return perform(self.job, started=started)

    def checkpoint(self) -> Any:
        """What submitit asks for, in a signal's handler, before the time is over."""
        import submitit

        if self._program is not None:
            self._program.send_signal(signal.SIGTERM)
            # Without reaping it: the interrupted `perform` may be about to.
            os.waitid(os.P_PID, self._program.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmJob(self.job))


def run_slurm(
    jobs: Sequence[Job], directory: pathlib.Path, options: dict[str, Any], say: Say
) -> dict[str, tuple[str, str]]:
    """Submits jobs through submitit and waits for them; {label: (status, message)}.

    A job that an earlier call submitted and that has not ended is waited for, not submitted again.
    A signal ends the waiting, not the jobs.

    Args:
      directory: of the sweep; submitit's files go into its slurm/.
      options: of submitit's `update_parameters`, e.g. timeout_min, slurm_partition; "cluster"
        chooses another than Slurm: "local" runs the jobs here.
    Raises:
      RequestError: submitit is missing, or refuses an option.
    """
    try:
        import submitit
    except ImportError:
        raise RequestError("--executor=slurm needs submitit; pip install -e '.[slurm]'") from None
    options = dict(options)
    cluster, folder = options.pop("cluster", "slurm"), directory / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name=directory.name, **options)
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        raise RequestError(f"submitit: {' '.join(str(error).split())}") from error
    known = folder / "jobs.json"
    ids = json.loads(known.read_text()) if known.exists() else {}
    submitted = {}
    for job in jobs:
        before = _unfinished(submitit, folder, ids.get(job.label), cluster)
        submitted[job.label] = before or executor.submit(SlurmJob(job))
        ids[job.label] = submitted[job.label].job_id
        say(f"{job.label}: job {ids[job.label]}{(before and ', submitted before') or ''}")
        files.replace(epath.Path(known), json.dumps(ids))
    ended: dict[str, tuple[str, str]] = {}
    with Watch() as watch:
        while len(ended) < len(submitted) and not watch.asked():
            for label, job in submitted.items():
                if label in ended or not job.done():
                    continue
                try:
                    ended[label] = job.result()
                except Exception as error:  # Of whatever happened to the job.
                    ended[label] = FAILED, _reason(error)
                say(f"{label}: {' '.join(filter(None, ended[label]))}")
            time.sleep(POLL_SECONDS)
    if len(ended) < len(submitted):
        say(f"{len(submitted) - len(ended)} jobs go on; the same command waits for them")
    return ended


def _reason(error: Exception) -> str:
    """The last line of submitit's account that is not the path of a log."""
    told = [line.strip() for line in str(error).splitlines()]
    return next((x for x in reversed(told) if x and not x.startswith(("-", "You"))), repr(error))


def _unfinished(submitit: Any, folder: pathlib.Path, job_id: str | None, cluster: str) -> Any:
    """The job of an earlier call, if Slurm still has it."""
    if job_id is None or cluster != "slurm":
        return None
    job = submitit.SlurmJob(folder, job_id)
    return None if job.done(force_check=True) else job
