"""What training waits for its images, beside a step that is as long as an accelerator's."""

from __future__ import annotations

import importlib.resources
import io
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.data import Batches, nbytes, open_source
from ddpm_jax.data.records import RecordSource
from ddpm_jax.parallel import make_layout

STEP_SECONDS = 0.05
STEPS, WARM_UP = 100, 10
# Name → (config, side, encoding, images): sets of TFDS as they come, and the digits as they are.
SETS = {
    "digits": ("configs/digits.py", 8, None, 0),
    "cifar10": ("configs/cifar10.py", 32, "PNG", 5000),
    "256×256 JPEG": ("configs/celeba_hq.py", 256, "JPEG", 1000),
    "256×256 PNG": ("configs/celeba_hq.py", 256, "PNG", 1000),
    "256×256 PNG, kept": ("configs/celeba_hq.py", 256, "PNG", 1000),
}


def measure(say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Of each set the share of a step of STEP_SECONDS that is spent waiting; with its batch."""
    found = {}
    for name, (path, side, encoding, count) in SETS.items():
        config = config_lib.load_file(path)
        with tempfile.TemporaryDirectory() as directory:
            config.data.cache_dir = f"{directory}/cache"
            if encoding:
                _prepare(pathlib.Path(directory), side, encoding, count)
                config.data.update(name="made", data_dir=directory, split="train")
                if side == 256:  # The set itself is 30 times as large, and does not fit.
                    config.data.resident_bytes = 0
                if not name.endswith("kept"):  # Such as LSUN's, too many to be kept decoded.
                    config.data.cache_bytes = 0
            found[name] = {"batch": config.train.batch_size} | _waits(config)
        share = found[name]["waiting"]
        say(f"{name}: waits for images {share:.2%} of a step of {STEP_SECONDS * 1000:.0f} ms")
    return found


def _waits(config: Any) -> dict[str, Any]:
    source = open_source(config)
    resident = nbytes(source) <= config.data.resident_bytes
    layout = make_layout("jit", jax.devices()[:1])
    batches = Batches(source, 0, config.train.batch_size, 1, layout.split(1), resident)
    waited = 0.0
    with batches:
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                waited = 0.0
            began = time.perf_counter()
            images = batches(step)
            # Whoever blocks hands Python's lock over, and may wait for that, not for images.
            if not images.is_ready():
                images.block_until_ready()
            waited += time.perf_counter() - began
            time.sleep(STEP_SECONDS)
            del images  # As long as the step has them; to give them back is not to wait.
    kept = "decoded when asked" if isinstance(source, RecordSource) else "decoded once, in a file"
    return {
        "waiting": waited / STEPS / STEP_SECONDS,
        "where": "on the device" if resident else kept,
    }


def _prepare(directory: pathlib.Path, side: int, encoding: str, count: int) -> None:
    """A set of TFDS with smooth pictures and a little noise, which compress as photographs do."""
    sys.modules.setdefault("importlib_resources", importlib.resources)  # TFDS does not declare it.
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "made"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(shape=(side, side, 3))}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
            files = _pictures(side, encoding, count)
            return {"train": enumerate({"image": file} for file in files)}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Made(data_dir=directory, file_format="array_record").download_and_prepare()


def _pictures(side: int, encoding: str, count: int) -> Iterator[io.BytesIO]:
    draw = np.random.default_rng(0)
    for _ in range(count):
        coarse = draw.integers(0, 256, (8, 8, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        noisy = smooth + draw.normal(0, 2, smooth.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, encoding)
        file.seek(0)
        yield file
