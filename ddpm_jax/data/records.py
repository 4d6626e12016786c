"""Images that are decoded one by one, and the file that keeps them decoded."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpm_jax.bounded import map_array
from ddpm_jax.config import RequestError
from ddpm_jax.data.threads import run_all

CHUNK = 1024  # Images decoded between two writes.
MAX_THREADS = 32
ATTEMPTS = 3  # To read an image, where the config does not say.
PAUSE = 0.1  # Seconds after the first attempt; twice as long after the second, and so on.


class ReadError(RuntimeError):
    """Images could not be read; the message names the file or record."""


class RecordSource:
    """A source that decodes each image when asked for it, in several threads.

    Args:
      name, split: what it is called.
      image_shape: (h, w, c) of every image.
      count: the number of images.
      read: position -> (uint8 [h, w, c],) or, if `labelled`, (uint8 [h, w, c], int).
      where: position -> the file or record, for messages.
      identity: what the decoded images depend on, besides the fields above, with a plain `repr`.
      labelled: whether there are labels.
      attempts: how often `read` is tried before an image counts as unreadable.
      pause: waits for so many seconds between two attempts.

    `images` and `labels` raise ReadError.
    """

    def __init__(
        self,
        name: str,
        split: str,
        image_shape: tuple[int, int, int],
        count: int,
        read: Callable[[int], tuple[Any, ...]],
        where: Callable[[int], str],
        identity: Iterable[Any],
        labelled: bool = False,
        attempts: int = ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.name, self.split, self.image_shape, self.labelled = name, split, image_shape, labelled
        self._count, self._read, self._where = count, read, where
        self._attempts, self._pause = attempts, pause
        # (when it began, position), the earliest in front.
        self._under_way: dict[object, tuple[float, int]] = {}
        fields = [("image", np.uint8, image_shape)] + [("label", np.int64)] * labelled
        self.dtype = np.dtype(fields)
        self.key = hashlib.sha256(repr([fields, count, *identity]).encode()).hexdigest()[:16]
        self._threads = min(MAX_THREADS, os.cpu_count() or 1)

    def __len__(self) -> int:
        return self._count

    def images(self, positions: np.ndarray) -> np.ndarray:
        return self.table(positions)["image"]

    def labels(self, positions: np.ndarray) -> np.ndarray | None:
        return self.table(positions)["label"] if self.labelled else None

    def table(self, positions: np.ndarray) -> np.ndarray:
        """[n] of `dtype`: image and label together.

        Raises:
          ReadError: names the first image that could not be read.
        """
        table = np.empty(len(positions), self.dtype)

        def fill(indices: np.ndarray) -> None:
            for index in indices:
                table[index] = self._record(int(positions[index]))

        threads = max(1, min(self._threads, len(positions)))
        run_all(fill, np.array_split(np.arange(len(positions)), threads), "decode")
        return table

    def slowest(self, since: float) -> str | None:
        """The file or record under way for the longest, of those begun since time.monotonic()."""
        begun = (place for when, place in [*self._under_way.values()] if when >= since)
        position = next(begun, None)
        return None if position is None else self._where(position)

    def chunks(self) -> Iterator[np.ndarray]:
        """All of it, in order, in tables of CHUNK images, with a progress bar on a terminal."""
        title = f"Decoding {self.name} {self.split}"
        with tqdm(total=len(self), desc=title, unit=" images", disable=None) as bar:
            for start in range(0, len(self), CHUNK):
                table = self.table(np.arange(start, min(start + CHUNK, len(self))))
                yield table
                bar.update(len(table))

    def _record(self, position: int) -> tuple[Any, ...]:
        for attempt in range(1, self._attempts + 1):
            reading = object()
            self._under_way[reading] = time.monotonic(), position
            try:
                return self._read(position)
            except Exception as error:  # Decoders raise errors of every kind.
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                problem = f"{self._where(position)} cannot be read ({reason})"
                if attempt == self._attempts:
                    raise ReadError(f"{problem}, tried {times(attempt)}") from error
            finally:
                del self._under_way[reading]
            logging.getLogger(__name__).warning(
                "%s; reading it again, attempt %d of %d", problem, attempt + 1, self._attempts
            )
            self._pause(PAUSE * attempt)
        raise ValueError(f"attempts={self._attempts}: at least 1")


def times(count: int) -> str:
    """In words: once, 2 times, …"""
    return "once" if count == 1 else f"{count} times"


def decode_once(
    source: RecordSource, cache_dir: pathlib.Path, in_memory: bool
) -> np.ndarray | None:
    """[n] of `source.dtype`: the decoded set, mapped from its file in `cache_dir`.

    The file is made if it is missing or damaged. Where it cannot be made, a warning says so, and
    the set is decoded into memory if `in_memory`; if not, the answer is None.

    Raises:
      RequestError: names an image that cannot be read.
    """
    title = re.sub(r"\W+", "_", f"{source.name} {source.split}").strip("_")
    try:
        return _decoded(source, cache_dir / f"{title}-{source.key}.npy", in_memory)
    except ReadError as error:
        raise RequestError(f"config.data: {error}; replace or remove it") from error


def _decoded(source: RecordSource, path: pathlib.Path, in_memory: bool) -> np.ndarray | None:
    try:
        table = load_table(path)
        if table is None or table.dtype != source.dtype or table.shape != (len(source),):
            save_table(path, source.dtype, len(source), source.chunks())
            table = load_table(path)
        return table
    except OSError as error:
        logging.getLogger(__name__).warning(
            "config.data.cache_dir=%s: cannot keep the decoded images there (%s); decoding them %s",
            path.parent,
            error.strerror or error,
            "into memory" if in_memory else "again whenever they are needed",
        )
    return np.concatenate(list(source.chunks())) if in_memory else None


def load_table(path: pathlib.Path) -> np.ndarray | None:
    """The array that `save_table` wrote, mapped from its file; None if missing or damaged."""
    try:
        return map_array(path)
    except (FileNotFoundError, ValueError):
        return None


def save_table(
    path: pathlib.Path, dtype: np.dtype, count: int, tables: Iterable[np.ndarray]
) -> None:
    """Writes tables, `count` rows in all, as one .npy file that is whole or not there.

    It is written beside the path under a name of its own and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(path.parent).free, count * dtype.itemsize
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free of the {needed:,} that it takes")
    partial = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.tmp")
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count,),
    }
    try:
        with open(partial, "xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for table in tables:
                file.write(table.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_channels(data: ml_collections.ConfigDict) -> None:
    """Refuses channels that `pixels` cannot give.

    Raises:
      RequestError: `data.channels` is neither 1 nor 3.
    """
    if data.channels not in (1, 3):
        raise RequestError(
            f"config.data.channels={data.channels}: the images of {data.name} are read in grey "
            "(--config.data.channels=1) or RGB (--config.data.channels=3)"
        )


def pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """uint8 [size, size, channels]: the image's central square, grey (1 channel) or RGB (3).

    Transparency is laid on white; 16-bit grey is scaled to 8 bits, and integers beyond 0..65535
    are clipped. A square of another size is resized with Pillow's Lanczos filter, which widens as
    it reduces and so does not alias.
    """
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 instead of scaling.
        deep, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.rint(np.clip(deep, 0, 65535) / 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)
