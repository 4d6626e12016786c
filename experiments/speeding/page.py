"""The measurements as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax.training.check import counted
from experiments.speeding.accelerators import SHARES, SLICES
from experiments.speeding.contest import ratio
from experiments.speeding.curves import UNIT, UNITS
from experiments.speeding.inputs import STEP_SECONDS


def tables(found: Mapping[str, Any]) -> str:
    """Every part of `experiments.speed`'s result, a table each."""
    machine = found["hardware"]
    set_here = "".join(f", {name}={value}" for name, value in machine["environment"].items())
    line = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
    )
    line += f"Python {machine['python']}{set_here}; commit {machine['commit'] or 'unknown'}"
    lines = [line, ""]
    for network, results in found["networks"].items():
        lines += _contest(network, results)
    if "start" in found:
        lines += _starts(found["start"])
    if "input" in found:
        lines += _input(found["input"])
    if "curves" in found:
        lines += _curves(found["curves"])
    if "accelerators" in found:
        lines += _accelerators(found["accelerators"])
    return "\n".join(lines)


def _input(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(one["batch"]),
            one["where"],
            f"{one['waiting']:.2%}",
        ]
        for name, one in found.items()
    ]
    lines = [f"Waiting for images, of a step of {STEP_SECONDS * 1000:.0f} ms:", ""]
    return lines + _table(["images", "batch", "where", "waiting"], rows)


def _curves(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{one['at']:,g}",
            f"{one['seconds']:.4g} {UNITS.get(name, UNIT)}",
            f"{one['seconds'] / points[0]['seconds']:.2f}",
            f"{one['nbytes'] / 2**30:.2f}",
        ]
        for name, points in found["points"].items()
        for one in points
    ]
    lines = [f"What it costs ({found['network']}):", ""]
    return lines + _table(["", "at", "takes", "of the first", "peak memory, GiB"], rows)


def _accelerators(found: Mapping[str, Any]) -> list[str]:
    shares = " / ".join(f"{share:.0%}" for share in SHARES)
    head = ["config", "batch", "steps", "TFLOP a step", "GiB a step", *(s.name for s in SLICES)]
    rows = [
        [
            path,
            str(one["batch"]),
            f"{one['steps']:,}",
            f"{one['flops'] / 1e12:.2f}",
            f"{one['bytes'] / 2**30:.1f}",
            *(" / ".join(f"{hours:,.1f}" for hours in one["hours"][s.name]) for s in SLICES),
        ]
        for path, one in found.items()
    ]
    lines = [f"On paper: hours of a run where the FLOPs reach {shares} of the peak:", ""]
    return lines + _table(head, rows)


def _contest(network: str, results: Mapping[str, Any]) -> list[str]:
    flops, contestants = results["flops"], results["contestants"]
    ours = contestants[0]
    jobs = [job for job in ("train", "sample", "chain") if ours[job]]
    head = ["contestant", "parameters"]
    for job in jobs:
        head += [f"{job}, s", f"ours / this ({job})"]
    head += ["GFLOP/s (of the matrix rate)"] if "train" in jobs else []
    head += ["peak memory, GiB", "first step cold, s", "cached, s"]
    rows = []
    for one in contestants:
        row = [one["name"], f"{one['about']['parameters']:,}"]
        for job in jobs:
            row += [_spread(one[job]), _ratio(ours[job], one[job])]
        if "train" in jobs:
            row.append(_rate(one, ours, flops["train"]))
        row += [f"{one['memory'] / 2**30:.2f}", f"{one['cold']:.1f}", f"{one['warm']:.1f}"]
        rows.append(row)
    by_xla = counted(flops["train_xla"], f"{flops['train_xla'] / 1e9:,.2f} as XLA counts")
    lines = [
        f"**{network}**: a training step of {results['batch']} images, "
        f"{flops['train'] / 1e9:,.2f} GFLOP by hand ({by_xla}); "
        f"a sampling step of {results['samples']}, {flops['sample'] / 1e9:,.2f}",
        "",
    ]
    lines += _table(head, rows)
    about = [
        f"{one['name']}: {', '.join(f'{k} {v}' for k, v in one['about']['versions'].items())}, "
        f"on {one['about']['devices']}"
        for one in contestants
    ]
    lines += [f"{'; '.join(about)}.", ""]
    if "train" in jobs:
        lines += ["GFLOP/s count convolutions as they are written; ours may run fewer on CPUs.", ""]
    if ours["evaluate"]:
        over, low, high = ratio(ours["sample"], ours["evaluate"])
        lines += [f"Sampling over the network alone: {over:.3f} × ({low:.3f}–{high:.3f}).", ""]
    return lines


def _rate(one: Mapping[str, Any], ours: Mapping[str, Any], flops: float) -> str:
    if one["about"]["parameters"] != ours["about"]["parameters"]:
        return ""
    rate, matrix = flops / statistics.median(one["train"]), statistics.median(one["matrix"])
    return f"{rate / 1e9:,.1f} ({rate / matrix:.0%} of {matrix / 1e9:,.0f})"


def _starts(found: Mapping[str, Any]) -> list[str]:
    rows = [[network, f"{one['cold']:.1f}", f"{one['warm']:.1f}"] for network, one in found.items()]
    lines = ["From the shell to the first step of a training, s:", ""]
    return lines + _table(["network", "nothing compiled before", "all in the cache"], rows)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.4g} ({min(seconds):.4g}–{max(seconds):.4g})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    middle, low, high = ratio(ours, theirs)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
