"""Sampling from a run: many images by index, resumable, over all devices."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import bounded, figures, files, keys, sampling
from ddpm_jax.config import RequestError
from ddpm_jax.data import to_uint8
from ddpm_jax.diffusion import Process
from ddpm_jax.models import UNet, rounded_kernels
from ddpm_jax.parallel import Layout, first_hosts, network_jit, to_host, wait_for_all
from ddpm_jax.parts import collect, read
from ddpm_jax.runs import Run, fingerprint, image_shape
from ddpm_jax.training.metrics import NonFiniteError

GRID_IMAGES = 64  # In each picture.
# Raised when the same config and parameters would give other images, rounding aside.
VERSION = 1


class Drawn(NamedTuple):
    """A batch of samples.

    images: uint8 [batch, height, width, channels].
    finite: bool [batch]: whether all values of an image were numbers before they were rounded.
    outside: float32 [batch]: the share of an image's values more than half a level beyond [−1, 1].
    x0_path: uint8 [len(x0_at), batch, height, width, channels], see `sampling.Samples`; or None.
    """

    images: Any
    finite: Any
    outside: Any
    x0_path: Any = None


def compile_sampler(
    layout: Layout,
    process: Process,
    model: UNet,
    config: ml_collections.ConfigDict,
    params_sharding: Any,
    x0_at: Sequence[int] = (),
) -> Callable[[Any, jax.Array], Drawn]:
    """`sampler(params, indices)`: image k is that of index k, the batch split over the devices.

    Args:
      layout: the devices.
      config: the whole config; `sample` and `seed` say how.
      params_sharding: how the parameters lie.
      x0_at: see `sampling.sample`.
    Returns:
      A function of the parameters and int32 [batch], a multiple of the devices.
    """
    how = config.sample

    def sampler(seed: jax.Array, params: Any, indices: jax.Array) -> Drawn:
        example_keys = keys.example_keys(seed, "sample", 0, indices)
        params = rounded_kernels(model.dtype, params)
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
        x0, path = drawn if x0_at else (drawn, None)
        of_image = tuple(range(1, x0.ndim))
        outside = (jnp.abs(x0) > 1 + 1 / 255).mean(axis=of_image)
        finite = jnp.isfinite(x0).all(axis=of_image)
        return Drawn(to_uint8(x0), finite, outside, None if path is None else to_uint8(path))

    one = layout.split(0)
    split = Drawn(one, one, one, layout.split(1) if x0_at else None)
    placed = layout.replicated, params_sharding, one
    compiled = network_jit(sampler, in_shardings=placed, out_shardings=split)
    return functools.partial(compiled, np.int32(config.seed))  # One program serves all seeds.


def padded_batch(batch_size: int, layout: Layout) -> int:
    """The batch size rounded up to a multiple of the devices."""
    return -(-batch_size // layout.num_devices) * layout.num_devices


def draw(
    sampler: Callable[[Any, jax.Array], Drawn],
    params: Any,
    count: int,
    batch: int,
    say: Callable[[str], None],
    **keep: Any,
) -> dict[str, np.ndarray]:
    """The first `count` samples: uint8 "images" and the share "outside" of [−1, 1] of each.

    Args:
      sampler: as from `compile_sampler`.
      batch: a multiple of the devices.
      keep: directory, protocol and stop of `parts.collect`.
    Raises:
      NonFiniteError: samples that are not numbers.
      Interrupted, RequestError: see `parts.collect`.
    """

    def piece(start: int, length: int) -> dict[str, np.ndarray]:
        # Padded with images that nobody asked for: one shape is one program.
        drawn = jax.tree.map(to_host, sampler(params, jnp.arange(start, start + batch)))
        bad = np.flatnonzero(~drawn.finite[:length])
        if bad.size:
            raise NonFiniteError(
                f"{bad.size} of the samples {start}..{start + length - 1} are not finite, first "
                f"number {start + bad[0]}: the network's output is not; try another checkpoint"
            )
        return {"images": drawn.images[:length], "outside": drawn.outside[:length]}

    return collect(count, batch, piece, "image", say, **keep)


def sampling_protocol(run: Run) -> dict[str, Any]:
    """How `generate` draws a run's samples: JSON-able, all that the images depend on."""
    how, config = run.config.sample, run.config
    return {
        "checkpoint": run.step,
        "parameters": run.kind,
        "parameters_crc32": fingerprint(run.params),
        **config.diffusion.to_dict(),
        "dtype": config.model.dtype,
        "sampler": how.method,
        "steps": how.steps or config.diffusion.num_steps,
        "eta": how.eta,
        "clip": how.clip,
        "seed": config.seed,
        "count": how.count,
        "rounding": "nearest of 256 levels",
        "version": VERSION,
    }


def generate(
    run: Run,
    directory: epath.Path,
    say: Callable[[str], None],
    sampler: Callable[[Any, jax.Array], Drawn] | None = None,
    stop: Callable[[], bool] | None = None,
) -> epath.Path:
    """Draws `config.sample.count` images of a run and saves them.

    Writes `<directory>/<name>.npz` (uint8 "images" [count, height, width, channels], "outside", see
    `Drawn`, and the JSON text "protocol" of how they were drawn) and grids `<name>_grid_….png`,
    where the name tells checkpoint, sampler, steps, seed and count. Batches are kept in
    `<name>.parts/` until all are there, so that the same call goes on where it was stopped.

    Args:
      run: its config says how.
      directory: where all is written.
      say: prints a line of progress.
      sampler: as from `compile_sampler` for the run, if there is one.
      stop: see `parts.collect`.

    Returns:
      The path of the .npz.
    Raises:
      Interrupted: by SIGINT or SIGTERM, after the current batch.
      NonFiniteError: samples that are not numbers; none of that batch are kept.
      RequestError: samples of that name are there, and were drawn in another way.
    """
    how, config, protocol = run.config.sample, run.config, sampling_protocol(run)
    path = target(run, directory)
    if first_hosts(np.array(path.exists())):
        _check_drawn_alike(path, protocol)
        return path
    parts = directory / f"{path.stem}.parts"
    if sampler is None:
        sampler = compile_sampler(run.layout, run.process, run.model, config, run.params_sharding)
    batch = padded_batch(min(how.batch_size, how.count), run.layout)
    drawn = draw(
        sampler, run.params, how.count, batch, say, directory=parts, protocol=protocol, stop=stop
    )
    if jax.process_index() == 0:
        _save(path, drawn, protocol)
        parts.rmtree()
    wait_for_all(f"samples {path}")
    return path


def target(run: Run, directory: epath.Path) -> epath.Path:
    """The file of a run's samples, whose name tells how they were drawn."""
    how, config = run.config.sample, run.config
    name = f"step{run.step}_{how.method}{how.steps or config.diffusion.num_steps}"
    name += f"_eta{how.eta:g}" if how.method == "ddim" else ""
    name += "" if run.kind == "ema" else f"_{run.kind}"
    name += "" if how.clip else "_unclipped"
    name += "" if config.model.dtype == "float32" else f"_{config.model.dtype}"
    return directory / f"{name}_seed{config.seed}_{how.count}.npz"


def load_images(path: epath.PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """The images and the protocol in a file that `generate` wrote.

    Raises:
      RequestError: it cannot be read whole.
    """
    arrays = _load(path)
    return arrays["images"], _protocol(path, arrays)


def load_outside(path: epath.PathLike) -> np.ndarray:
    """The share of each image's values that clipping changed, see `Drawn`: float32 [count]."""
    return _load(path, "outside")["outside"]


def _protocol(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        return dict(bounded.parse_json(str(arrays["protocol"])))
    except (TypeError, ValueError):
        raise RequestError(f"{path} is damaged; move it away to draw the samples again") from None


def _load(path: epath.PathLike, *names: str) -> dict[str, np.ndarray]:
    arrays = read(epath.Path(path), names or ("images", "protocol"))
    if arrays is None:
        raise RequestError(f"{path} cannot be read; move it away to draw the samples again")
    return arrays


def _check_drawn_alike(path: epath.Path, protocol: dict[str, Any]) -> None:
    before = _protocol(path, _load(path, "protocol"))
    for key, value in protocol.items():
        if before.get(key) != value:
            raise RequestError(
                f"{path} holds samples drawn with {key}={before.get(key)}, not {value}; "
                "move it away to draw them again"
            )


def _save(path: epath.Path, drawn: dict[str, np.ndarray], protocol: dict[str, Any]) -> None:
    images = drawn["images"]
    for start in range(0, min(len(images), 4 * GRID_IMAGES), GRID_IMAGES):
        picture = figures.grid(images[start : start + GRID_IMAGES])
        figures.save_png(path.parent / f"{path.stem}_grid_{start:05d}.png", picture)
    arrays = {**drawn, "protocol": json.dumps(protocol)}
    files.replace_with(path, lambda file: np.savez(file, **arrays))
