"""The page: one HTML file that needs nothing else, from its sections and the files beside this."""

from __future__ import annotations

import html
import pathlib
import string

from ddpm_jax.config import RequestError
from experiments.reporting.html import Html, command, el, join
from experiments.reporting.sections import Page

HERE = pathlib.Path(__file__).parent


def plotly_js() -> str:
    """The program that draws the plots, as the installed plotly brings it.

    Raises:
      RequestError: there is none.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise RequestError(
            "the report draws with plotly, which is not installed: pip install -e '.[report]'"
        ) from None
    return get_plotlyjs()


def render(page: Page, plotly: str, made: str) -> str:
    """The page's HTML.

    Args:
      plotly: JavaScript.
      made: when and by what the report was made.
    """
    links = [el("li", el("a", s.title, href=f"#{s.key}")) for s in page.sections]
    if page.missing:
        links.append(el("li", el("a", "Not here yet", href="#missing")))
    tiles = [el("div", el("dt", name), el("dd", value)) for name, value in page.tiles]
    sections = [
        el(
            "section",
            el("h2", s.title, id=f"{s.key}-heading"),
            s.body,
            id=s.key,
            aria_labelledby=f"{s.key}-heading",
        )
        for s in page.sections
    ]
    template = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(page.title),
        line=html.escape(page.line),
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=_in_script((HERE / "script.js").read_text(encoding="utf-8")),
        plotly=_in_script(plotly),
        tiles=join(tiles),
        links=join(links),
        sections=join([*sections, _missing(page)]),
        made=html.escape(made),
    )


def _missing(page: Page) -> Html | None:
    if not page.missing:
        return None
    lines = (el("li", m.what, ": ", command(m.command)) for m in page.missing)
    return el(
        "section",
        el("h2", "Not here yet", id="missing-heading"),
        el("p", "What this directory does not hold yet, and the command that makes it:"),
        el("ul", *lines),
        id="missing",
        aria_labelledby="missing-heading",
    )


def _in_script(program: str) -> str:
    """JavaScript that cannot end its element."""
    return program.replace("</script", "<\\/script").replace("<!--", "<\\!--")
