"""LSUN's LMDB files as a source, read as they are downloaded (Yu et al. 2015, arXiv:1506.03365)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import re
import threading
import weakref
from typing import Any

import ml_collections
import numpy as np
from PIL import ImageOps
from tqdm import tqdm

from ddpm_jax.bounded import open_image
from ddpm_jax.config import RequestError
from ddpm_jax.data.records import RecordSource, check_channels, load_table, pixels, save_table

NAME = "lsun_lmdb"
ALIASES = {"validation": "val"}
FOLDER = re.compile(r"(?P<category>.*?)(_(?P<split>train|val|test))?(_lmdb)?")


def is_lsun(name: str) -> bool:
    """Whether `data.name` asks for this source: lsun_lmdb, or lsun_lmdb/CATEGORY."""
    return name == NAME or name.startswith(f"{NAME}/")


def open_lsun(data: ml_collections.ConfigDict, split: str) -> RecordSource:
    """The images of one LSUN category and split, in the order of their keys.

    `data.data_dir` is an unpacked LMDB (a folder that holds data.mdb) or the folder of several,
    named as LSUN names them: CATEGORY_train_lmdb, CATEGORY_val_lmdb, or just CATEGORY, which is
    its train split. `data.name` is lsun_lmdb/CATEGORY, or lsun_lmdb where there is only one. The
    split `validation` is val.

    The images are prepared as by create_lsun of StyleGAN2's dataset_tool.py, which the paper used
    (appendix B): cropped to the central square and, unless it has `data.image_size` already,
    resized with the Lanczos filter (see `records.pixels`). Empty records are left out.

    The list of the keys is kept in `data.cache_dir`, as it takes a pass over the whole file.

    Raises:
      RequestError: no lmdb package, no such folder, category or split, a file that is no whole
        LMDB, no images in it, or other channels.
    """
    check_channels(data)
    path = _choose(_databases(data), data, split)
    stat = os.stat(path / "data.mdb")
    try:
        database = _shared(path, stat, pathlib.Path(data.cache_dir).expanduser())
    except ImportError as error:
        raise RequestError(
            f"config.data.name={data.name}: reading LSUN's files needs the package lmdb: "
            "pip install -e '.[lmdb]'"
        ) from error
    if not len(database.keys):
        raise RequestError(
            f"config.data.data_dir: {path} holds no images; unpack the LMDB of another split or "
            "category, and name it with --config.data.data_dir=PATH"
        )

    shape = (data.image_size, data.image_size, data.channels)

    def read(position: int) -> tuple[np.ndarray]:
        with database.environment.begin() as transaction:
            file = io.BytesIO(transaction.get(database.key(position)))
        with open_image(file) as image:
            return (pixels(ImageOps.exif_transpose(image), *shape[1:]),)

    return RecordSource(
        data.name,
        split,
        shape,
        len(database.keys),
        read,
        lambda position: f"record {database.key(position).decode(errors='replace')} of {path}",
        identity=[os.path.realpath(path), stat.st_size, stat.st_mtime_ns],
        attempts=data.read_attempts,
    )


# Which LMDB.


def _databases(data: ml_collections.ConfigDict) -> dict[pathlib.Path, tuple[str, str]]:
    """The LMDBs at `data.data_dir`, and the category and split that their names tell."""
    root = pathlib.Path(os.path.abspath(os.path.expanduser(data.data_dir)))
    if not data.data_dir or not root.is_dir():
        raise RequestError(
            f"config.data.data_dir={data.data_dir}: no such folder; name an unpacked LMDB of LSUN "
            "(a folder that holds data.mdb), or the folder of several, with "
            "--config.data.data_dir=PATH"
        )
    folders = [root] if (root / "data.mdb").is_file() else sorted(root.iterdir())
    found = [folder for folder in folders if (folder / "data.mdb").is_file()]
    if not found:
        packed = sorted(path.name for path in root.glob("*.zip"))
        hint = f"; unpack it: unzip {packed[0]}" if packed else ""
        raise RequestError(
            f"config.data.data_dir={data.data_dir}: no LMDB (a folder that holds data.mdb) there "
            f"or just below{hint or '; name another folder with --config.data.data_dir=PATH'}"
        )
    names = {path: FOLDER.fullmatch(path.name) for path in found}
    return {path: (name["category"], name["split"] or "train") for path, name in names.items()}


def _choose(
    found: dict[pathlib.Path, tuple[str, str]], data: ml_collections.ConfigDict, split: str
) -> pathlib.Path:
    """The one LMDB of the category and split that are asked for."""
    category = data.name.partition("/")[2]
    categories = sorted({known for known, _ in found.values()})
    if category and category not in categories:
        raise RequestError(
            f"config.data.name={data.name}: {data.data_dir} holds {', '.join(categories)}; name "
            f"one of them as {NAME}/CATEGORY, or another folder with --config.data.data_dir=PATH"
        )
    if not category and len(categories) > 1:
        raise RequestError(
            f"config.data.name={data.name}: {data.data_dir} holds several categories; choose one "
            f"with --config.data.name={NAME}/CATEGORY: {', '.join(categories)}"
        )
    category = category or categories[0]
    splits = {path: s for path, (c, s) in found.items() if c == category}
    matching = [path for path, s in splits.items() if s == ALIASES.get(split, split)]
    if not matching:
        raise RequestError(
            f"config.data.split={split}: of {category}, {data.data_dir} holds "
            f"{', '.join(sorted(splits.values()))}; choose one of them, or name the folder that "
            "holds all splits with --config.data.data_dir=PATH"
        )
    if len(matching) > 1:
        raise RequestError(
            f"config.data.split={split}: there are several; name one with "
            f"--config.data.data_dir=PATH: {', '.join(map(str, matching))}"
        )
    return matching[0]


# Its keys and its records.


@dataclasses.dataclass(frozen=True, eq=False)
class _Database:
    """An open LMDB and the keys of its images, [n] of (length, key), in its own order."""

    environment: Any
    keys: np.ndarray

    def key(self, position: int) -> bytes:
        return self.keys["key"][position].tobytes()[: self.keys["length"][position]]


# LMDB lets a process open a file only once; sources of the same file share it.
_open_databases: weakref.WeakValueDictionary[tuple[int, ...], _Database] = (
    weakref.WeakValueDictionary()
)
_opening = threading.Lock()


def _shared(path: pathlib.Path, stat: os.stat_result, cache_dir: pathlib.Path) -> _Database:
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    with _opening:
        database = _open_databases.get(identity)
        if database is None:
            database = _Database(keys=_keys(path, stat, cache_dir), environment=_open(path))
            _open_databases[identity] = database
        return database


def _open(path: pathlib.Path, readahead: bool = False) -> Any:
    """The environment, read only and without its lock file.

    Raises:
      RequestError: not an LMDB, or one whose file is shorter than its pages: reading those that
        are missing would kill the process.
    """
    import lmdb  # An optional package.

    try:
        environment = lmdb.open(
            str(path), readonly=True, create=False, lock=False, readahead=readahead
        )
    except lmdb.Error as error:
        raise _not_whole(path, error) from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = os.path.getsize(path / "data.mdb")
    if size < needed:
        environment.close()
        raise _not_whole(path, f"{size:,} bytes instead of {needed:,}")
    return environment


def _not_whole(path: pathlib.Path, reason: Any) -> RequestError:
    reason = " ".join(str(reason).split())
    return RequestError(
        f"config.data.data_dir: {path / 'data.mdb'} is no whole LMDB that can be read "
        f"({reason}); unpack or download it again"
    )


def _keys(path: pathlib.Path, stat: os.stat_result, cache_dir: pathlib.Path) -> np.ndarray:
    """The keys of the images in `path`, from the file in `cache_dir` that keeps them.

    The file is made if it is missing or damaged; where it cannot be made, a warning says so.
    """
    name = repr([os.path.realpath(path), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    file = cache_dir / f"{path.name}-keys-{digest}.npy"
    keys = None
    with contextlib.suppress(OSError):  # Writing it will tell.
        keys = load_table(file)
    if keys is None or not _is_key_table(keys):
        keys = _list_keys(path)
        try:
            save_table(file, keys.dtype, len(keys), [keys])
        except OSError as error:
            logging.getLogger(__name__).warning(
                "config.data.cache_dir=%s: cannot keep the keys of %s there (%s); listing them at "
                "every start",
                cache_dir,
                path,
                error.strerror or error,
            )
    return keys


def _is_key_table(table: np.ndarray) -> bool:
    if table.ndim != 1 or table.dtype.names != ("length", "key"):
        return False
    return bool((table["length"] <= table.dtype["key"].itemsize).all())


def _list_keys(path: pathlib.Path) -> np.ndarray:
    """[n] of (length, key): all records but the empty ones, as one is reported of LSUN's cats."""
    import lmdb

    keys = []
    # Finding a record reads its page anyway, so read ahead; the pages then serve training.
    with (
        _open(path, readahead=True) as environment,
        environment.begin(buffers=True) as transaction,
    ):
        count = transaction.stat()["entries"]
        title = f"Listing {path.name}"
        try:
            for key, value in tqdm(
                transaction.cursor(), title, count, unit=" images", disable=None
            ):
                if len(value):
                    keys.append(bytes(key))
        except lmdb.Error as error:
            raise _not_whole(path, error) from error
    if len(keys) < count:
        logging.getLogger(__name__).warning(
            "%s: %d of %d records are empty and left out", path, count - len(keys), count
        )
    width = max(map(len, keys), default=1)
    table = np.empty(len(keys), [("length", np.uint16), ("key", f"V{width}")])
    table["length"] = [len(key) for key in keys]
    table["key"] = np.array(keys, f"V{width}")
    return table
