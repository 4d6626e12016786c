"""Sources of images by position: the embedded digits, any TFDS image set, LSUN, a folder of images.

Nothing is ever downloaded. Whatever is wrong with a request is raised by `open_source`, before
anything is compiled, as a `RequestError` that names the fix.

The digits are the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0:
1,797 images of 8x8 pixels. digits.npz keeps their 17 grey levels; here they are spread over 0..255.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from importlib import resources
from typing import Protocol

import ml_collections
import numpy as np

from ddpm_jax.config import RequestError
from ddpm_jax.data.folder import open_folder
from ddpm_jax.data.lsun import is_lsun, open_lsun
from ddpm_jax.data.records import RecordSource, decode_once
from ddpm_jax.data.tfds_sets import open_tfds


class Source(Protocol):
    """Images by position, 0..len-1, each uint8 [h, w, c] of shape `image_shape`."""

    name: str
    split: str
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        """The number of images."""

    def images(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, c]: the images at the integer positions [n]."""

    def labels(self, positions: np.ndarray) -> np.ndarray | None:
        """int64 [n]: the classes of the images at these positions; None if the set has none."""


class ArraySource:
    """A source over arrays: images uint8 [n, h, w, c], and labels int64 [n] or None."""

    def __init__(self, name: str, split: str, images: np.ndarray, labels: np.ndarray | None = None):
        self.name, self.split = name, split
        self.image_shape = images.shape[1:]
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def images(self, positions: np.ndarray) -> np.ndarray:
        return self._images[positions]

    def labels(self, positions: np.ndarray) -> np.ndarray | None:
        return None if self._labels is None else self._labels[positions]


PROBES = 64  # Images that a fingerprint is taken of.


def fingerprint(source: Source) -> str:
    """Sixteen hexadecimal digits of what is trained on, whatever it is called and wherever it is.

    Of the number of images, their shape, and the bytes of PROBES of them or of all, spread evenly
    from the first to the last: enough to tell other data, another order or another preparation.
    """
    count = len(source)
    probes = min(PROBES, count)
    digest = hashlib.sha256(repr((count, *map(int, source.image_shape))).encode())
    if probes:
        positions = np.arange(probes) * (count - 1) // max(probes - 1, 1)
        digest.update(np.ascontiguousarray(source.images(positions)))
    return digest.hexdigest()[:16]


def nbytes(source: Source) -> int:
    """The bytes of all images of a source as one uint8 array."""
    return len(source) * math.prod(source.image_shape)


def open_source(
    config: ml_collections.ConfigDict, split: str | None = None, *, batch_size: int | None = None
) -> Source:
    """Opens the images that `config.data` describes.

    A folder, and any other set of at most `config.data.cache_bytes` (or `resident_bytes`), is
    decoded once into a file in `config.data.cache_dir`. A larger set of TFDS or LSUN is decoded
    image by image, when asked.

    Args:
      config: the whole config.
      split: the split to open, instead of `config.data.split`.
      batch_size: if given, the least number of images that will do.

    Raises:
      RequestError: a set, split, folder or file is missing, unprepared, damaged or empty; the
        images differ in size from the config's; they are fewer than `batch_size`.
    """
    data, split = config.data, split or config.data.split
    openers = {"digits": _open_digits, "folder": open_folder}
    opener = open_lsun if is_lsun(data.name) else openers.get(data.name, open_tfds)
    source = opener(data, split)
    _check(source, data, batch_size)
    fits = nbytes(source) <= data.resident_bytes
    kept = fits or data.name == "folder" or nbytes(source) <= data.cache_bytes
    if isinstance(source, RecordSource) and kept:
        table = decode_once(source, pathlib.Path(data.cache_dir).expanduser(), in_memory=fits)
        if table is not None:
            labels = table["label"] if source.labelled else None
            return ArraySource(source.name, split, table["image"], labels)
    return source


def _check(source: Source, data: ml_collections.ConfigDict, batch_size: int | None) -> None:
    height, width, channels = source.image_shape
    if (height, width, channels) != (data.image_size, data.image_size, data.channels):
        raise RequestError(
            f"config.data: {source.name} has {height}x{width} images with channels={channels}, not "
            f"{data.image_size}x{data.image_size} with channels={data.channels}; set "
            f"--config.data.image_size={height} --config.data.channels={channels}"
        )
    if batch_size and len(source) < batch_size:
        raise RequestError(
            f"config.train.batch_size={batch_size}: split {source.split} of {source.name} has only "
            f"{len(source)} images; set --config.train.batch_size to that or less"
        )


def _open_digits(data: ml_collections.ConfigDict, split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise RequestError(f"config.data.split={split}: {data.name} has the splits train, test")
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        stored = np.load(file)
        images, labels = stored["images"], stored["labels"].astype(np.int64)
    chosen = (np.arange(len(labels)) % 7 == 6) == (split == "test")
    levels = np.rint(np.arange(17) * 255 / 16).astype(np.uint8)
    return ArraySource(data.name, split, levels[images[chosen]][..., None], labels[chosen])
