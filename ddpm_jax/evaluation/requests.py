"""What is asked of an evaluator, and what an answer depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import ml_collections
import numpy as np
from etils import epath

from ddpm_jax.config import RequestError
from ddpm_jax.data import Source, open_source
from ddpm_jax.evaluation import names, reference
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.runs import Run, RunDirectory, fingerprint

VERSION = 1  # Raised when the same request of the same parameters would give another number.


@dataclasses.dataclass(frozen=True)
class Asked:
    """A result to come. See `manifest` for protocol and estimator."""

    kind: names.Kind
    protocol: dict[str, Any]
    estimator: dict[str, Any]

    def measured(self, value: float, error: float | None, details: dict[str, Any]) -> Measured:
        """The result, once there is one."""
        kind = self.kind
        return Measured(
            value, error, kind.unit, kind.better, self.protocol, self.estimator, details
        )


class Evaluator(Protocol):
    """Called with (step, parameters), it yields (name, number).

    asked: the results by name. bulky: whether what it keeps is as large as images are.
    """

    asked: dict[str, Asked]
    bulky: bool

    def files(self, run: Run, directory: RunDirectory) -> dict[str, epath.Path]:
        """The file that belongs to a result, by the result's name, where one does."""

    def __call__(
        self,
        step: int,
        params: Any,
        wanted: Iterable[str] | None = None,
        directory: RunDirectory | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[str, Measured]]:
        """Evaluates the parameters of a step.

        Args:
          wanted: names out of `asked`; all of them, unless given.
          directory: where samples, arrays, pictures and unfinished pieces are kept; None: nowhere.
          stop: see `parts.collect`.
        """


def result_key(run: Run, asked: Asked) -> str:
    """Eight digits in the files of a result: of all that the number depends on.

    What chose the checkpoint is not among it.
    """
    protocol = {key: value for key, value in asked.protocol.items() if key != "checkpoint"}
    process = run.config.diffusion.to_dict()
    return digest(VERSION, protocol, asked.estimator, process, fingerprint(run.params))


def model_protocol(run: Run) -> dict[str, Any]:
    """Which parameters of a run are evaluated."""
    return {
        "parameters": run.kind,
        "checkpoint": run.rule if run.rule.startswith("best") else "given",
        "dtype": run.config.model.dtype,
    }


def chain(steps: int, num_steps: int) -> int | str:
    """All of a chain, however long, is comparable with all of another."""
    return steps if 0 < steps < num_steps else "all"


def open_split(config: ml_collections.ConfigDict, split: str, key: str) -> Source:
    """The split, which the config names at `key`."""
    try:
        return open_source(config, split)
    except RequestError as error:
        where = str(error).replace("config.data.split=", f"config.{key}=")
        raise RequestError(where) from error


def positions(source: Source, count: int, key: str) -> np.ndarray:
    """The images of a split that are used: `count`, spread evenly, or all; named at `key`."""
    try:
        return reference.evenly(len(source), count)
    except ValueError:
        raise RequestError(
            f"config.{key}={count}: split {source.split} of {source.name} has only "
            f"{len(source)} images; set that or 0, for all of them"
        ) from None
