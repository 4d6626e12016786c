"""Speed: this codebase and its peers, side by side in one run, on this machine.

    python -m experiments.speed
    python -m experiments.speed --only=train,sample --networks=digits --rounds=9
    python -m experiments.speed --only=train --contestants=ours,diffusers --out=runs/speed

`train` and `sample` are seconds a step, `chain` is a whole chain of a batch, `start` the time from
the shell to the first step of a training by the command line, `input` what training waits for its
images, `curves` what batch, width, resolution, T, devices and images cost, `accelerators` what the
paper's runs would take on others, on paper. Contestants run in processes of their
own, in turn (A B C, B C A, …), and are stopped while others are measured; ratios are those of a
round. All of one network must have equal parameters, and equal losses at equal weights and inputs,
but `lucidrains` (denoising-diffusion-pytorch as published), which is another network.
Peers: pip install 'ddpm_jax[benchmark]'.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation.manifest import code_commit
from ddpm_jax.main import Parser, reported
from experiments.speeding import contest, page
from experiments.speeding.contest import DifferentWorkError
from experiments.speeding.server import WorkerError
from experiments.speeding.workloads import NETWORKS, Workload

CONTESTS = ("train", "sample", "chain")
PARTS = (*CONTESTS, "start", "input", "curves", "accelerators")
VARIABLES = ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
CURVES = "digits"  # The network of the cost curves, unless --networks names others alone.


def default_backend() -> str:
    """The platform that JAX would take, without taking it in this process."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.split()[-1]


def hardware() -> dict[str, Any]:
    """The machine's processor, cores and memory (bytes), the variables that matter, our commit."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": code_commit(),
    }


def measure(
    parts: Sequence[str],
    networks: Sequence[str],
    names: Sequence[str],
    rounds: int,
    on_accelerator: bool,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """All that was asked for, as JSON can say it.

    Args:
      keep: called with all that is known so far, when there is more of it.
    Raises:
      DifferentWorkError, WorkerError: see `contest.compete` and `starts.measure`.
    """
    found: dict[str, Any] = {"hardware": hardware(), "networks": {}}
    for network in networks:
        workload = Workload.of(network, on_accelerator)
        asked = [part for part in parts if part in CONTESTS]
        # A chain of the paper's network takes ten minutes and more on CPUs.
        if tuple(parts) == PARTS and network != "digits" and not on_accelerator:
            asked.remove("chain")
            say(f"{network}: a whole chain takes long here; ask for it with --only=chain")
        if not asked:
            continue
        for results, flops in contest.compete(workload, names, asked, rounds, say):
            found["networks"][network] = {
                "batch": workload.batch,
                "samples": workload.samples,
                "flops": flops,
                "contestants": [vars(result) for result in results],
            }
            keep(found)
    if "start" in parts:
        from experiments.speeding import starts

        found["start"] = {
            network: starts.measure(network, on_accelerator, say) for network in networks
        }
        keep(found)
    if "input" in parts:
        from experiments.speeding import inputs

        found["input"] = inputs.measure(say)
        keep(found)
    if "curves" in parts:
        from experiments.speeding import curves

        chosen = CURVES if CURVES in networks else networks[0]
        found["curves"] = {"network": chosen, "points": curves.measure(chosen, say)}
        keep(found)
    if "accelerators" in parts:
        from experiments.speeding import accelerators

        found["accelerators"] = accelerators.measure(say)
        keep(found)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
      RequestError: something that is unknown.
    """
    parser = Parser(
        prog="python -m experiments.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated")
    parser.add_argument("--contestants", default="", help="comma-separated; ours goes first")
    parser.add_argument("--rounds", type=int, default=5, help="of chains a third of them")
    parser.add_argument("--out", default="runs/speed", help="the directory of the results")
    flags = parser.parse_args(argv)
    for name, known in (("only", PARTS), ("networks", tuple(NETWORKS))):
        chosen = [*dict.fromkeys(getattr(flags, name).split(","))]
        setattr(flags, name, chosen)
        if unknown := [one for one in chosen if one not in known]:
            raise RequestError(f"--{name}={unknown[0]}: choose from {', '.join(known)}")
    if flags.rounds < 1:
        raise RequestError(f"--rounds={flags.rounds}: at least 1")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the tables; returns the exit code."""

    def whole() -> int:
        flags = parse(argv)
        # This process shares an accelerator with the contestants, and needs little of it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        on_accelerator = default_backend() != "cpu"
        names = flags.contestants.split(",") if flags.contestants else []
        names = names or contest.contestants(on_accelerator)
        contest.check_names(names)
        directory = epath.Path(flags.out)

        def say(line: str) -> None:
            print(line, flush=True)

        kept = []

        def keep(found: dict[str, Any]) -> None:
            kept.append(True)
            files.replace(directory / "speed.json", json.dumps(found, indent=1) + "\n")
            files.replace(directory / "speed.md", page.tables(found))
            if "curves" in found:
                from experiments.speeding import curves

                picture = curves.figure(found["curves"]["network"], found["curves"]["points"])
                files.replace(directory / "curves.png", picture)

        how = flags.rounds, on_accelerator, say, keep
        try:
            measure(flags.only, flags.networks, names, *how)
        except (DifferentWorkError, WorkerError) as error:
            before = f"; what was measured before is in {directory}" if kept else ""
            print(f"error: {error}{before}", file=sys.stderr)
            return 1
        say(f"\n{files.read_text(directory / 'speed.md')}\nwritten to {directory}")
        return 0

    return reported(whole)


if __name__ == "__main__":
    sys.exit(main())
