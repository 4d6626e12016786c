"""What a report is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.reporting.html import Html


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    body: Html


@dataclasses.dataclass(frozen=True)
class Missing:
    """What the data cannot give, and the command that makes it."""

    what: str
    command: str


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole report: title, a line below it, tiles (label, value), sections, what is missing."""

    title: str
    line: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    missing: Sequence[Missing]
