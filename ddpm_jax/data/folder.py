"""A folder of PNG and JPEG files as a source."""

from __future__ import annotations

import os
import pathlib

import ml_collections
import numpy as np
from PIL import ImageOps

from ddpm_jax.bounded import open_image
from ddpm_jax.config import RequestError
from ddpm_jax.data.records import RecordSource, check_channels, pixels

SUFFIXES = (".png", ".jpg", ".jpeg")


def open_folder(data: ml_collections.ConfigDict, split: str) -> RecordSource:
    """The images below the folder `data.data_dir`, in the order of their relative paths.

    A split is the subfolder of that name; without one, `train` is the whole folder. Images are
    turned as their EXIF says, cropped and resized to `data.image_size` (see `records.pixels`), and
    read in grey or RGB as `data.channels` is 1 or 3.

    Raises:
      RequestError: no such folder or subfolder, no images in it, or other channels.
    """
    root = pathlib.Path(data.data_dir).expanduser()
    if not data.data_dir or not root.is_dir():
        raise RequestError(
            f"config.data.data_dir={data.data_dir}: no such folder; name the folder of images with "
            "--config.data.data_dir=PATH"
        )
    check_channels(data)
    if (root / split).is_dir():
        root = root / split
    elif split != "train":
        subfolders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise RequestError(
            f"config.data.split={split}: {root} has no such subfolder; choose train (all of it) or "
            f"one of its subfolders ({', '.join(subfolders) or 'it has none'})"
        )
    files = image_files(root)
    if not files:
        raise RequestError(
            f"config.data.data_dir={root}: no images ({', '.join(SUFFIXES)}) in this folder or "
            "below; name another with --config.data.data_dir=PATH"
        )
    shape = (data.image_size, data.image_size, data.channels)

    def read(position: int) -> tuple[np.ndarray]:
        with open_image(root / files[position]) as image:
            return (pixels(ImageOps.exif_transpose(image), *shape[1:]),)

    stats = [(name, os.stat(root / name)) for name in files]
    return RecordSource(
        data.name,
        split,
        shape,
        len(files),
        read,
        where=lambda position: str(root / files[position]),
        identity=[str(root.resolve()), *((n, s.st_size, s.st_mtime_ns) for n, s in stats)],
        attempts=data.read_attempts,
    )


def image_files(root: pathlib.Path) -> list[str]:
    """The relative posix paths of the PNG and JPEG files below `root`, sorted, no hidden ones."""
    paths = (path.relative_to(root) for path in root.rglob("*"))
    return sorted(
        path.as_posix()
        for path in paths
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
        and (root / path).is_file()
    )
