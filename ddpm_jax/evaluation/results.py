"""`--mode=evaluate`: a run's numbers, each with a manifest, none computed twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.evaluation.requests import Evaluator, result_key
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
      keep_arrays: whether samples, their features and pictures are kept on the disk as well.
    """
    best = f"_{run.rule.replace(' ', '_')}" if run.rule.startswith("best") else ""
    stems = {n: f"step{run.step}_{n}_{result_key(run, a)}" for n, a in evaluator.asked.items()}
    paths = {name: directory.evaluation / f"{stem}{best}.json" for name, stem in stems.items()}
    keeps = keep_arrays or not evaluator.bulky
    beside = evaluator.files(run, directory) if keeps else {}
    there = {
        name: _read(directory.evaluation, stem, evaluator.asked[name].protocol)
        for name, stem in stems.items()
        if name not in beside or beside[name].exists()
    }
    there = {name: there.get(name) for name in stems}
    exists = first_hosts(np.array([measured is not None for measured in there.values()]))
    there = {n: m for (n, m), kept in zip(there.items(), exists, strict=True) if kept}
    if unseen := [paths[name] for name, measured in there.items() if measured is None]:
        raise RequestError(f"{unseen[0]} cannot be read on this host: all need the same disk")
    wanted = [name for name in paths if name not in there]
    subject = {
        "run": directory.path.name,
        "checkpoint": run.step,
        "parameters_crc32": fingerprint(run.params),
        "config": run.config.to_dict(),
    }
    for name, measured in there.items():
        if jax.process_index() == 0 and not paths[name].exists():  # Of another rule.
            kept = Manifest(name, measured, subject, manifest.provenance(0))
            manifest.save(paths[name], kept)
        say(f"{name}: {measured.text()} ({paths[name].name}, measured before)")
    if not wanted:
        return there
    start = time.monotonic()
    found: dict[str, Measured] = {}
    if stop():
        raise Interrupted(f"stopped before {wanted[0]}; the same command goes on")
    where = directory if keeps else None
    for name, measured in evaluator(run.step, run.params, wanted, where, stop):
        found[name] = measured
        if jax.process_index() == 0:
            provenance = manifest.provenance(time.monotonic() - start)
            manifest.save(paths[name], Manifest(name, measured, subject, provenance))
        say(f"{name}: {measured.text()} ({paths[name].name})")
        if stop() and len(found) < len(wanted):
            raise Interrupted(f"stopped after {name}; the same command goes on")
    return there | found


def _read(directory: epath.Path, stem: str, protocol: dict[str, Any]) -> Measured | None:
    """The number kept there, under any rule that chose the checkpoint; None where none is whole."""
    for path in files.matching(directory, f"{stem}*.json"):
        try:
            m = manifest.load(path).measured
            return Measured(m, m.standard_error, m.unit, m.better, protocol, m.estimator, m.details)
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; it is measured again", error)
    return None
