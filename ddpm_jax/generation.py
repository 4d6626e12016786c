"""Sampling from a run: many images by index, resumable, over all devices."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import figures, files, keys, sampling
from ddpm_jax.config import RequestError
from ddpm_jax.data import to_uint8
from ddpm_jax.diffusion import Process
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.models import UNet
from ddpm_jax.parallel import Layout, to_host
from ddpm_jax.progress import Progress
from ddpm_jax.runs import Run, image_shape

GRID_IMAGES = 64  # In each picture.


def compile_sampler(
    layout: Layout,
    process: Process,
    model: UNet,
    config: ml_collections.ConfigDict,
    params_sharding: Any,
    x0_at: Sequence[int] = (),
) -> Callable[[Any, jax.Array], Any]:
    """`sampler(params, indices)`: image k is that of index k, the batch split over the devices.

    Args:
      layout: the devices.
      config: the whole config; `sample` and `seed` say how.
      params_sharding: how the parameters lie.
      x0_at: see `sampling.sample`.
    Returns:
      A function of the parameters and int32 [batch], a multiple of the devices, to uint8 images
      [batch, height, width, channels], or with x0_at `sampling.Samples` of uint8.
    """
    how = config.sample

    def sampler(params: Any, indices: jax.Array) -> Any:
        example_keys = keys.example_keys(config.seed, "sample", 0, indices)
        drawn = sampling.sample(
            process,
            lambda x_t, t: model.apply({"params": params}, x_t, t),
            image_shape(config),
            example_keys,
            how.method,
            how.steps,
            how.eta,
            how.clip,
            x0_at,
        )
        return jax.tree.map(to_uint8, drawn)

    split = sampling.Samples(layout.split(0), layout.split(1)) if x0_at else layout.split(0)
    return jax.jit(sampler, in_shardings=(params_sharding, layout.split(0)), out_shardings=split)


def padded_batch(batch_size: int, layout: Layout) -> int:
    """The batch size rounded up to a multiple of the devices."""
    return -(-batch_size // layout.num_devices) * layout.num_devices


def generate(run: Run, directory: epath.Path, say: Callable[[str], None]) -> epath.Path:
    """Draws `config.sample.count` images of a run and saves them.

    Writes `<directory>/<name>.npz` (uint8 "images" [count, height, width, channels] and the JSON
    text "protocol" of how they were drawn) and grids `<name>_grid_….png`, where the name tells
    checkpoint, sampler, steps, seed and count. Batches are kept in `<name>.parts/` until all are
    there, so that the same call goes on where it was stopped. `say` prints a line of progress.

    Returns:
      The path of the .npz.
    Raises:
      Interrupted: by SIGINT or SIGTERM, after the current batch.
    """
    how, config = run.config.sample, run.config
    steps = how.steps or config.diffusion.num_steps
    eta = f"_eta{how.eta:g}" if how.method == "ddim" else ""
    clip = "" if how.clip else "_unclipped"
    name = f"step{run.step}_{how.method}{steps}{eta}{clip}_seed{config.seed}_{how.count}"
    target = directory / f"{name}.npz"
    if target.exists():
        return target
    parts = directory / f"{name}.parts"
    protocol = {
        "checkpoint": run.step,
        "parameters": "ema",
        **config.diffusion.to_dict(),
        "dtype": config.model.dtype,
        "sampler": how.method,
        "steps": steps,
        "eta": how.eta,
        "clip": how.clip,
        "seed": config.seed,
        "count": how.count,
        "rounding": "nearest of 256 levels",
    }
    _open_parts(parts, protocol)
    sampler = compile_sampler(
        run.layout, run.process, run.model, config, jax.tree.map(lambda x: x.sharding, run.params)
    )
    batch = padded_batch(min(how.batch_size, how.count), run.layout)
    first_host = jax.process_index() == 0
    progress = Progress(0, how.count, first_host, say, "image")
    done = 0
    with Watch() as watch:
        for start, length in _missing(parts, how.count, batch):
            if watch.asked():
                progress.close()
                raise Interrupted(f"the first {done} of {how.count} images are in {parts}")
            # Padded with images that nobody asked for: one shape is one program.
            images = to_host(sampler(run.params, jnp.arange(start, start + batch)))
            if first_host:
                _write_array(parts / f"{start:08d}_{length}.npy", images[:length])
            done = start + length
            progress.update(done)
    progress.close()
    if first_host:
        images = np.concatenate([_read_array(path) for path in sorted(parts.glob("*.npy"))])
        _save(target, images, protocol)
        parts.rmtree()
    return target


def load_images(path: epath.PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """The images and the protocol in a file that `generate` wrote."""
    with epath.Path(path).open("rb") as file, np.load(file) as saved:
        return saved["images"], json.loads(str(saved["protocol"]))


def _missing(parts: epath.Path, count: int, batch: int) -> list[tuple[int, int]]:
    """(first, length) of the batches still to draw, around the parts that are there."""
    there = dict(tuple(map(int, path.stem.split("_"))) for path in parts.glob("*.npy"))
    missing, start = [], 0
    while start < count:
        if start not in there:
            end = min([start + batch, count, *(s for s in there if s > start)])
            missing.append((start, end - start))
            start = end
        else:
            start += there[start]
    return missing


def _open_parts(parts: epath.Path, protocol: dict[str, Any]) -> None:
    """Makes the directory of parts, or checks that those in it were drawn in the same way."""
    file = parts / "protocol.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != protocol:
            key = next(k for k in protocol if before.get(k) != protocol[k])
            raise RequestError(
                f"{parts} was begun with {key}={before.get(key)}, not {protocol[key]}; "
                "delete the directory to start again"
            )
    if jax.process_index() == 0:
        files.replace(file, json.dumps(protocol))


def _save(target: epath.Path, images: np.ndarray, protocol: dict[str, Any]) -> None:
    for start in range(0, min(len(images), 4 * GRID_IMAGES), GRID_IMAGES):
        picture = figures.grid(images[start : start + GRID_IMAGES])
        figures.save_png(target.parent / f"{target.stem}_grid_{start:05d}.png", picture)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, protocol=json.dumps(protocol))
    files.replace(target, buffer.getvalue())


def _write_array(path: epath.Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    files.replace(path, buffer.getvalue())


def _read_array(path: epath.Path) -> np.ndarray:
    return np.load(io.BytesIO(path.read_bytes()))
