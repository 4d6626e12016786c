"""Files that are whole or not there, on disks and in gs:// buckets.

An object of a bucket is there whole once it is written, so it needs no renaming, which is a copy
and a deletion. It cannot be appended to either: append mode silently replaces it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import io
import itertools
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from etils import epath

A_DAY = 86400  # Seconds.
ANSWER_SECONDS = 20.0  # In which a bucket must answer.
REMOTE_SECONDS = 30.0  # Between two writes of the same object.
REMOTE_SHARE = 0.02  # Of the time, at most, goes into writing objects again.

T = TypeVar("T")


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def read_text(path: epath.Path) -> str:
    """The text of a UTF-8 file, whatever the locale."""
    return path.read_bytes().decode()


def unused(path: epath.Path) -> epath.Path:
    """The path, or the first of PATH1, PATH2, … where nothing is."""
    names = itertools.chain([path.name], (f"{path.name}{k}" for k in itertools.count(1)))
    return next(free for free in (path.parent / name for name in names) if not free.exists())


def mtime(path: epath.Path) -> float:
    """When a file was last written, in seconds."""
    # That of epath asks for the owner's name, which a container may not know.
    return path.stat().mtime if is_remote(path) else os.stat(path).st_mtime


def matching(directory: epath.Path, pattern: str) -> list[epath.Path]:
    """What lies in a directory under names such as "*.npz", in their order; [] without directory.

    Unlike `glob`, which takes a bracket in the directory's own name for a part of the pattern.
    """
    try:
        found = [path for path in directory.iterdir() if fnmatch.fnmatchcase(path.name, pattern)]
    except FileNotFoundError:
        return []
    return sorted(found)


def replace(path: epath.Path, content: bytes | str) -> None:
    """Writes a file, text as UTF-8 whatever the locale; see `replace_with`."""
    # Names of files that are no UTF-8 become JSON's own escapes.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    replace_with(path, lambda file: file.write(data))


def replace_with(path: epath.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole: nobody ever reads a part of it, not even after a power cut.

    It is written beside its place, brought to the disk and renamed; an object of a bucket is
    written in one go. Several processes may write the same file at once: the last one's stays.

    Raises:
      OSError: it could not be written; `filename` is the path, and what was there is unchanged.
    """
    if is_remote(path):
        content = io.BytesIO()
        write(content)
        with remote_errors(path):
            path.write_bytes(content.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            with contextlib.suppress(OSError):  # Some network disks have no locks.
                fcntl.flock(file, fcntl.LOCK_EX)  # Until it is in its place, see `_abandoned`.
            write(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def _remove_leftovers(path: epath.Path) -> None:
    """Removes what processes that were killed have left beside a file."""
    for name in os.listdir(path.parent):
        if name.startswith(f"{path.name}.") and name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                if _abandoned(path.parent / name):
                    os.unlink(path.parent / name)


def _abandoned(temporary: epath.Path) -> bool:
    """Whether nobody writes it any more: by the clock, which may jump, and by its lock."""
    if time.time() - os.stat(temporary).st_mtime <= A_DAY:
        return False
    with open(temporary, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _sync_directory(directory: epath.Path) -> None:
    """Brings the names in a directory to the disk, where the disk knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Growing:
    """A file that grows by whole records, and keeps those that could not be written until it can.

    A local file is appended to; after a failure, or when somebody else changed it, it is written
    anew, so that half a record never stays in the middle. An object is written whole, at most
    every `REMOTE_SECONDS`, and less often where that takes long.
    """

    def __init__(
        self, path: epath.Path, content: bytes = b"", clock: Callable[[], float] = time.monotonic
    ):
        """Nothing is written yet.

        Args:
          path: replaced by the first write.
          content: what it begins with.
          clock: seconds.
        """
        self.path, self._content, self._clock = path, bytearray(content), clock
        self._there: int | None = None  # Bytes in the file; None: unknown.
        self._next = -math.inf

    def __len__(self) -> int:
        """Bytes, written or not."""
        return len(self._content)

    @property
    def written(self) -> bool:
        """Whether all is in the file."""
        return self._there == len(self._content)

    def append(self, record: bytes) -> None:
        """Adds a record, and writes if it is time.

        Raises:
          OSError: see `write`; the record is kept.
        """
        self._content += record
        if not is_remote(self.path) or self._clock() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes what is not in the file yet.

        Raises:
          OSError: it cannot be written now; `filename` is the path.
        """
        if self.written:
            return
        began, there = self._clock(), self._there
        self._there = None  # Until this has gone well.
        try:
            if is_remote(self.path) or there is None or not self._appended(there):
                replace(self.path, bytes(self._content))
            self._there = len(self._content)
        finally:
            now = self._clock()
            self._next = now + max(REMOTE_SECONDS, (now - began) / REMOTE_SHARE)

    def _appended(self, there: int) -> bool:
        """Appends what comes after so many bytes; False where the file has another length."""
        try:
            with open(self.path, "ab") as file:
                if file.tell() != there:
                    return False
                file.write(memoryview(self._content)[there:])
            return True
        except OSError as error:
            error.filename = str(self.path)
            raise

    def sync(self) -> None:
        """Writes all, and brings it to the disk.

        Raises:
          OSError: see `write`.
        """
        self.write()
        if not is_remote(self.path):
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def remote_errors(path: epath.PathLike) -> Iterator[None]:
    """Whatever the libraries behind gs:// raise becomes an OSError that names the path."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # Theirs have no common class.
        number = getattr(error, "errno", None) or errno.EIO
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(path)) from error
        raise OSError(number, _reason(error), str(path)) from error


def answer(path: epath.PathLike, ask: Callable[[], T], seconds: float = ANSWER_SECONDS) -> T:
    """ask() of a path; of a remote one with a limit of time.

    Raises:
      OSError: no answer in that time (the libraries below go on trying for minutes), or another
        error; it says how often was tried, and why in vain.
      ImportError: the package for such paths is missing.
    """
    if not is_remote(path):
        return ask()
    _prepare_gcsfs()
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            with remote_errors(path):
                answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    with _counted_tries() as tries:
        threading.Thread(target=run, daemon=True).start()
        try:
            value, error = answers.get(timeout=seconds)
        except queue.Empty:
            text = f"no answer within {seconds:g} s; tried {len(tries) + 1} times"
            text += f", last error: {tries[-1]}" if tries else ""
            raise TimeoutError(errno.ETIMEDOUT, text, str(path)) from None
    if isinstance(error, OSError) and tries:
        text = f"{error.strerror} (tried {len(tries) + 1} times)"
        raise OSError(error.errno, text, str(path)) from error
    if error is not None:
        raise error
    return value


def _prepare_gcsfs() -> None:
    """Lets gs:// show what other processes write, and its errors be said once.

    By default each process remembers every listing it has seen, for ever: new objects do not exist
    for it, and one that has grown is read up to its former length.
    """
    from fsspec.config import conf

    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # They are raised as well.


@contextlib.contextmanager
def _counted_tries() -> Iterator[list[str]]:
    """Why each try of gcsfs failed meanwhile, which it tells its log alone."""
    tries: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: (
        tries.append(record.getMessage().partition("after exception: ")[2] or record.getMessage())
        if "exception" in record.getMessage()
        else None
    )
    log = logging.getLogger("gcsfs")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield tries
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else repr(error)
