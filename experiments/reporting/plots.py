"""Plots as data: the page's program draws them with plotly, and a table stands below each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.html import Html, data, el, json_script
from experiments.reporting.reading import Table

MOST_POINTS = 2000  # Of a curve.


@dataclasses.dataclass(frozen=True)
class Axis:
    """`log`: whether it begins logarithmic; the reader can switch an axis of numbers."""

    title: str
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve or points: y of x, which are numbers or names of categories.

    Attributes:
      error: of y, in its unit; drawn as a band or as bars. A point without one is hollow.
      kind: line, points or both.
      color: a place in the page's palette.
      faint: one of many, behind the others.
      group: series of one group share an entry of the legend, the first one's.
      hover: a text for each point.
    """

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None
    kind: str = "line"
    color: int = 0
    faint: bool = False
    group: str = ""
    hover: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the things that a plot can show. x: its own axis instead of the plot's."""

    label: str
    y: Axis
    series: Sequence[Series]
    x: Axis | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
      key: unique in the page; the name of its file.
      alt: what is to be seen, in a sentence.
      choices: if there are several, the reader chooses.
      flipped: x, of categories, runs downwards, and y to the right. Long names get several lines.
      choose: what is chosen, as the label of the choice.
    """

    key: str
    title: str
    alt: str
    x: Axis
    choices: Sequence[Choice]
    flipped: bool = False
    choose: str = "Show"
    note: str = ""

    def spec(self) -> dict[str, Any]:
        """For the page's program."""
        return dataclasses.asdict(self)

    def table(self, choice: Choice) -> Table:
        """Every point of every series: a row for each x, and for each time that a series has it."""
        columns = {"x": (choice.x or self.x).title}
        rows: dict[tuple[Any, int], dict[str, str]] = {}
        for number, series in enumerate(choice.series):
            parts = {": point": series.hover, "": series.y, ": error": series.error}
            parts = {name: values for name, values in parts.items() if values is not None}
            columns |= {f"{number}{part}": series.name + part for part in parts}
            seen = collections.Counter()
            for k, x in enumerate(series.x):
                row = rows.setdefault((x, seen[x]), {"x": text(x)})
                row |= {f"{number}{part}": text(values[k]) for part, values in parts.items()}
                seen[x] += 1
        every = list(dict.fromkeys(x for x, _ in rows))
        if not any(isinstance(x, str) for x in every):
            every.sort()
        place = {x: k for k, x in enumerate(every)}
        ordered = sorted(rows, key=lambda key: (place[key[0]], key[1]))
        return Table([*columns.values()], [[rows[k].get(c, "") for c in columns] for k in ordered])

    def html(self) -> Html:
        """The figure: toolbar, plot, table."""
        several = len(self.choices) > 1
        choose = several and el(
            "div",
            el("label", self.choose, for_=f"{self.key}-choice"),
            el(
                "select",
                *(el("option", c.label, value=k) for k, c in enumerate(self.choices)),
                id=f"{self.key}-choice",
            ),
            class_="choice",
        )
        tables = [
            data(
                self.table(choice),
                f"{self.title}: {choice.label}" if several else self.title,
                f"{self.key}_{k}.csv" if several else f"{self.key}.csv",
                f"Data: {choice.label}" if several else "Data",
            )
            for k, choice in enumerate(self.choices)
        ]
        if several:
            tables = [el("details", el("summary", "Data"), *tables, class_="data")]
        return el(
            "figure",
            el("h3", self.title, id=f"{self.key}-title"),
            el(
                "div",
                choose,
                el("div", class_="tools", role="toolbar", aria_label=f"View of: {self.title}"),
                class_="bar",
            ),
            el("div", class_="area", role="img", aria_label=f"{self.title}. {self.alt}"),
            el("p", self.note, class_="note") if self.note else None,
            *tables,
            json_script(self.spec(), "spec"),
            class_="plot",
            id=self.key,
        )


def text(value: Any) -> str:
    """A number to six digits, a name as it is, and nothing for None or NaN."""
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def curve(
    records: Sequence[dict[str, Any]],
    key: str,
    name: str = "",
    most: int = MOST_POINTS,
    **more: Any,
) -> Series:
    """A key of metrics.jsonl over the step, with `key_error` as its error where that is there.

    Args:
      most: points, see `thinned`.
      more: further fields of the series.
    """
    points = [r for r in records if isinstance(r.get(key), (int, float))]
    kept = thinned([r[key] for r in points], most)
    points = [points[k] for k in kept]
    errors = [r.get(f"{key}_error") for r in points]
    return Series(
        name or key,
        [r["step"] for r in points],
        [r[key] for r in points],
        errors if any(e is not None for e in errors) else None,
        **more,
    )


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """At most `most` positions: the least and the greatest of as many equal parts as that gives."""
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), most // 2 - 1):
        chosen = np.asarray([values[k] for k in part], np.float64)
        if np.isfinite(chosen).any():
            kept |= {int(part[np.nanargmin(chosen)]), int(part[np.nanargmax(chosen)])}
    return sorted(kept)
