"""On paper: what the paper's runs would take on accelerators, from the compiled program's work.

A step takes as long as its FLOPs at the share of the peak that is reached, or as its bytes at the
memory's full rate, whichever is longer; then gradients are averaged around a ring. The bytes are
half of those that the compiler for CPUs counts of the accelerators' program in float32: bfloat16
takes half of the space, and compilers for accelerators fuse more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ddpm_jax import config as config_lib
from ddpm_jax.training.check import lowered_step
from ddpm_jax.training.job import Job, make_job
from experiments.memory import COMPILER
from experiments.speeding.workloads import network_flops

CONFIGS = ("configs/cifar10.py", "configs/celeba_hq.py", "configs/lsun.py:bedroom")
SHARES = (0.25, 0.45)  # Of the peak: what the paper reached on a TPU v3, and what we aim at.


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that train together: dense bfloat16 FLOP/s, bytes/s of memory and of links, a chip.

    From the makers' data sheets; links in one direction.
    """

    name: str
    chips: int
    flops: float
    memory: float
    links: float


SLICES = (
    Slice("TPU v4-8", 4, 275e12, 1.23e12, 150e9),
    Slice("TPU v5e-8", 8, 197e12, 0.82e12, 100e9),
    Slice("TPU v5p-8", 4, 459e12, 2.77e12, 300e9),
    Slice("8 × H100 SXM", 8, 989e12, 3.35e12, 450e9),
)


def step_seconds(flops: float, nbytes: float, parameters: float, on: Slice, share: float) -> float:
    """Seconds a step.

    Args:
      flops, nbytes: of a step, on all chips together.
      parameters: bytes of the gradients, float32.
      share: of the peak that the FLOPs reach.
    """
    compute = flops / (on.chips * on.flops * share)
    memory = nbytes / (on.chips * on.memory)
    ring = 2 * (on.chips - 1) / on.chips * parameters / on.links
    return max(compute, memory) + ring


def step_cost(job: Job) -> dict[str, float]:
    """FLOPs and bytes of a step in float32, by the names of the compiler, that for CPUs."""
    with jax.default_device(jax.devices("cpu")[0]):
        return lowered_step(job).compile(COMPILER).cost_analysis()


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Of each config the work of a step, and the hours of its run on each slice, by the share."""
    found = {}
    for path in CONFIGS:
        config = config_lib.load_file(path)
        config.parallel.remat = False
        job = make_job(config, jax.devices("cpu")[:1])
        nbytes = step_cost(job)["bytes accessed"] / 2
        flops = 3 * network_flops(job)
        parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(job.abstract.params))
        hours = {
            one.name: [
                config.train.steps * step_seconds(flops, nbytes, parameters, one, share) / 3600
                for share in SHARES
            ]
            for one in SLICES
        }
        found[path] = {
            "batch": config.train.batch_size,
            "steps": config.train.steps,
            "flops": flops,
            "bytes": nbytes,
            "hours": hours,
        }
        say(f"{path}: {flops / 1e12:.2f} TFLOP, {nbytes / 2**30:.1f} GiB a step")
    return found
