"""Files that somebody else may have made, read with a bound on what they can cost.

Nothing in a file is run or unpickled, and no memory is taken for what a file only claims to hold.
Whatever is wrong with a file, the answer is a ValueError whose message goes on after the file's
name, or an OSError where reading it fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from etils import epath
from PIL import Image

MOST_TEXT = 2**26  # Bytes of a file of text, or of a text in another file.
MOST_WEIGHTS = 2**32  # Bytes of a file of weights.
MOST_ARRAYS = 2**36  # Bytes of the arrays in a .npz file.
MOST_PIXELS = 2**27  # Of an image; the largest cameras' have some 10^8.

# No others: of some kinds of files Pillow runs programs (EPS), or reads what they refer to.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# Compressed arrays may be so many times as large as their file, or as this many bytes.
_RATIO, _LEAST = 64, 2**28
_MOST_HEADER = 2**16  # Bytes of a .npy file's.


def read_bytes(path: epath.PathLike, most: int = MOST_TEXT) -> bytes:
    """A file's bytes.

    Raises:
      ValueError: they are more than `most`.
    """
    with epath.Path(path).open("rb") as file:
        # Not all that comes: a device has no end.
        return file.read(_checked_size(file, most))


def read_text(path: epath.PathLike, most: int = MOST_TEXT) -> str:
    """The text of a file, UTF-8 whatever the locale.

    Raises:
      ValueError: it is none, or has more than `most` bytes.
    """
    return read_bytes(path, most).decode("utf-8")


def read_json(path: epath.PathLike) -> Any:
    """What the JSON in a file says.

    Raises:
      ValueError: it is none, or too large.
    """
    return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is none, too large, or nested too deeply.
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"it has JSON of {len(text):,} bytes, more than {MOST_TEXT:,}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it has JSON that is nested too deeply") from None


def read_arrays(path: epath.PathLike, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or those named.

    Raises:
      ValueError: it is not a whole one, lacks a name, or claims more than it can hold.
    """
    with epath.Path(path).open("rb") as file:
        size = _checked_size(file, MOST_ARRAYS)
        try:
            with zipfile.ZipFile(file) as archive:
                members = {i.filename.removesuffix(".npy"): i for i in _members(archive, size)}
                return {name: _array(archive, members[name]) for name in names or members}
        except (OSError, ValueError, MemoryError):
            raise
        except KeyError as error:
            raise ValueError(f"it has no array {error}") from error
        except Exception as error:  # A crafted archive raises errors of every kind.
            raise ValueError(f"it is not a whole .npz file ({error})") from error


def _members(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """Checked to be no larger together than an honest file of this size can hold."""
    members = archive.infolist()
    methods = {info.compress_type for info in members}
    if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed in a way that NumPy's files are not")
    claimed = sum(info.file_size for info in members)
    most = max(_RATIO * size, _LEAST) if zipfile.ZIP_DEFLATED in methods else size
    if claimed > min(MOST_ARRAYS, most):
        raise ValueError(f"it claims to hold {claimed:,} bytes in {size:,}")
    return members


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        _, dtype, _, needed = _header(file, info.file_size)
    if dtype.kind in "SU" and needed > MOST_TEXT:
        raise ValueError(f"it has a text of {needed:,} bytes, more than {MOST_TEXT:,}")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def map_array(path: epath.PathLike) -> np.ndarray:
    """The array of a .npy file in C order, mapped from the disk.

    Raises:
      ValueError: it is not a whole one.
    """
    with open(path, "rb") as file:
        shape, dtype, start, _ = _header(file, os.fstat(file.fileno()).st_size)
    return np.asarray(np.memmap(path, dtype, "r", start, shape))


def _header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, and where and how long the content of a .npy file of `size` bytes is."""
    start = io.BytesIO(file.read(_MOST_HEADER))
    try:
        version = np.lib.format.read_magic(start)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[version](start)
    except Exception as error:  # A crafted header raises errors of every kind.
        raise ValueError("it is not a whole array") from error
    needed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or needed != size - start.tell():
        raise ValueError(f"its array {dtype} {list(shape)} is of objects, or not all of it there")
    return shape, dtype, start.tell(), needed


def read_tensors(
    path: epath.PathLike, most: int = MOST_WEIGHTS
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, and its metadata.

    Raises:
      ValueError: it is not a whole one, or has more than `most` bytes.
    """
    data = read_bytes(path, most)
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        return safetensors.numpy.load(data), dict(header.get("__metadata__") or {})
    except Exception as error:  # Of a dtype that NumPy lacks, too.
        raise ValueError(f"it is not a whole safetensors file ({error})") from error


@contextlib.contextmanager
def open_image(
    file: str | epath.PathLike | BinaryIO, formats: Sequence[str] = IMAGE_FORMATS
) -> Iterator[Image.Image]:
    """An image, not decoded yet: `with open_image(file) as image`.

    Raises:
      ValueError: it has more than MOST_PIXELS pixels, whatever Pillow itself allows.
      PIL.UnidentifiedImageError: it is none of these formats; an OSError.
    """
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:  # By Pillow's limit, which others may have set.
        raise ValueError(f"too many pixels to be decoded, at most {MOST_PIXELS:,}") from error
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} are too many pixels to be decoded, at most "
                f"{MOST_PIXELS:,}"
            )
        yield image


def _checked_size(file: BinaryIO, most: int) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than {most:,}")
    return size
