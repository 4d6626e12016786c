"""`--mode=evaluate`: a run's numbers, each with a manifest, none computed twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.evaluators import Evaluator, make_evaluators, result_key
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.interruption import Interrupted, Watch
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
    with Watch() as watch:
        for evaluator in make_evaluators(run, say):
            results |= evaluate_and_keep(evaluator, run, directory, say, watch.asked)
    return results


def evaluate_and_keep(
    evaluator: Evaluator,
    run: Run,
    directory: RunDirectory,
    say: Callable[[str], None],
    stop: Callable[[], bool],
    keep_arrays: bool = True,
) -> dict[str, Measured]:
    """One evaluator's results, those that are missing computed and saved.

    Args:
      stop: whether to stop, asked between pieces and results.
      keep_arrays: whether samples, arrays and unfinished pieces are kept on the disk as well.
    """
    paths = {
        name: directory.evaluation / f"step{run.step}_{name}_{result_key(run, asked)}.json"
        for name, asked in evaluator.asked.items()
    }
    there = {name: _read(path) for name, path in paths.items()}
    exists = first_hosts(np.array([measured is not None for measured in there.values()]))
    there = {n: m for (n, m), kept in zip(there.items(), exists, strict=True) if kept}
    wanted = [name for name in paths if name not in there]
    for name, measured in there.items():
        say(f"{name}: {measured.text()} ({paths[name].name}, measured before)")
    if not wanted:
        return there
    subject = {
        "run": directory.path.name,
        "checkpoint": run.step,
        "parameters_crc32": fingerprint(run.params),
        "config": run.config.to_dict(),
    }
    start = time.monotonic()
    found: dict[str, Measured] = {}
    if stop():
        raise Interrupted(f"stopped before {wanted[0]}; the same command goes on")
    where = directory if keep_arrays else None
    for name, measured in evaluator(run.step, run.params, wanted, where, stop):
        found[name] = measured
        if jax.process_index() == 0:
            provenance = manifest.provenance(time.monotonic() - start)
            manifest.save(paths[name], Manifest(name, measured, subject, provenance))
        say(f"{name}: {measured.text()} ({paths[name].name})")
        if stop() and len(found) < len(wanted):
            raise Interrupted(f"stopped after {name}; the same command goes on")
    return there | found


def _read(path: epath.Path) -> Measured | None:
    """The result kept there; None where there is none, or a damaged one."""
    try:
        return manifest.load(path).measured if path.exists() else None
    except ValueError as error:
        logging.getLogger(__name__).warning("%s; it is measured again", error)
        return None
