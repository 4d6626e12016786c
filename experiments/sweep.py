"""Many runs from one file, and the table that they make.

    python -m experiments.sweep --sweep=experiments/sweeps/table2.py --workdir=runs/table2 \\
        --seeds=3 --jobs=2 [--mode=check]
    python -m experiments.sweep --sweep=SWEEP.py:VARIANT --workdir=DIR --executor=slurm \\
        --slurm.slurm_partition=gpu --slurm.gpus_per_node=1 --slurm.timeout_min=1440

Each cell of the sweep is an ordinary run of ddpm_jax.main at each seed, in DIR/CELL/seedK. The same
command again starts what is missing and resumes what was interrupted; a run that failed is tried
again, one whose loss was no longer finite is not. DIR then has results.csv (a line a run),
results.md (mean ± standard deviation over the seeds) and results.png; --mode=table makes these of
what is there. --executor=print lists the commands that are missing.
Exit codes: as of ddpm_jax.main; 1 where a run failed or diverged.
"""

from __future__ import annotations

import argparse
import fcntl
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Interrupted
from ddpm_jax.main import Parser, reported, use_compilation_cache
from ddpm_jax.progress import duration
from ddpm_jax.runs import RunDirectory
from experiments.sweeping import check, executors, slurm, table
from experiments.sweeping.cells import load_sweep
from experiments.sweeping.plan import DIVERGED, DONE, INTERRUPTED, Job, Plan, make_jobs, make_plan

MODES = ("run", "check", "table")
EXECUTORS = ("local", "slurm", "print")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]], dict[str, Any]]:
    """The flags, the overrides of every cell, and submitit's options.

    Raises:
      RequestError: an unknown flag, or a value that is none.
    """
    parser = Parser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides a key in every cell; --slurm.OPTION=VALUE goes to "
        "submitit's update_parameters (--slurm.cluster=local tries it without Slurm).",
    )
    parser.add_argument(
        "--sweep", required=True, help="a sweep's file, with a variant after a colon"
    )
    parser.add_argument("--workdir", required=True, help="the sweep's directory")
    parser.add_argument("--mode", default="run", choices=MODES)
    parser.add_argument("--executor", default="local", choices=EXECUTORS)
    parser.add_argument("--jobs", type=int, default=1, help="with local: how many at a time")
    parser.add_argument("--seeds", default="1", help="how many (0, 1, …), or a list such as 0,7")
    parser.add_argument(
        "--together", action="store_true", help="train the seeds of a cell in one program"
    )
    flags, rest = parser.parse_known_args(argv)
    options = {}
    for argument in [x for x in rest if x.startswith("--slurm.")]:
        rest.remove(argument)
        key, equals, value = argument.removeprefix("--slurm.").partition("=")
        if not equals:
            raise RequestError(f"{argument}: write --slurm.OPTION=VALUE")
        options[key] = int(value) if value.isdigit() else value
    if options and flags.executor != "slurm":
        raise RequestError("--slurm.… belongs to --executor=slurm")
    return flags, config_lib.parse_overrides(rest), options


def seeds_of(text: str) -> list[int]:
    """3 -> [0, 1, 2]; "0,7" -> [0, 7].

    Raises:
      RequestError: neither.
    """
    try:
        seeds = [int(word) for word in text.split(",")] if "," in text else list(range(int(text)))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len({*seeds}) < len(seeds):
        raise RequestError(f"--seeds={text}: how many, e.g. 3, or different ones, e.g. 0,7")
    return seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Plans, checks and runs a sweep; returns the exit code."""
    return reported(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    flags, overrides, options = parse(argv)
    sweep = load_sweep(flags.sweep)
    directory = RunDirectory.of(flags.workdir).path
    if str(directory).startswith("gs://") and flags.executor != "print":
        raise RequestError(f"--workdir={directory}: on gs:// only --executor=print")
    if flags.mode == "check":
        check.take_share(flags.jobs)
        use_compilation_cache()
    else:  # The programs take the accelerators; this process only looks after them.
        jax.config.update("jax_platforms", "cpu")
    plan = make_plan(sweep, directory, seeds_of(flags.seeds), overrides)
    if flags.together:
        _check_together(plan)
    if flags.mode == "check":
        check.report(plan, flags.jobs, flags.together, _say)
        return 0
    command = shlex.join(["python", "-m", "experiments.sweep", *argv])
    if flags.mode == "table":
        table.write(plan, command.replace(" --mode=table", ""), _say)
        return 0
    check.open_data(plan)
    jobs = make_jobs(plan, flags.together)
    if flags.executor == "print":
        executors.print_commands(jobs, _say)
        return 0
    _say(_overview(plan, len(jobs)))
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "sweep.lock").open("w") as lock:
        _take(lock, directory)
        return _carry_out(plan, jobs, flags, options, command)


def _check_together(plan: Plan) -> None:
    """Refuses seeds to be trained together in another mode than jit.

    Raises:
      RequestError: names the cell.
    """
    for run in plan.runs:
        mode = run.config(run.stages[0]).parallel.mode
        if mode != "jit":
            raise RequestError(
                f"cell {run.cell.name}: config.parallel.mode={mode}: --together needs jit; "
                "set that, or leave out --together"
            )


def _take(lock: Any, directory: epath.Path) -> None:
    """Holds the sweep's lock until this process ends.

    Raises:
      RequestError: another process has it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RequestError(
            f"--workdir={directory}: another sweep is at work there; wait for it, or stop it"
        ) from None


def _carry_out(
    plan: Plan,
    jobs: Sequence[Job],
    flags: argparse.Namespace,
    options: dict[str, Any],
    command: str,
) -> int:
    directory = plan.directory
    start = time.monotonic()
    if flags.executor == "slurm":
        ended = slurm.run_slurm(jobs, directory, options, _say)
    else:
        ended = executors.run_local(jobs, flags.jobs, _say)
    bad = {label: end for label, end in ended.items() if end[0] not in (DONE, INTERRUPTED)}
    if any(status == INTERRUPTED for status, _ in ended.values()) or len(ended) < len(jobs):
        raise Interrupted(f"{directory}: stopped; the same command goes on")
    _say(f"{len(ended)} jobs in {duration(time.monotonic() - start)}")
    for label, (status, message) in bad.items():
        print(f"{label}: {status}: {message}", file=sys.stderr)
    if any(run.results() for run in plan.runs):
        table.write(plan, command, _say)
    return 0 if all(run.outcome() == DONE for run in plan.runs) else 1


def _overview(plan: Plan, jobs: int) -> str:
    diverged = sum(run.outcome().startswith(DIVERGED) for run in plan.runs)
    done = sum(run.outcome() == DONE for run in plan.runs)
    line = f"{plan.sweep.title}: {len(plan.runs)} runs, {done} done"
    line += f", {diverged} diverged" if diverged else ""
    return f"{line}; {jobs} jobs to do in {plan.directory}"


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
