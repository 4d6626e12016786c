"""Files that are whole or not there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath

A_DAY = 86400  # Seconds.


def replace(path: epath.Path, content: bytes | str) -> None:
    """Writes a file, see `replace_with`."""
    data = content.encode() if isinstance(content, str) else content
    replace_with(path, lambda file: file.write(data))


def replace_with(path: epath.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file beside its place and renames it: nobody ever reads a part of it.

    Several processes may write the same file at once: the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # By a process that was killed.
        if time.time() - left.stat().mtime > A_DAY:
            left.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
