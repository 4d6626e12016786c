"""A sweep's jobs on a Slurm cluster, through submitit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Watch
from experiments.sweeping.executors import PLAIN_SECONDS, POLL_SECONDS, Say, last_line, perform
from experiments.sweeping.plan import FAILED, Job, read


class SlurmJob:
    """A job as submitit runs it; one that is preempted saves, and is put into the queue again."""

    def __init__(self, job: Job):
        """See `perform`."""
        self.job = job
        self._program: subprocess.Popen | None = None

    def __call__(self) -> tuple[str, str]:
        jax.config.update("jax_platforms", "cpu")  # The programs take the accelerators.

        def started(stage: str, log: epath.Path, program: subprocess.Popen) -> None:
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
    jobs: Sequence[Job], directory: epath.Path, options: dict[str, Any], say: Say
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
    ids = read(known)
    submitted = {}
    for job in jobs:
        before = _unfinished(submitit, folder, ids.get(job.label), cluster)
        submitted[job.label] = before or executor.submit(SlurmJob(job))
        ids[job.label] = submitted[job.label].job_id
        say(f"{job.label}: job {ids[job.label]}{(before and ', submitted before') or ''}")
        files.replace(known, json.dumps(ids))
    ended: dict[str, tuple[str, str]] = {}
    shown = time.monotonic()
    with Watch() as watch:
        while len(ended) < len(submitted) and not watch.asked():
            if time.monotonic() - shown > PLAIN_SECONDS:
                shown = time.monotonic()
                say(f"{len(ended)} of {len(submitted)} jobs ended")
                for job in jobs:
                    if job.label not in ended:
                        state = submitted[job.label].state
                        say(f"  {job.label}  {state}  {last_line(job.commands[0].runs[0].log)}")
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


def _unfinished(submitit: Any, folder: epath.Path, job_id: str | None, cluster: str) -> Any:
    """The job of an earlier call, if Slurm still has it."""
    if job_id is None or cluster != "slurm":
        return None
    job = submitit.SlurmJob(folder, job_id)
    return None if job.done(force_check=True) else job
