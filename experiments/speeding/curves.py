"""Cost curves: what batch, width, resolution, T, … cost, one at a time."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ddpm_jax.data import ArraySource, Batches
from ddpm_jax.parallel import make_layout
from experiments.common import style, to_png
from experiments.speeding.server import Worker
from experiments.speeding.workloads import NETWORKS, Workload

SECONDS = 3.0  # Of each point.
IMAGES = (1_000, 10_000, 100_000)
DEVICES = (1, 2, 4)
UNIT, UNITS = "s a training step", {"T": "s a chain", "images of the set": "s a batch"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A place on a curve: seconds of a training step, or of a chain for T; bytes held at most."""

    at: float
    seconds: float
    nbytes: int


def _axes(network: str) -> dict[str, list[tuple[float, Workload]]]:
    """Of each curve the places and their work."""
    base = Workload(network, NETWORKS[network][1])
    config = base.config

    def changed(key: str, values: Sequence[int]) -> list[tuple[float, Workload]]:
        return [
            (value, dataclasses.replace(base, overrides=((key, str(value)),))) for value in values
        ]

    batch, width, side = base.batch, config.model.channels, config.data.image_size
    return {
        "images a step": [
            (n, dataclasses.replace(base, batch=n))
            for n in (batch // 4, batch // 2, batch, 2 * batch)
        ],
        "channels": changed("model.channels", (width // 2, width, 2 * width)),
        "pixels a side": changed("data.image_size", (side, 2 * side, 4 * side)),
        # Several are a scan, in which XLA's own weight gradients would be far slower on CPUs.
        "steps a call": changed("train.steps_per_call", (1, 2, 5, 10)),
        "T": changed("diffusion.num_steps", (100, 300, 1000)),
        "virtual devices": [(n, base) for n in DEVICES],
    }


def measure(network: str, say: Callable[[str], None]) -> dict[str, list[dict[str, float]]]:
    """The points of each curve, by its name."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, places in _axes(network).items():
            points = []
            for at, work in places:
                devices = int(at) if name == "virtual devices" else 1
                points.append(_point(name, at, work, devices, pathlib.Path(directory)))
                say(f"{network}, {name} {at:g}: {points[-1].seconds:.4g} s")
            found[name] = [dataclasses.asdict(point) for point in points]
    found["images of the set"] = [dataclasses.asdict(_resident(n)) for n in IMAGES]
    return found


def _point(name: str, at: float, work: Workload, devices: int, cache: pathlib.Path) -> Point:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    warm = Worker("experiments.speeding.ours", [work.to_json()], environment)
    try:  # What the compiler needs is not the program's.
        warm.ask("sample" if name == "T" else "train", steps=int(at) if name == "T" else 1)
    finally:
        warm.close()
    worker = Worker("experiments.speeding.ours", [work.to_json()], environment)
    try:
        if name == "T":
            worker.ask("sample", steps=int(at))
            return Point(at, at * worker.ask("sample", steps=int(at)), worker.ask("memory"))
        first = worker.ask("train", steps=2)
        steps = max(2, round(SECONDS / max(first, 1e-3)))
        return Point(at, worker.ask("train", steps=min(steps, 50)), worker.ask("memory"))
    finally:
        worker.close()


def _resident(count: int) -> Point:
    """A batch of 128 taken from so many images of CIFAR-10's size on the device."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    split = make_layout("jit", jax.devices()[:1]).split(1)
    with Batches(ArraySource("made", "train", images), 0, 128, 1, split, True) as batches:
        jax.block_until_ready(batches(0))
        began, calls = time.perf_counter(), 100
        for step in range(calls):
            jax.block_until_ready(batches(step))
    return Point(count, (time.perf_counter() - began) / calls, images.nbytes)


def span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis: a decade at least, lest noise looks like a cost."""
    low, high = min(values), max(values)
    middle, half = math.sqrt(low * high), math.sqrt(10)
    return min(low / 1.2, middle / half), max(high * 1.2, middle * half)


def figure(network: str, curves: dict[str, list[dict[str, float]]]) -> bytes:
    """The PNG of all curves: seconds, and bytes at the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    picture = Figure(figsize=(20, 8), layout="constrained")
    axes = [picture.add_subplot(2, 4, place + 1) for place in range(len(curves))]
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        at, seconds = ([point[key] for point in points] for key in ("at", "seconds"))
        axis.loglog(at, seconds, "o-", color="tab:blue")
        style(axis, name, UNITS.get(name, UNIT), f"{network}: {name}")
        axis.set_xticks(at, [f"{x:g}" for x in at], minor=False)
        axis.minorticks_off()
        axis.set_ylim(span(seconds))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right = axis.twinx()
        right.plot(at, [point["nbytes"] / 2**30 for point in points], "s--", color="tab:orange")
        right.set_ylabel("GiB", color="tab:orange", fontsize=12)
        right.set_ylim(bottom=0)
    return to_png(picture)
