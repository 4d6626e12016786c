"""What the paper's figures have in common: a run in, files in its figures/ out.

A study NAME leaves figures/NAME.png, NAME.csv and, last, NAME.json: title, protocol and provenance,
and the names of the others. Arrays that took time are kept in evaluation/ and not computed again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import files, parts
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import manifest, requests
from ddpm_jax.evaluation.bound import Bound
from ddpm_jax.evaluation.evaluators import BoundEvaluator
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.evaluation.results import evaluate_and_keep, load_for_evaluation
from ddpm_jax.interruption import Watch
from ddpm_jax.main import Parser, reported, use_compilation_cache
from ddpm_jax.runs import Run, RunDirectory, fingerprint
from ddpm_jax.schedules import Schedule

VERSION = 1  # Raised when the same request would give other numbers.


@dataclasses.dataclass(frozen=True)
class Study:
    """A figure to be made from a run.

    Attributes:
      name: of the experiment and its files.
      run: at the checkpoint and with the parameters that `config.evaluation` names.
      flags: the experiment's own.
      say: prints a line.
    """

    name: str
    run: Run
    directory: RunDirectory
    flags: argparse.Namespace
    say: Callable[[str], None]

    def bound(self, split: str) -> Bound:
        """The bound over a split, that of --mode=evaluate: measured unless it is there.

        Raises:
          RequestError: there is no such split.
          Interrupted: by SIGINT or SIGTERM; the same command goes on.
        """
        evaluator = BoundEvaluator(self.run, split, self.say)
        with Watch() as watch:
            evaluate_and_keep(evaluator, self.run, self.directory, self.say, watch.asked)
        (path,) = evaluator.files(self.run, self.directory).values()
        return Bound(**parts.read(path))

    def arrays(
        self,
        protocol: dict[str, Any],
        count: int,
        batch: int,
        compute: Callable[[int, int], parts.Arrays],
        unit: str = "image",
    ) -> parts.Arrays:
        """`parts.collect` of what depends on the run and on `protocol`, from the disk if there.

        Args:
          protocol: JSON-able: all that the arrays depend on beside the run's parameters, process
            and seed.
        """
        path = self.arrays_path(protocol)
        there = parts.read(path) if path.exists() else None
        if there is not None:
            self.say(f"{path.name}: computed before")
            return there
        keep = {"directory": path.with_suffix(".parts"), "protocol": {"key": path.stem}}
        found = parts.collect(count, batch, compute, unit, self.say, **keep)
        files.replace_with(path, lambda file: np.savez(file, **found))
        keep["directory"].rmtree()
        return found

    def arrays_path(self, protocol: dict[str, Any]) -> epath.Path:
        """Where `arrays` keeps those of a protocol."""
        run = self.run
        of_run = run.config.diffusion.to_dict(), run.config.model.dtype, run.config.seed
        key = manifest.digest(VERSION, self.name, protocol, of_run, fingerprint(run.params))
        return self.directory.evaluation / f"step{run.step}_{self.name}_{key}.npz"

    def save(
        self,
        title: str,
        figure: bytes,
        rows: Sequence[dict[str, Any]],
        protocol: dict[str, Any],
        notes: Sequence[str] = (),
        arrays: epath.Path | None = None,
    ) -> None:
        """Writes the study's files, the JSON last, and says where.

        Args:
          figure: a PNG.
          rows: of the table, alike in their keys; values are text, numbers or None.
          protocol: JSON-able: what was measured, on what, how.
          notes: sentences to stand below the figure: what is seen, in which units.
          arrays: those behind the figure, of `arrays`.
        """
        names = {"figure": f"{self.name}.png", "table": f"{self.name}.csv"}
        content = {
            "name": self.name,
            "title": title,
            "notes": list(notes),
            **names,
            "arrays": arrays and arrays.name,
            "protocol": protocol,
            "subject": {
                "run": self.directory.path.name,
                "checkpoint": self.run.step,
                "parameters": self.run.kind,
                "parameters_crc32": fingerprint(self.run.params),
                "config": self.run.config.to_dict(),
            },
            "provenance": manifest.provenance(),
        }
        where = self.directory.figures
        files.replace(where / names["figure"], figure)
        files.replace(where / names["table"], to_csv(rows))
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        files.replace(where / f"{self.name}.json", text)
        self.say(f"{title}: {where / names['figure']}, and the numbers in {names['table']}")
        for note in notes:
            self.say(f"  {note}")


def add_split(parser: argparse.ArgumentParser) -> None:
    """Adds --split."""
    parser.add_argument("--split", help="of the data; the first of evaluation.split unless given")


def open_split(study: Study) -> Source:
    """The split of --split, or the first that the config evaluates.

    Raises:
      RequestError: it cannot be opened; names the flag or the key that asked for it.
    """
    config, flag = study.run.config, getattr(study.flags, "split", None)
    split = flag or (*config.evaluation.split, "test")[0]
    try:
        return requests.open_split(config, split, "evaluation.split")
    except RequestError as error:
        if not flag:
            raise
        where = str(error).replace("config.evaluation.split=", "--split=")
        raise RequestError(where) from error


def over_images(values: np.ndarray) -> Measured:
    """The mean of bits/dim [n], with its standard error where there are several."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Measured(float(values.mean()), error, "bits/dim")


def chain_indices(schedule: Schedule, times: str, flag: str) -> list[int]:
    """The indices of a chain at which the network is told these times, from the largest down.

    Args:
      schedule: the chain, respaced or not.
      times: of the trained chain, separated by commas; "" for T, 3T/4, T/2 and T/4, or what a
        respaced chain has instead.
      flag: the one that gave them.
    Raises:
      RequestError: no integers, outside 1..T, or the chain passes one by.
    """
    known = np.asarray(schedule.timesteps)[1:]
    steps = len(known)
    if not times:
        return sorted({max(1, round(steps * k / 4)) for k in (1, 2, 3, 4)}, reverse=True)
    try:
        wanted = {int(word) for word in times.split(",")}
    except ValueError:
        raise RequestError(f"{flag}={times}: expected integers such as {known[-1]},1") from None
    for t in sorted(wanted):
        if not 1 <= t <= known[-1]:
            raise RequestError(f"{flag}: t={t} does not lie in 1..{known[-1]}")
        if t not in known:
            near = known[np.abs(known - t).argmin()]
            raise RequestError(
                f"{flag}: the chain of {steps} steps does not stop at t={t}, the nearest is {near}"
            )
    return [int(np.searchsorted(known, t)) + 1 for t in sorted(wanted, reverse=True)]


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with a header; floats keep six digits, None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def has_paper_s_chain(config: Mapping[str, Any]) -> bool:
    """Whether a run's T and β_t are the paper's (§4)."""
    chain, theirs = config["diffusion"], config_lib.default_config().diffusion
    keys = ("num_steps", "schedule", "beta_start", "beta_end")
    return all(chain[key] == theirs[key] for key in keys)


def style(axis: Any, x: str, y: str, title: str) -> None:
    """Labels a panel in letters of a readable size."""
    axis.set_xlabel(x, fontsize=13)
    axis.set_ylabel(y, fontsize=13)
    axis.set_title(title, fontsize=14)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)


def to_png(figure: Any) -> bytes:
    """The PNG of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def main(
    name: str,
    doc: str,
    work: Callable[[Study], None],
    argv: Sequence[str] | None = None,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """An experiment's command line; returns the exit code, see `ddpm_jax.main`.

    Args:
      doc: the experiment's module docstring.
      work: makes the figure.
      add_flags: adds the experiment's own flags.
    """

    def whole() -> int:
        parser = Parser(
            prog=f"python -m experiments.{name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog="any key of the run's config can be overridden by --config.KEY=VALUE",
        )
        parser.add_argument("--run", required=True, help="the directory of a run")
        if add_flags:
            add_flags(parser)
        flags, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        directory = RunDirectory.of(flags.run)
        config = directory.load_config()
        for key, value in config_lib.parse_overrides(rest):
            config_lib.override(config, key, value)
        config_lib.validate(config)
        if jax.process_count() > 1:
            raise RequestError(f"experiments.{name} runs on one host")
        use_compilation_cache()
        run = load_for_evaluation(flags.run, config)
        work(Study(name, run, directory, flags, lambda line: print(line, flush=True)))
        return 0

    return reported(whole)
