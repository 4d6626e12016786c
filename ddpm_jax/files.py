"""Files that are whole or not there."""

from __future__ import annotations

from etils import epath


def replace(path: epath.Path, content: bytes | str) -> None:
    """Writes a file beside its place and renames it: nobody ever reads a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    data = content.encode() if isinstance(content, str) else content
    temporary.write_bytes(data)
    temporary.replace(path)
