"""A sweep laid out as runs in directories: what is there, what is missing, in which commands."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from ddpm_jax import config as config_lib
from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation.manifest import digest
from ddpm_jax.runs import HARMLESS, RunDirectory
from experiments.sweeping.cells import Cell, Stage, Sweep

DONE, DIVERGED, FAILED, INTERRUPTED = "done", "diverged", "failed", "interrupted"


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A cell at a seed: an ordinary run in `path`."""

    cell: Cell
    seed: int
    path: pathlib.Path
    overrides: Mapping[str, Any]  # All of them: the sweep's, the command line's, the cell's, seed.
    config_file: str
    stages: Sequence[Stage]

    @property
    def label(self) -> str:
        """Its name in progress lines."""
        return f"{self.cell.name}/seed{self.seed}"

    def config(self, stage: Stage) -> ml_collections.ConfigDict:
        """The valid config of a stage.

        Raises:
          RequestError: names the cell.
        """
        try:
            config = config_lib.load_file(self.config_file)
            for key, value in {**self.overrides, **stage.overrides}.items():
                config_lib.override(config, key, value)
            config_lib.validate(config)
        except RequestError as error:
            raise RequestError(f"cell {self.cell.name}: {error}") from error
        return config

    def argv(self, stage: Stage, together: Sequence[int] = ()) -> list[str]:
        """The command of a stage; of all the seeds `together` in one program, if given."""
        overrides = {**self.overrides, **stage.overrides}
        where = str(self.path)
        if together:
            overrides.pop("seed")
            where = str(self.path.parent / "seed{seed}")
        flags = [f"--config={self.config_file}", f"--workdir={where}", f"--mode={stage.mode}"]
        if together:
            flags.append(f"--seeds={','.join(map(str, together))}")
        return [
            *(sys.executable, "-m", "ddpm_jax.main"),
            *flags,
            *(f"--config.{key}={_text(value)}" for key, value in overrides.items()),
        ]

    @property
    def record(self) -> pathlib.Path:
        """The file that says which stages have ended, and how."""
        return self.path / "sweep.json"

    @property
    def log(self) -> pathlib.Path:
        """What the run's programs printed."""
        return self.path / "sweep.log"

    def key(self, stage: Stage) -> str:
        """Of all that the outcome of a stage depends on."""
        config = self.config(stage)
        if stage.mode == "train":  # A run that went on to more steps was another stage.
            free = [key for key in HARMLESS if key != "train.steps"]
            values = {
                key: config_lib.get(config, key)
                for key in config_lib.FIELDS
                if key not in free and key.partition(".")[0] not in free
            }
            return digest(values)
        return digest(stage.mode, config.to_dict())

    def status(self, stage: Stage) -> dict[str, Any] | None:
        """How the stage ended, if it did under this very config and its outcome is there."""
        entry = _read(self.record).get(stage.name)
        if entry is None or entry["key"] != self.key(stage):
            return None
        if stage.mode == "train" and entry["status"] == DONE and not self.trained():
            return None
        return entry

    def trained(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        steps = self.config(self.stages[0]).train.steps
        return (self.path / "checkpoints" / str(steps)).exists()

    def ended(self, stage: Stage) -> bool:
        """Whether there is nothing left to do: done, or diverged, which it would do again."""
        entry = self.status(stage)
        return entry is not None and entry["status"] in (DONE, DIVERGED)

    def missing(self) -> list[Stage]:
        """The stages still to run, in order; none after one that diverged."""
        left = []
        for stage in self.stages:
            entry = self.status(stage)
            if entry is not None and entry["status"] == DIVERGED:
                break
            if entry is None or entry["status"] != DONE:
                left.append(stage)
        return left

    def outcome(self) -> str:
        """The run's state in a word or a line, for the table."""
        for stage in self.stages:
            entry = self.status(stage)
            if entry is None:
                return "missing" if stage is self.stages[0] else f"{stage.name} missing"
            if entry["status"] != DONE:
                return f"{entry['status']}: {entry['message']}"
        return DONE

    def write(self, stage: Stage, status: str, message: str, seconds: float) -> None:
        """Records how a stage ended; seconds add up over its attempts."""
        record = _read(self.record)
        key = self.key(stage)
        before = record.get(stage.name, {})
        spent = before.get("seconds", 0.0) if before.get("key") == key else 0.0
        record[stage.name] = {
            "key": key,
            "status": status,
            "message": message,
            "seconds": round(spent + seconds, 1),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        path = RunDirectory.of(self.path).path / self.record.name
        files.replace(path, json.dumps(record, indent=1))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "()"
    return str(value)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a sweep, those of skipped cells left out."""

    sweep: Sweep
    directory: pathlib.Path
    seeds: Sequence[int]
    runs: Sequence[RunPlan]

    def of(self, cell: Cell) -> list[RunPlan]:
        """A cell's runs, one a seed."""
        return [run for run in self.runs if run.cell.name == cell.name]


def make_plan(
    sweep: Sweep,
    directory: pathlib.Path,
    seeds: Sequence[int],
    overrides: Sequence[tuple[str, str]] = (),
) -> Plan:
    """The runs of a sweep; everything that is wrong with any of them is found here.

    Args:
      directory: of the sweep: a directory a cell, in it one a seed.
      overrides: of every cell, from the command line.
    Raises:
      RequestError: an invalid cell, an override that a cell sets itself, or a directory that holds
        a run of another config.
    """
    common = {**sweep.overrides, **dict(overrides)}
    runs = []
    for cell in sweep.cells:
        own = sorted({*cell.overrides} & {key for key, _ in overrides})
        if own:
            raise RequestError(f"--config.{own[0]}: cell {cell.name} sets that itself")
        if "seed" in {*common, *cell.overrides}:
            raise RequestError("the seed is set by --seeds, not by an override")
        if cell.skip:
            continue
        for seed in seeds:
            path = directory / cell.name / f"seed{seed}"
            values = {**common, **cell.overrides, "seed": seed}
            runs.append(RunPlan(cell, seed, path, values, sweep.config, sweep.stages))
    for run in runs:
        for stage in run.stages:
            config = run.config(stage)
            where = RunDirectory.of(run.path)
            if where.config.exists():
                where.check_resumable(config)
    return Plan(sweep, directory, seeds, runs)


@dataclasses.dataclass(frozen=True)
class Command:
    """A program to run: a stage of one run, or of several that are trained together."""

    stage: Stage
    runs: Sequence[RunPlan]

    @property
    def argv(self) -> list[str]:
        """Its arguments."""
        together = [run.seed for run in self.runs] if len(self.runs) > 1 else ()
        return self.runs[0].argv(self.stage, together)


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that follow each other."""

    label: str
    commands: Sequence[Command]


def make_jobs(plan: Plan, together: bool) -> list[Job]:
    """What is missing, one job a run; or one a cell, whose seeds are then trained together."""
    if not together:
        jobs = [
            Job(run.label, [Command(stage, [run]) for stage in run.missing()]) for run in plan.runs
        ]
        return [job for job in jobs if job.commands]
    jobs = []
    for cell in plan.sweep.cells:
        commands = []
        for stage in plan.sweep.stages:
            left = [run for run in plan.of(cell) if stage in run.missing()]
            if stage.mode == "train" and left:
                commands.append(Command(stage, left))
            else:
                commands += [Command(stage, [run]) for run in left]
        if commands:
            jobs.append(Job(cell.name, commands))
    return jobs
