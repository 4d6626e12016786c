"""A sweep laid out as runs in directories: what is there, what is missing, in which commands."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from ddpm_jax import bounded, files
from ddpm_jax import config as config_lib
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.evaluation.manifest import Manifest, Measured, digest
from ddpm_jax.evaluation.requests import Asked
from ddpm_jax.runs import HARMLESS, RunDirectory
from ddpm_jax.training.job import make_job, template
from experiments.sweeping.cells import Cell, Stage, Sweep

DONE, DIVERGED, FAILED, INTERRUPTED = "done", "diverged", "failed", "interrupted"


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A cell at a seed: an ordinary run in `path`.

    Attributes:
      overrides: all of them: the sweep's, the command line's, the cell's and the seed.
      configs: the valid config of each stage by its name, as it was when the sweep was planned.
    """

    cell: Cell
    seed: int
    path: epath.Path
    overrides: Mapping[str, Any]
    config_file: str
    stages: Sequence[Stage]
    configs: Mapping[str, ml_collections.ConfigDict]

    @property
    def label(self) -> str:
        """Its name in progress lines."""
        return f"{self.cell.name}/seed{self.seed}"

    def config(self, stage: Stage) -> ml_collections.ConfigDict:
        """The config of a stage."""
        return self.configs[stage.name]

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
    def record(self) -> epath.Path:
        """The file that says which stages have ended, and how."""
        return self.path / "sweep.json"

    @property
    def log(self) -> epath.Path:
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
        """How the stage ended, if it did under this very config and its outcome is there.

        What another program has done without a record (printed commands, say) counts as well.
        """
        entry = read(self.record).get(stage.name)
        if entry is not None and entry["key"] == self.key(stage):
            return None if entry["status"] == DONE and not self.complete(stage) else entry
        there = stage.mode != "sample" and self.complete(stage)
        return {"status": DONE, "message": ""} if there else None

    def complete(self, stage: Stage) -> bool:
        """Whether all that a stage leaves is there; of samples only its record tells."""
        if stage.mode == "train":
            return self.trained()
        return stage.mode == "sample" or {*self.asked(stage)} <= {*self.measured(stage)}

    def trained(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        return (self.path / "checkpoints" / str(self.steps)).exists()

    @property
    def steps(self) -> int:
        """The optimizer steps of its training."""
        return self.config(self.stages[0]).train.steps

    def asked(self, stage: Stage) -> dict[str, Asked]:
        """The results of a stage of evaluation by name, with their protocols.

        Raises:
          RequestError: names the cell: data or weights are missing, or do not fit.
        """
        config = copy.deepcopy(self.config(stage))
        config.seed = 0  # One answer for all seeds.
        try:
            return _asked(config_lib.to_json(config))
        except RequestError as error:
            raise RequestError(f"cell {self.cell.name}: {error}") from error

    def results(self) -> dict[str, Manifest]:
        """The results of all stages by name; of one that several measure, the last stage's."""
        found: dict[str, Manifest] = {}
        for stage in self.stages:
            found |= self.measured(stage) if stage.mode == "evaluate" else {}
        return found

    def measured(self, stage: Stage) -> dict[str, Manifest]:
        """The newest results by name of those measured as a stage says, at the step it means."""
        asked, chosen = self.asked(stage), self.config(stage).evaluation.checkpoint
        found: dict[str, Manifest] = {}
        for path in files.matching(RunDirectory.of(self.path).evaluation, "step*.json"):
            try:
                m = manifest.load(path)
            except ValueError:  # Damaged: the evaluation measures it again.
                continue
            if m.name not in asked or not _alike(m.measured, asked[m.name]):
                continue
            if chosen == "newest" and m.subject["checkpoint"] != self.steps:
                continue
            if m.name not in found or found[m.name].provenance["time"] < m.provenance["time"]:
                found[m.name] = m
        return found

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
        record = read(self.record)
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


@functools.cache
def _asked(config: str) -> dict[str, Asked]:
    job = make_job(config_lib.from_json(config))
    evaluators = make_evaluators(template(job), lambda line: None)
    return {name: asked for e in evaluators for name, asked in e.asked.items()}


def _alike(measured: Measured, asked: Asked) -> bool:
    """Whether a result is the one asked for, whatever its seed and what chose the checkpoint."""
    own = {**measured.protocol, "checkpoint": None}, {**measured.estimator, "seed": None}
    other = {**asked.protocol, "checkpoint": None}, {**asked.estimator, "seed": None}
    return digest(*own) == digest(*other)


def read(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none, or it is damaged."""
    try:
        return bounded.read_json(path)
    except (OSError, ValueError):
        return {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a sweep, those of skipped cells left out."""

    sweep: Sweep
    directory: epath.Path
    seeds: Sequence[int]
    runs: Sequence[RunPlan]

    def of(self, cell: Cell) -> list[RunPlan]:
        """A cell's runs, one a seed."""
        return [run for run in self.runs if run.cell.name == cell.name]


def make_plan(
    sweep: Sweep,
    directory: epath.Path,
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
    for stage in sweep.stages:
        own = sorted({*stage.overrides} & {key for key, _ in overrides})
        if own:
            raise RequestError(f"--config.{own[0]}: stage {stage.name} sets that itself")
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
            configs = {s.name: _config(sweep.config, values, s, cell) for s in sweep.stages}
            runs.append(RunPlan(cell, seed, path, values, sweep.config, sweep.stages, configs))
    for run in runs:
        _check_directory(run)
    return Plan(sweep, directory, seeds, runs)


def _config(
    file: str, overrides: Mapping[str, Any], stage: Stage, cell: Cell
) -> ml_collections.ConfigDict:
    try:
        config = config_lib.load_file(file)
        for key, value in {**overrides, **stage.overrides}.items():
            config_lib.override(config, key, value)
        config_lib.validate(config)
    except RequestError as error:
        raise RequestError(f"cell {cell.name}: {error}") from error
    return config


def _check_directory(run: RunPlan) -> None:
    """Refuses the directory of a run of another config, or of one that has gone further."""
    where = RunDirectory.of(run.path)
    if not where.config.exists():
        return
    for stage in run.stages:
        where.check_resumable(run.config(stage))
    there = where.checkpoints.iterdir() if where.checkpoints.exists() else ()
    steps = [int(path.name) for path in there if path.name.isdigit()]
    if steps and max(steps) > run.steps:
        raise RequestError(
            f"{run.path} has been trained for {max(steps)} steps, more than "
            f"train.steps={run.steps}; choose another --workdir, or as many steps"
        )


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
