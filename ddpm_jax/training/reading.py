"""Reading what may be damaged, or may only be out of reach at the moment: which of the two."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

ATTEMPTS = 3
PAUSE = 1.0  # Seconds after the first attempt; twice as long after the second.

# What comes of bytes that are wrong, and of files that are not there or are none.
_DAMAGE = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    NotImplementedError,
    RecursionError,
)
# TensorStore makes a ValueError of all that it meets; those that begin so tell nothing of the bytes
# (of a disk's input/output error "UNKNOWN", of too many open files "RESOURCE_EXHAUSTED").
_NO_DAMAGE = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNKNOWN",
)

T = TypeVar("T")


class UnreadError(RuntimeError):
    """Something could not be read, and nothing tells that it is damaged."""


def patiently(what: Any, read: Callable[[], T]) -> T:
    """read(), and again up to `ATTEMPTS` times in all where it fails by what may pass.

    Args:
      what: is read, for messages.
    Raises:
      UnreadError: it failed so each time: by the disk, the memory, the network.
      Exception: what `read` raises of something damaged.
    """
    for attempt in itertools.count(1):
        try:
            return read()
        except Exception as error:  # Orbax raises whatever its layers happen to raise.
            raise_interrupts(error)
            if _is_damage(error):
                raise
            kind = type(_root(error)).__name__
            problem = f"{what} cannot be read ({kind}: {first_line(error)})"
            if attempt == ATTEMPTS:
                raise UnreadError(f"{problem}, tried {attempt} times") from error
        logging.getLogger(__name__).warning(
            "%s; reading it again, attempt %d of %d", problem, attempt + 1, ATTEMPTS
        )
        time.sleep(PAUSE * attempt)


def _is_damage(error: Exception) -> bool:
    """Whether something failed by what is there."""
    root = _root(error)
    return isinstance(root, _DAMAGE) and not str(root).startswith(_NO_DAMAGE)


def _root(error: Exception) -> BaseException:
    """The error that Orbax has made an `Exception` of."""
    return error.__cause__ if type(error) is Exception and error.__cause__ else error


def raise_interrupts(error: BaseException) -> None:
    """Raises the KeyboardInterrupt that an error comes from: Orbax makes others of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__


def first_line(error: Exception) -> str:
    """What an error says, in a line of at most 200 characters: its beginning and its end."""
    root = _root(error)
    line = (str(root).strip().splitlines() or [repr(root)])[0]
    # TensorStore says why last, but for all that it knows of the place.
    line = re.sub(r" \[\w+(\[\d+\])?='.*", "", line)
    return line if len(line) <= 200 else f"{line[:80]} … {line[-117:]}"
