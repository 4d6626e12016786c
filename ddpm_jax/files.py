"""Files that are whole or not there, on disks and in gs:// buckets.

An object of a bucket is there whole once it is written, so it needs no renaming, which is a copy
and a deletion. It cannot be appended to either: append mode silently replaces it.
"""

from __future__ import annotations

import contextlib
import contextvars
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
SILENT_SECONDS = 30.0  # So long after it did not,
AGAIN_SECONDS = 2.0  # it must answer in this time: what ends then has several files to close.
SLOWEST = 1e6  # Bytes/s that a bucket must take.
REMOTE_SECONDS = 30.0  # Between two writes of the same object.
REMOTE_SHARE = 0.02  # Of the time, at most, goes into writing objects again.

T = TypeVar("T")

# Why each try of gcsfs failed, for who waits for it.
_TRIES: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("tries", default=None)
_SILENT: dict[str, float] = {}  # When a bucket did not answer: the network is the process's.


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def read_text(path: epath.Path) -> str:
    """The text of a UTF-8 file, whatever the locale; see `answer`."""
    return answer(path, path.read_bytes).decode()


def unused(path: epath.Path) -> epath.Path:
    """The path, or the first of PATH1, PATH2, … where nothing is; see `answer`."""
    names = itertools.chain([path.name], (f"{path.name}{k}" for k in itertools.count(1)))
    paths = (path.parent / name for name in names)
    return next(free for free in paths if not answer(free, free.exists))


def mtime(path: epath.Path) -> float:
    """When a file was last written, in seconds; see `answer`."""
    # That of epath asks for the owner's name, which a container may not know.
    return answer(path, path.stat).mtime if is_remote(path) else os.stat(path).st_mtime


def matching(directory: epath.Path, pattern: str) -> list[epath.Path]:
    """What lies in a directory under names such as "*.npz", in their order; [] without directory.

    Unlike `glob`, which takes a bracket in the directory's own name for a part of the pattern.

    Raises:
      OSError: see `answer`.
    """
    try:
        there = answer(directory, lambda: list(directory.iterdir()))
    except FileNotFoundError:
        return []
    return sorted(path for path in there if fnmatch.fnmatchcase(path.name, pattern))


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
        One of a bucket that does not answer comes in time, see `answer`.
    """
    if is_remote(path):
        content = io.BytesIO()
        write(content)
        _upload(path, content.getvalue())
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


def _upload(path: epath.Path, content: bytes) -> None:
    """Writes an object, or gives it up: none comes over what is written later."""
    seconds = _patience(path) + len(content) / SLOWEST

    def ask() -> None:
        import fsspec

        # That of epath, whose files know no limit, and try again when they are let go of.
        bucket = fsspec.filesystem("gcs", finalize_on_close=True)
        bucket.pipe_file(str(path), content, timeout=seconds + 1)  # Then nobody waits any more.

    answer(path, ask, seconds)


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


def answer(path: epath.PathLike, ask: Callable[[], T], seconds: float | None = None) -> T:
    """ask() of a path; of a remote one with a limit of time.

    Args:
      seconds: the limit, unless `ANSWER_SECONDS`, or `AGAIN_SECONDS` where the bucket has just not
        answered.
    Raises:
      OSError: no answer in that time (the libraries below go on trying for minutes), or another
        error; it says how often was tried, and why in vain.
      ImportError: the package for such paths is missing.
    """
    if not is_remote(path):
        return ask()
    _prepare_gcsfs()
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
    tries: list[str] = []

    def run() -> None:
        _TRIES.set(tries)
        try:
            with remote_errors(path):
                answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    limit = _patience(path) if seconds is None else seconds
    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=limit)
    except queue.Empty:
        if not _was_silent(path):
            _SILENT[_bucket(path)] = time.monotonic()
        text = f"no answer within {limit:.3g} s; tried {len(tries) + 1} times"
        text += f", last error: {tries[-1]}" if tries else ""
        raise TimeoutError(errno.ETIMEDOUT, text, str(path)) from None
    if isinstance(error, OSError) and tries:
        text = f"{error.strerror} (tried {len(tries) + 1} times)"
        raise OSError(error.errno, text, str(path)) from error
    if error is not None:
        raise error
    return value


def _bucket(path: epath.PathLike) -> str:
    """gs://BUCKET."""
    return "/".join(os.fspath(path).split("/")[:3])


def _was_silent(path: epath.PathLike) -> bool:
    """Whether a path's bucket has just not answered."""
    return time.monotonic() - _SILENT.get(_bucket(path), -math.inf) < SILENT_SECONDS


def _patience(path: epath.PathLike) -> float:
    return AGAIN_SECONDS if _was_silent(path) else ANSWER_SECONDS


def _prepare_gcsfs() -> None:
    """Lets gs:// show what other processes write, and its failed tries be counted.

    By default each process remembers every listing it has seen, for ever: new objects do not exist
    for it, and one that has grown is read up to its former length.
    """
    from fsspec.config import conf

    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    log = logging.getLogger("gcsfs")  # It alone is told of tries; errors are raised as well.
    if not any(isinstance(handler, _Tries) for handler in log.handlers):
        log.addHandler(_Tries())
    log.setLevel(logging.DEBUG)
    log.propagate = False


class _Tries(logging.Handler):
    """Notes why each try failed after which gcsfs tries again."""

    def emit(self, record: logging.LogRecord) -> None:
        # What gcsfs does in its own thread has the context of who asked for it.
        tries, (_, _, why) = _TRIES.get(), record.getMessage().partition("retrying after exception")
        if tries is not None and why:
            tries.append(why.removeprefix(": "))


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else repr(error)
