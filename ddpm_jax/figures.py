"""Pictures: grids of images, and the figure at the end of training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from ddpm_jax import files


def grid(images: np.ndarray, columns: int | None = None, border: int = 1) -> np.ndarray:
    """Images side by side in rows.

    Args:
      images: uint8 [n, height, width, channels], of 1 or 3 channels.
      columns: images a row; about as many as rows, unless given.
      border: grey pixels between images.
    Returns:
      uint8 [height, width, channels] of the whole.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tall, wide = height + border, width + border
    canvas = np.full((rows * tall + border, columns * wide + border, channels), 128, np.uint8)
    for k, image in enumerate(images):
        y, x = (k // columns) * tall + border, (k % columns) * wide + border
        canvas[y : y + height, x : x + width] = image
    return canvas


def save_png(path: epath.Path, image: np.ndarray, least_side: int = 1024) -> None:
    """Saves uint8 [height, width, channels] as PNG, small pictures enlarged without blurring."""
    factor = max(1, least_side // max(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    files.replace(path, buffer.getvalue())


def training_figure(
    records: Sequence[dict[str, Any]], path_grid: np.ndarray, times: Sequence[int]
) -> bytes:
    """The loss over training beside x̂_0 over the reverse process, as PNG.

    Args:
      records: those of metrics.jsonl.
      path_grid: uint8 grid whose columns are the times, a row a sample.
      times: at which x̂_0 was taken, from T down.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    steps = [r["step"] for r in records if "loss" in r]
    left.plot(steps, [r["loss"] for r in records if "loss" in r], color="black", label="all t")
    for quarter in range(4):
        name = f"loss_quarter_{quarter + 1}"
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            left.plot(
                *zip(*points, strict=True), alpha=0.5, lw=1, label=f"quarter {quarter + 1} of T"
            )
    left.set(xlabel="step", ylabel="loss", title="training loss")
    if all(r["loss"] > 0 for r in records if "loss" in r):
        left.set_yscale("log")
    left.legend(fontsize="small")
    right.imshow(path_grid.squeeze(-1) if path_grid.shape[-1] == 1 else path_grid, cmap="gray")
    cell = path_grid.shape[1] / len(times)
    right.set_xticks([cell * (k + 0.5) for k in range(len(times))], [str(t) for t in times])
    right.set_yticks([])
    right.set(xlabel="t", title="x̂_0 over the reverse process, one sample a row")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
