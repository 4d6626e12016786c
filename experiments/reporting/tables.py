"""The tables of a run's report: results with their protocols, the config, the training's starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation.manifest import Manifest
from ddpm_jax.evaluation.names import BOUND_RESULTS
from experiments.reporting.html import Html, command, el, join, table
from experiments.reporting.reading import RunData


def results(found: Mapping[str, Manifest]) -> list[Html]:
    """A table for each protocol, of the results measured under it."""
    groups: dict[str, dict[str, Manifest]] = {}
    bound_first = sorted(found, key=lambda n: not n.startswith(BOUND_RESULTS))
    for name, m in ((name, found[name]) for name in bound_first):
        groups.setdefault("; ".join(_words(m.measured.protocol)), {})[name] = m
    arrows = {"lower": " ↓", "higher": " ↑"}
    columns = ("result", "value ± standard error", "step")
    tables = [el("p", "The newest result of each name. ↓: lower is better; ↑: higher is.")]
    for protocol, own in groups.items():
        rows = []
        for name, m in own.items():
            heading = name + arrows.get(m.measured.better, "")
            rows.append((heading, m.measured.text(), f"{m.subject['checkpoint']:,}"))
        tables.append(table(columns, rows, protocol, "results"))
    return tables


def _words(protocol: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A protocol as "key: value"."""
    found = []
    for key, value in protocol.items():
        if isinstance(value, dict):
            found += _words(value, f"{prefix}{key}.")
        else:
            shown = "×".join(map(str, value)) if isinstance(value, list) else value
            found.append(f"{prefix}{key} {shown}")
    return found


def config(run: RunData) -> Html:
    """Every key of the config; the page's program filters them."""
    default, rows = config_lib.default_config(), []
    for key, field in config_lib.FIELDS.items():
        value, usual = config_lib.get(run.config, key), config_lib.get(default, key)
        mark = el("strong", _value(value)) if value != usual else _value(value)
        cells = (el("td", mark), el("td", _value(usual)), el("td", field.meaning))
        row = (el("th", el("code", key), scope="row"), *cells)
        rows.append(el("tr", *row, class_="differs" if value != usual else None))
    heads = (el("th", name, scope="col") for name in ("key", "value", "default", "meaning"))
    caption = "Config; values that differ from the default (the paper's CIFAR-10 run) are bold"
    whole = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", *heads)),
        el("tbody", *rows),
        id="config-table",
    )
    controls = el(
        "div",
        el("label", "Filter ", el("input", type="search", id="config-filter")),
        el(
            "label",
            el("input", type="checkbox", id="config-differs", checked=True),
            " only what differs from the default",
        ),
        el("output", "", id="config-count", for_="config-filter config-differs"),
        class_="controls",
    )
    scroll = el("div", whole, class_="scroll", tabindex=0, role="region", aria_label="Config")
    return join([controls, scroll])


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def provenance(run: RunData) -> Html:
    """What the training ran with, at each of its starts."""
    rows = []
    for start in run.starts:
        versions = start.get("versions") or {}
        rows.append(
            (
                start.get("time", ""),
                f"from step {start.get('from_step', 'unknown')}",
                _short(start.get("commit")),
                f"{start.get('devices', '')}, {start.get('hosts', '')} host(s)",
                ", ".join(f"{name} {version}" for name, version in versions.items()),
                el("code", start.get("command", "")),
            )
        )
    columns = ("start (UTC)", "training", "commit", "devices", "versions", "command")
    noted = (
        table(columns, rows, "Starts of the training", "starts")
        if rows
        else el(
            "p",
            "Starts were not noted when this run was trained; any further start of ",
            command(f"python -m ddpm_jax.main --workdir={shlex.quote(run.shown)}"),
            " will be.",
        )
    )
    seed = el("p", f"Seed {run.config.seed}. Files: ", el("code", str(run.directory.path)))
    return join([seed, noted])


def _short(commit: Any) -> str:
    """Enough of a commit to find it by, and whether files differed from it."""
    name, dash, dirty = str(commit or "unknown").partition("-")
    return name[:12] + dash + dirty
