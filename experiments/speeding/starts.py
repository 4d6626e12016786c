"""From the shell to the first step of a training: the command line itself, on made images."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from experiments.speeding.server import WorkerError
from experiments.speeding.workloads import NETWORKS, Workload

IMAGES = 256
LIMIT = 600.0  # Seconds.


def measure(network: str, on_accelerator: bool, say: Callable[[str], None]) -> dict[str, float]:
    """Seconds until the first line of metrics, with an empty compilation cache and with a full one.

    Raises:
      WorkerError: the training failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        overrides = _images(Workload.of(network, on_accelerator), place / "images")
        found = {}
        for kind in ("cold", "warm"):
            found[kind] = _first_step(network, overrides, place, place / kind)
            say(f"{network}: first step of the command line, {kind}: {found[kind]:.1f} s")
        return found


def _images(workload: Workload, folder: pathlib.Path) -> dict[str, object]:
    """Images of the network's size in a folder, and the overrides by which it trains on them."""
    config = workload.config
    size, draw = config.data.image_size, np.random.default_rng(0)
    overrides = {
        "train.batch_size": workload.batch,
        "train.log_every": config.train.steps_per_call,
        "train.steps": 2 * config.train.steps_per_call,
        "train.checkpoint_every": 2 * config.train.steps_per_call,
        "train.sample_every": 0,
    }
    if config.data.name == "digits":
        return overrides
    folder.mkdir()
    for i in range(IMAGES):
        pixels = draw.integers(0, 256, (size, size, config.data.channels), np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{i:04d}.png")
    return overrides | {"data.name": "folder", "data.data_dir": folder}


def _first_step(
    network: str, overrides: dict[str, object], place: pathlib.Path, workdir: pathlib.Path
) -> float:
    command = [sys.executable, "-m", "ddpm_jax.main", f"--config={NETWORKS[network][0]}"]
    command += [f"--workdir={workdir}", f"--config.data.cache_dir={place / 'data'}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(place / "xla")}
    log = place / "log"
    with log.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        metrics = workdir / "metrics.jsonl"
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
                if process.poll() is not None or time.monotonic() - began > LIMIT:
                    raise WorkerError((log.read_text().strip().splitlines() or ["no word"])[-1])
            seconds = time.monotonic() - began
        finally:
            process.kill()
            process.wait()
    return seconds
