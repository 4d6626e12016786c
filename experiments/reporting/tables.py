"""The tables of a run's report: results with their protocols, the config, the training's starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation.manifest import differences
from ddpm_jax.evaluation.names import BOUND_RESULTS
from experiments.reporting.html import Html, command, el, inline, join, table
from experiments.reporting.reading import Result, RunData

LONG = 8  # Entries of a list that is shown whole.


def results(found: Sequence[Result]) -> list[Html]:
    """A table for each protocol, of the results measured under it."""
    groups: dict[str, list[Result]] = {}
    for r in sorted(found, key=lambda r: not r.name.startswith(BOUND_RESULTS)):
        measured = r.manifest.measured
        how = "; ".join(words(measured.protocol))
        if measured.estimator:
            how += f". Estimated with {', '.join(words(measured.estimator))}"
        groups.setdefault(how, []).append(r)
    arrows = {"lower": " ↓", "higher": " ↑"}
    columns = ("result", "value ± standard error", "step")
    text = "The newest result of each name and protocol. ↓: lower is better; ↑: higher is."
    tables = [el("p", text)]
    for how, own in groups.items():
        rows = []
        for r in own:
            measured = r.manifest.measured
            heading = r.name + arrows.get(measured.better, "")
            rows.append((heading, measured.text(), f"{r.step:,}"))
        tables.append(table(columns, rows, how, "results"))
    return tables


def words(protocol: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A protocol as "key value"; of long lists the ends."""
    found = []
    for key, value in protocol.items():
        if isinstance(value, dict):
            found += words(value, f"{prefix}{key}.")
        else:
            shown = list(map(str, value)) if isinstance(value, list) else [str(value)]
            if len(shown) > LONG:
                shown = [*shown[:2], "…", f"{shown[-1]} ({len(shown)} in all)"]
            found.append(f"{prefix}{key} {('×' if key == 'shape' else ', ').join(shown)}")
    return found


def unlike(subject: Mapping[str, Any], own: ml_collections.ConfigDict) -> dict[str, Any]:
    """{key: value} of a subject's config where it is not the run's own."""
    theirs = subject.get("config")
    if not isinstance(theirs, dict):
        return {}
    found = differences(json.loads(config_lib.to_json(own)), theirs)
    known = config_lib.FIELDS
    return {key: new for key, (_, new) in found.items() if key in known and new is not None}


def config(values: Mapping[str, Any]) -> Html:
    """Keys of the config with their values; the page's program filters them."""
    default, rows = config_lib.default_config(), []
    for key, value in values.items():
        field, usual = config_lib.FIELDS[key], config_lib.get(default, key)
        mark = el("strong", _value(value)) if value != usual else _value(value)
        cells = (el("td", mark), el("td", _value(usual)), el("td", inline(field.meaning)))
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


def all_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """{dotted key: value} of a config."""
    return {key: config_lib.get(config, key) for key in config_lib.FIELDS}


def provenance(run: RunData) -> Html:
    """What the training ran with, at each of its starts."""
    rows = []
    for start in run.starts:
        rows.append(
            (
                start.get("time", ""),
                f"from step {start.get('from_step', 'unknown')}",
                *ran_with(start),
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


def ran_with(start: Mapping[str, Any]) -> tuple[str, str, str]:
    """Commit, devices and versions of a start of the training."""
    versions = start.get("versions", {}).items()
    return (
        _short(start.get("commit")),
        f"{start.get('devices', '')}, {start.get('hosts', '')} host(s)",
        ", ".join(f"{name} {version}" for name, version in versions),
    )


def _short(commit: Any) -> str:
    """Enough of a commit to find it by, and whether files differed from it."""
    name, dash, dirty = str(commit or "unknown").partition("-")
    return name[:12] + dash + dirty
