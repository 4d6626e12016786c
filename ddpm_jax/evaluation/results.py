"""`--mode=evaluate`: a run's numbers, each with a manifest, none computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.evaluators import Evaluator, make_evaluators
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.parallel import first_hosts
from ddpm_jax.runs import Run, RunDirectory, fingerprint, load


def load_for_evaluation(workdir: str, config: Any) -> Run:
    """The run at the checkpoint, and with the parameters, that `config.evaluation` names.

    Raises:
      RequestError, CheckpointError: see `runs.load`.
    """
    e = config.evaluation
    step = int(e.checkpoint) if e.checkpoint.isdigit() else None
    return load(workdir, step, e.ema, config, best=e.checkpoint == "best")


def evaluate(run: Run, directory: RunDirectory, say: Callable[[str], None]) -> dict[str, Measured]:
    """All that `run.config.evaluation` asks for, from its manifests or measured and kept.

    Raises:
      RequestError: see `evaluators.make_evaluators`.
      Interrupted: by SIGINT or SIGTERM; the same call goes on.
      NonFiniteError: samples that are not numbers.
    """
    results: dict[str, Measured] = {}
    for evaluator in make_evaluators(run, say):
        results |= evaluate_and_keep(evaluator, run, directory, say)
    return results


def evaluate_and_keep(
    evaluator: Evaluator,
    run: Run,
    directory: RunDirectory,
    say: Callable[[str], None],
    stop: Callable[[], bool] | None = None,
    keep_arrays: bool = True,
) -> dict[str, Measured]:
    """One evaluator's results, those that are missing computed and saved.

    Args:
      keep_arrays: whether samples, arrays and unfinished pieces are kept on the disk as well.
    """
    checksum = fingerprint(run.params)
    paths = {
        name: directory.evaluation
        / (
            f"step{run.step}_{name}_"
            f"{manifest.digest(asked.protocol, asked.estimator, checksum)}.json"
        )
        for name, asked in evaluator.asked.items()
    }
    exists = first_hosts(np.array([path.exists() for path in paths.values()]))
    there = {
        name: manifest.load(path).measured
        for (name, path), is_there in zip(paths.items(), exists, strict=True)
        if is_there
    }
    wanted = [name for name in paths if name not in there]
    for name, measured in there.items():
        say(f"{name}: {measured.text()} ({paths[name].name}, measured before)")
    if not wanted:
        return there
    subject = {
        "run": directory.path.name,
        "checkpoint": run.step,
        "parameters_crc32": checksum,
        "config": run.config.to_dict(),
    }
    start = time.monotonic()
    found = {}
    where = directory if keep_arrays else None
    for name, measured in evaluator(run.step, run.params, wanted, where, stop):
        found[name] = measured
        if jax.process_index() == 0:
            provenance = manifest.provenance(time.monotonic() - start)
            manifest.save(paths[name], Manifest(name, measured, subject, provenance))
        say(f"{name}: {measured.text()} ({paths[name].name})")
    return there | found
