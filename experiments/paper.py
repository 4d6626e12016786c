"""From nothing to a trained model, its numbers, every figure of the paper, and the report.

    python -m experiments.paper --config=configs/digits.py --workdir=runs/digits

Trains (or goes on, or finds it done), evaluates, makes each figure of FIGURES and writes
WORKDIR/report.html. The same command goes on where it was stopped; nothing is computed twice. A
figure that the run's data cannot give is named and left out. --config.KEY=VALUE as for
ddpm_jax.main; --only=NAME,NAME makes some of the figures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence

import ml_collections

from ddpm_jax import config as config_lib
from ddpm_jax import main as program
from ddpm_jax.config import RequestError
from ddpm_jax.data import open_source
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.interruption import EXIT_CODE, Interrupted
from ddpm_jax.main import Parser, reported, use_compilation_cache
from ddpm_jax.progress import duration
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.job import make_job, template
from experiments.reporting.page import plotly_js

# In the paper's order.
FIGURES = (
    "sample_quality",
    "progressive_coding",
    "progressive_generation",
    "interpolation",
    "nearest_neighbors",
    "fixed_variance_cost",
    "autoregressive",
)


def steps_of(
    config: str, workdir: str, overrides: Sequence[str], figures: Sequence[str]
) -> dict[str, tuple[Callable[[Sequence[str]], int], list[str]]]:
    """{name: (main, arguments)} of what the command does, in order."""
    run = [f"--config={config}", f"--workdir={workdir}", *overrides]
    steps = {
        "train": (program.main, [*run, "--mode=train"]),
        "evaluate": (program.main, [*run, "--mode=evaluate"]),
    }
    for name in figures:
        module = importlib.import_module(f"experiments.{name}")
        steps[name] = module.main, [f"--run={workdir}", *overrides]
    report = importlib.import_module("experiments.report")
    return steps | {"report": (report.main, [f"--run={workdir}"])}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The flags, the overrides as they stand, and the figures wanted.

    Raises:
      RequestError: an unknown flag or figure.
    """
    parser = Parser(
        prog="python -m experiments.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="a file of configs/, variants after a colon"
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--only", help="some of the figures, comma-separated")
    flags, rest = parser.parse_known_args(argv)
    wanted = flags.only.split(",") if flags.only else list(FIGURES)
    unknown = [name for name in wanted if name not in FIGURES]
    if unknown:
        raise RequestError(f"--only={unknown[0]}: choose from {', '.join(FIGURES)}")
    return flags, rest, wanted


def check(config: ml_collections.ConfigDict) -> None:
    """Opens what training and evaluation need, so that what is missing is said before hours pass.

    Raises:
      RequestError: data, weights or devices do not fit, or plotly is missing.
    """
    plotly_js()
    job = make_job(config)
    open_source(config, batch_size=config.train.batch_size)
    make_evaluators(template(job), lambda line: None)


def main(argv: Sequence[str] | None = None) -> int:
    """Does all of it; returns the exit code: 1 where a figure is missing."""
    return reported(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    flags, overrides, wanted = parse(argv)
    config = program.resolve(flags, config_lib.parse_overrides(overrides))
    use_compilation_cache()
    check(config)
    directory = RunDirectory.of(flags.workdir)
    steps = steps_of(flags.config, flags.workdir, overrides, wanted)
    last = directory.checkpoints / str(config.train.steps)
    if last.exists() and (directory.figures / "training.png").exists():
        directory.check_resumable(config)
        steps.pop("train")
    left_out, start = [], time.monotonic()
    for name, (step, arguments) in steps.items():
        began = time.monotonic()
        print(f"\n── {name}", flush=True)
        code = step(arguments)
        if code == EXIT_CODE:
            raise Interrupted("the same command goes on")
        if code and name in ("train", "evaluate"):
            return code
        if code:
            left_out.append(name)
        print(f"   {duration(time.monotonic() - began)}", flush=True)
    made = "nothing to look at" if "report" in left_out else directory.path / "report.html"
    print(f"\n{made}, after {duration(time.monotonic() - start)}")
    if left_out:
        print(f"left out, see above: {', '.join(left_out)}", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
