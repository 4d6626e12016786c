"""HTML from Python: everything that is not markup already is escaped."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax import figures
from experiments.reporting.reading import Table, number

ROWS_SHOWN = 60
WITH_ERROR = re.compile(r"(\S+ ± \S+)(.*)")
VOID = ("img", "input", "br")


class Html(str):
    """Text that is markup, and goes into a page as it is."""


def el(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are no Html are escaped; None and False are left out.

    Attributes are escaped too; class_ is spelled class, and other underscores are hyphens. True
    gives an attribute without a value; None and False none.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after another, escaped where they are no Html."""
    kept = (c for c in children if c is not None and c is not False)
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in kept))


def json_script(content: Any, class_: str) -> Html:
    """JSON for the page's program; numbers that are not finite are null."""
    text = json.dumps(plain(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Html(f'<script type="application/json" class="{class_}">{text}</script>')


def plain(content: Any) -> Any:
    """JSON-able content: six digits of each float, None for those that are not finite."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple, np.ndarray)):
        return [plain(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    if isinstance(content, float):
        return float(f"{content:.6g}") if math.isfinite(content) else None
    return content


def data_uri(data: bytes, kind: str) -> str:
    """A data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def reduced(png: bytes) -> tuple[bytes, int]:
    """The same picture without its enlargement by whole pixels, and the width of what is left."""
    image = np.asarray(Image.open(io.BytesIO(png)))
    factor = 0
    for axis in (0, 1):
        moved = np.moveaxis(image, axis, 0)
        changes = (moved[1:] != moved[:-1]).reshape(len(moved) - 1, -1).any(axis=1)
        factor = math.gcd(factor, len(moved), *(np.flatnonzero(changes) + 1).tolist())
    if factor == 1:
        return png, image.shape[1]
    return to_png(image[::factor, ::factor]), image.shape[1] // factor


def to_png(image: np.ndarray) -> bytes:
    """The PNG of uint8 [h, w], [h, w, 1] or [h, w, 3]."""
    buffer = io.BytesIO()
    squeezed = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    Image.fromarray(squeezed).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def grid_png(images: np.ndarray) -> bytes:
    """The PNG of uint8 images [n, h, w, c] in a grid, pixel for pixel."""
    return to_png(figures.grid(images))


def picture(png: bytes, alt: str, caption: Any = None, pixels: bool = False) -> Html:
    """A picture with its text.

    Args:
      pixels: whether it is of pixels, kept small here and enlarged by the page without blurring;
        otherwise it is a drawing, on white whatever the theme.
    """
    source, width = reduced(png) if pixels else (png, None)
    image = el(
        "img",
        src=data_uri(source, "image/png"),
        alt=alt,
        class_="pixels" if pixels else "drawing",
        style=_size(width),
    )
    return el("figure", image, el("figcaption", caption) if caption else None, class_="picture")


def slider(frames: Sequence[tuple[str, bytes]], label: str, alt: str, start: int, key: str) -> Html:
    """Pictures of pixels, one at a time, chosen by a slider.

    Args:
      frames: (what the slider stands at, PNG).
      alt: of the picture; what the slider stands at is added.
      start: the frame that is shown first.
      key: unique in the page.
    """
    small = [reduced(png) for _, png in frames]
    sources = [data_uri(png, "image/png") for png, _ in small]
    texts = [text for text, _ in frames]
    return el(
        "figure",
        el(
            "img",
            src=sources[start],
            alt=f"{alt}, {texts[start]}",
            data_alt=alt,
            class_="pixels",
            style=_size(small[start][1]),
        ),
        el(
            "div",
            el("label", label, for_=f"{key}-range"),
            el("output", texts[start], for_=f"{key}-range"),
            el(
                "input",
                type="range",
                id=f"{key}-range",
                min=0,
                max=len(frames) - 1,
                step=1,
                value=start,
                aria_valuetext=texts[start],
            ),
            el("button", "Play", type="button", class_="play"),
            class_="slide",
        ),
        json_script({"sources": sources, "texts": texts}, "frames"),
        class_="picture slider",
        id=key,
    )


def _size(width: int | None) -> str | None:
    """So wide at most that a pixel is eight of the screen's, or half a screen."""
    return width and f"width:min(100%,{min(max(8 * width, 160), 640)}px)"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, class_: str = ""
) -> Html:
    """A table whose rows are headed by their first cells; it scrolls sideways by itself."""
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            *map(_data_cell, row[1:]),
        )
        for row in rows
    ]
    whole = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", *(el("th", column, scope="col") for column in columns))),
        el("tbody", *body),
        class_=class_ or None,
    )
    return el("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _data_cell(content: Any) -> Html:
    """A cell in which a number and its error stay in a line."""
    if number(content) is not None:
        return el("td", content, class_="number")
    value = WITH_ERROR.fullmatch(content) if type(content) is str else None
    return el("td", el("span", value[1], class_="number"), value[2]) if value else el("td", content)


def data(found: Table, title: str, file: str, summary: str = "Data") -> Html:
    """A table that folds, and can be downloaded; a long one shows rows evenly chosen."""
    rows, note = found.rows, None
    if len(rows) > ROWS_SHOWN:
        rows = [rows[k] for k in np.linspace(0, len(rows) - 1, ROWS_SHOWN).round().astype(int)]
        note = el("p", f"{ROWS_SHOWN} of {len(found.rows):,} rows; the file has all.")
    text = "\n".join(",".join(map(_cell, row)) for row in (found.columns, *found.rows)) + "\n"
    return el(
        "details",
        el("summary", summary, el("span", f": {title}", class_="hidden")),
        el("p", el("a", f"Download {file}", href=_csv_uri(text), download=file)),
        note,
        table(found.columns, rows, title),
        class_="data",
    )


def _csv_uri(text: str) -> str:
    return f"data:text/csv;charset=utf-8,{urllib.parse.quote(text, safe=',.-+ /:')}"


def _cell(text: str) -> str:
    quoted = any(c in text for c in ',"\n\r')
    return '"' + text.replace('"', '""') + '"' if quoted else text


def inline(text: str) -> str:
    """Text with its code between backticks as such."""
    words = text.split("`")
    if len(words) % 2 == 0 or len(words) == 1:
        return text
    return join(el("code", word) if k % 2 else word for k, word in enumerate(words))


def command(text: str) -> Html:
    """A command line."""
    return el("code", text, class_="command")
