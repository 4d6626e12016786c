"""The memory of a device in training, for each shipped config in each mode, as a Markdown table.

    python -m experiments.memory
    python -m experiments.memory --devices=64 --configs=configs/lsun.py:cat --out=memory.md

No such devices and no data are needed: the step is compiled for virtual CPU devices, and not run.
The state's parts are counted as they lie, and the step overwrites them; `other` is what the program
takes beside its arguments: activations, gradients and, under fsdp, parameters gathered. Compilers
for accelerators fuse more and lay arrays out otherwise: take `other` for what a choice saves, not
for what a GPU or TPU will say.

Configs that recompute activations on the way back (parallel.remat) are shown without it, too.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.training.check import Memory, memory
from ddpm_jax.training.job import make_job

# LSUN's other sets have the network and the batch of CelebA-HQ.
CONFIGS = ("digits", "cifar10", "folder", "celeba_hq", "lsun:bedroom_large")
MODES = ("jit", "pmap", "fsdp")
HEAD = (
    "| config | mode | remat | images | parameters | average | optimizer | other | total |",
    "|---|---|---|---|---|---|---|---|---|",
)
COMPILER = {
    # Those for CPUs drop the barriers behind which activations are computed again, and do it early;
    # pmap's programs know nothing of `network_jit`.
    "xla_disable_hlo_passes": "cse_barrier_expander",
    # The memory is the same without the optimisations that take the compiler's time.
    "xla_backend_optimization_level": 0,
}


def variants(config: ml_collections.ConfigDict) -> Iterator[ml_collections.ConfigDict]:
    """The config in each mode, and without rematerialisation where it has it."""
    for remat in (False, True) if config.parallel.remat else (False,):
        for mode in MODES:
            one = copy.deepcopy(config)
            one.parallel.update(mode=mode, remat=remat)
            yield one


def row(name: str, config: ml_collections.ConfigDict, devices: int, needs: Memory) -> str:
    """A line of the table, in MiB."""
    sizes = (needs.params, needs.ema_params, needs.optimizer, needs.temporary, needs.total)
    parallel = config.parallel
    cells = [
        name,
        parallel.mode,
        "yes" if parallel.remat else "no",
        f"{config.train.batch_size // devices}",
        *(f"{size / 2**20:,.1f}" for size in sizes),
    ]
    return f"| {' | '.join(cells)} |"


def table(names: Sequence[str], devices: Sequence[jax.Device], say: Callable[[str], None]) -> str:
    """The Markdown table of configs, named by file or as in configs/.

    Raises:
      RequestError: no such config, or its batch does not divide over the devices.
    """
    configs = {}
    for name in names:
        path = name if ".py" in name else f"configs/{name.replace(':', '.py:', 1)}"
        path = path if ".py" in path else f"{path}.py"
        configs[name] = config_lib.load_file(path)
    jobs = [(name, make_job(one, devices)) for name in names for one in variants(configs[name])]
    lines = list(HEAD)
    for name, job in jobs:
        start = time.monotonic()
        lines.append(row(name, job.config, len(devices), memory(job, COMPILER)))
        say(f"{lines[-1]} compiled in {time.monotonic() - start:.0f} s")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8, help="how many, virtual ones")
    parser.add_argument(
        "--configs",
        default=",".join(CONFIGS),
        help="files of configs/, or their names, comma-separated",
    )
    parser.add_argument("--out", help="the table's file")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    try:
        text = table(args.configs.split(","), jax.devices(), print)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nImages and MiB a device, on {args.devices} devices:\n\n{text}")
    if args.out:
        files.replace(epath.Path(args.out).expanduser(), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
